//! `gd op attend`: runs an attention mechanism on the tensors of a file.

mod beside;
mod case;
mod gradients;
mod rows;
mod source;

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use gd_layer::mechanisms::{AttentionMechanism, Info, Named, TABLE};
use gd_model::io::safetensors::{self, Tensors};
use serde_json::{Map, Value, json};

use self::beside::Beside;
use self::case::Case;
use self::source::Source;
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
    let (results, parameters) = run_case(mechanism, &args.case, &tensors, &file, args.backward)?;
    safetensors::write(&output, &results)?;
    report(mechanism, &parameters, &output, &results, ctx)
}

/// The results of a case by name, of a mechanism or of what is beside them, and the parameters that it was run with.
fn run_case(
    mechanism: &str,
    case: &str,
    tensors: &Tensors,
    file: &Value,
    backward: bool,
) -> Result<(Tensors, Value)> {
    let source = Source::new(case, tensors, file)?;
    if let Some(beside) = Beside::named(mechanism) {
        let run = beside.run(&source, backward)?;
        return Ok((run.results, run.parameters));
    }
    let case = Case::read(mechanism_named(mechanism)?, source)?;
    let results =
        if case.source().name == rows::ROWS { rows::run(&case, tensors)? } else { case.run(backward)? };
    let mut parameters = serde_json::to_value(case.mechanism())?;
    if let Some(keys) = parameters.as_object_mut() {
        keys.remove("name");
    }
    Ok((results, parameters))
}

/// The mechanism of this name with default parameters.
fn mechanism_named(name: &str) -> Result<AttentionMechanism> {
    AttentionMechanism::named(name).with_context(|| {
        let names = TABLE.iter().map(|(name, _)| *name).chain(beside::TABLE.iter().map(|entry| entry.name));
        format!("no mechanism {name:?}; there are {}", names.collect::<Vec<_>>().join(", "))
    })
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON file", path.display()))
}

fn report(mechanism: &str, parameters: &Value, path: &Path, results: &Tensors, ctx: &Context) -> Result<()> {
    if ctx.json {
        let tensors: Map<String, Value> = results
            .iter()
            .map(|(name, t)| {
                (name.clone(), json!({ "shape": t.dims(), "dtype": format!("{:?}", t.dtype()) }))
            })
            .collect();
        return ctx.print(json!({
            "operator": "attend",
            "mechanism": mechanism,
            "parameters": parameters,
            "out": path,
            "tensors": tensors,
        }));
    }
    let names: Vec<&str> = results.keys().map(String::as_str).collect();
    ctx.print(format_args!(
        "attend with {mechanism} {parameters}: wrote {} to {}",
        names.join(", "),
        path.display()
    ))
}

/// Prints every mechanism, and what is beside them.
fn list(ctx: &Context) -> Result<()> {
    let all: Vec<Listed> =
        TABLE.iter().map(Listed::of_mechanism).chain(beside::TABLE.iter().map(Listed::of_beside)).collect();
    if ctx.json {
        return ctx.print(Value::Array(all.iter().map(Listed::json).collect()));
    }
    for entry in &all {
        let Listed { name, formula, stages, parameters, tensors, source, .. } = entry;
        ctx.print(format_args!("{name}\n  formula     {formula}\n  stages      {stages}"))?;
        for (parameter, what) in *parameters {
            ctx.print(format_args!("  parameter   {parameter}: {what}"))?;
        }
        ctx.print(format_args!("  tensors     {}", tensors.join(", ")))?;
        ctx.print(format_args!("  source      {source}"))?;
    }
    Ok(())
}

/// An entry of the list.
struct Listed {
    name: &'static str,
    formula: &'static str,
    stages: String,
    parameters: &'static [(&'static str, &'static str)],
    /// Names and shapes of the tensors that it reads.
    tensors: Vec<String>,
    memory: &'static str,
    source: &'static str,
    in_models: bool,
}

impl Listed {
    fn of_mechanism(&(name, info): &(&'static str, Info)) -> Self {
        let stages = AttentionMechanism::named(name).map(|mechanism| mechanism.computation().to_string());
        let tensors = info.inputs.iter().chain(info.learned).chain(info.constants);
        Self {
            name,
            formula: info.formula,
            stages: stages.unwrap_or_default(),
            parameters: info.parameters,
            tensors: tensors.map(|(name, shape): &Named| format!("{name} {shape}")).collect(),
            memory: info.memory,
            source: info.source,
            in_models: info.not_in_models.is_none(),
        }
    }

    fn of_beside(entry: &Beside) -> Self {
        Self {
            name: entry.name,
            formula: entry.formula,
            stages: entry.steps.to_owned(),
            parameters: entry.parameters,
            tensors: entry.tensors.iter().map(|&tensor| tensor.to_owned()).collect(),
            memory: entry.memory,
            source: entry.source,
            in_models: false,
        }
    }

    fn json(&self) -> Value {
        let parameters: Map<String, Value> =
            self.parameters.iter().map(|&(name, what)| (name.into(), what.into())).collect();
        json!({
            "name": self.name,
            "formula": self.formula,
            "stages": self.stages,
            "parameters": parameters,
            "tensors": self.tensors,
            "memory": self.memory,
            "source": self.source,
            "in_models": self.in_models,
        })
    }
}
