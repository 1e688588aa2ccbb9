//! `gd op attend`: runs an attention mechanism on the tensors of a file.

pub mod case;
mod rows;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use gd_layer::mechanisms::{AttentionMechanism, Info, Named, TABLE};
use gd_model::io::safetensors::{self, Tensors};
use serde_json::{Map, Value, json};

use self::case::Case;
use super::args::AttendArgs;
use crate::context::{Context, usage};

/// Runs the operator, or lists the mechanisms.
pub(super) fn run(args: &AttendArgs, ctx: &Context) -> Result<()> {
    if args.list {
        return list(ctx);
    }
    let required =
        |flag: &str, value: &Option<_>| value.clone().ok_or_else(|| usage(format!("--{flag} is missing")));
    let (input, output) = (required("in", &args.input)?, required("out", &args.output)?);
    let mechanism = args.mechanism.as_deref().ok_or_else(|| usage("--mechanism is missing"))?;
    let tensors = safetensors::load(&input, &ctx.device)?;
    let file = args.params.as_deref().map_or_else(|| Ok(json!({})), read_json)?;
    let results = attend(mechanism, &args.case, &tensors, &file, args.backward)?;
    safetensors::write(&output, &results)?;
    report(mechanism, &output, &results, ctx)
}

/// The results of a case, by name. See [`Case`].
///
/// # Errors
/// As [`Case::read`] and [`Case::run`].
pub fn attend(
    mechanism: &str,
    case: &str,
    tensors: &Tensors,
    file: &Value,
    backward: bool,
) -> Result<Tensors> {
    let read = Case::read(mechanism, case, tensors, file)?;
    if case == rows::ROWS { rows::run(&read, tensors) } else { read.run(backward) }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON file", path.display()))
}

fn report(mechanism: &str, path: &Path, results: &Tensors, ctx: &Context) -> Result<()> {
    if ctx.json {
        let tensors: Map<String, Value> = results
            .iter()
            .map(|(name, t)| {
                (name.clone(), json!({ "shape": t.dims(), "dtype": format!("{:?}", t.dtype()) }))
            })
            .collect();
        return ctx
            .print(json!({ "operator": "attend", "mechanism": mechanism, "out": path, "tensors": tensors }));
    }
    let names: Vec<&str> = results.keys().map(String::as_str).collect();
    ctx.print(format_args!("attend with {mechanism}: wrote {} to {}", names.join(", "), path.display()))
}

/// Prints every mechanism.
fn list(ctx: &Context) -> Result<()> {
    let stages =
        |name: &str| AttentionMechanism::named(name).map(|m| m.computation().to_string()).unwrap_or_default();
    if ctx.json {
        let all: Vec<Value> = TABLE
            .iter()
            .map(|&(name, info)| {
                let parameters: Map<String, Value> =
                    info.parameters.iter().map(|&(name, what)| (name.into(), what.into())).collect();
                json!({
                    "name": name,
                    "formula": info.formula,
                    "stages": stages(name),
                    "parameters": parameters,
                    "tensors": tensors_of(&info),
                    "memory": info.memory,
                    "source": info.source,
                    "in_models": info.not_in_models.is_none(),
                })
            })
            .collect();
        return ctx.print(Value::Array(all));
    }
    for &(name, info) in TABLE {
        ctx.print(format_args!("{name}\n  formula     {}\n  stages      {}", info.formula, stages(name)))?;
        for (parameter, what) in info.parameters {
            ctx.print(format_args!("  parameter   {parameter}: {what}"))?;
        }
        ctx.print(format_args!("  tensors     {}", tensors_of(&info).join(", ")))?;
        ctx.print(format_args!("  source      {}", info.source))?;
    }
    Ok(())
}

/// Names and shapes of the tensors that a mechanism reads.
fn tensors_of(info: &Info) -> Vec<String> {
    let all = info.inputs.iter().chain(info.learned).chain(info.constants);
    all.map(|(name, shape): &Named| format!("{name} {shape}")).collect()
}
