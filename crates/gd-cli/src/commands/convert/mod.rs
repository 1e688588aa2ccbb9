//! `gd convert`: replaces the attention of a model and saves the result as a new model.

mod args;
mod uptrain;

use anyhow::Result;
use candle_core::DType;
use gd_kernels::CANDIDATES;
use gd_model::config::Mechanism;
use gd_model::io::checkpoint::locate;
use gd_model::io::files::check_writable;
use gd_model::io::gguf::{Quantization, Written};
use gd_model::model::adapter::Adapter;
use gd_model::model::pretrained::{self, Loaded};
use gd_model::model::swap::new_parameters;
use serde_json::json;

pub use args::Args;

use crate::context::{Context, usage};
use crate::training::in_group;

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if !CANDIDATES.contains(&args.k()) {
        return Err(usage(format!("--k {}: expected one of {CANDIDATES:?}", args.k())));
    }
    if let Some(mechanism) =
        args.attention.as_ref().filter(|_| !args.selects() && (args.k.is_some() || args.score.is_some()))
    {
        let name = mechanism.name();
        return Err(usage(format!(
            "--k and --score are settings of selecting layers (--attention gd), not of {name}; parameters of other \
             mechanisms are part of --attention, as in '{{\"name\": \"topk\", \"k\": 16}}'"
        )));
    }
    if args.out.symlink_metadata().is_ok() {
        return Err(usage(format!("--out {}: exists already", args.out.display())));
    }
    check_writable(&args.out)?;
    if args.uptrain.uptrain {
        return in_group(ctx, |group| uptrain::run(group, &args, ctx));
    }
    let mut parts = pretrained::read(&args.model, &ctx.device)?;
    if let Some(folder) = &args.adapter {
        let (located, _) = locate(folder)?;
        // With --dtype, the sums are rounded once.
        Adapter::read(&located, &ctx.device)?.merge(&mut parts, args.dtype.map(|_| DType::F32))?;
    }
    let changed = args.swap().map_or(Ok(Vec::new()), |swap| swap.apply(&mut parts))?;
    if let Some(dtype) = args.dtype {
        parts.cast(dtype)?;
    }
    let loaded = parts.build(&ctx.device)?;
    if let Some(quantization) = args.quantize {
        let written = loaded.write_gguf(&args.out, quantization)?;
        return print_file(&args, quantization, &written, ctx);
    }
    loaded.save(&args.out, &model_card(&args, &changed, &loaded))?;
    print_result(&args, &changed, &loaded, ctx)
}

fn print_result(args: &Args, changed: &[usize], loaded: &Loaded, ctx: &Context) -> Result<()> {
    let config = loaded.model.config();
    let layers = config.num_hidden_layers;
    let selecting = (0..layers).filter(|&i| *config.mechanism(i) == Mechanism::Gd).count();
    let new = new_parameters(&loaded.params, changed);
    if ctx.json {
        return ctx.print(json!({
            "folder": args.out, "changed": changed, "selecting": selecting,
            "layers": layers, "parameters": loaded.params.count(), "new_parameters": new,
            "passed_over": loaded.skipped,
        }));
    }
    let untrained = if new == 0 { String::new() } else { format!(", {new} of them new and untrained") };
    ctx.print(format_args!(
        "{} layers changed; {selecting} of {layers} select; {} parameters{untrained}\nsaved {}",
        changed.len(),
        loaded.params.count(),
        args.out.display()
    ))
}

/// Prints what a GGUF file holds.
fn print_file(args: &Args, quantization: Quantization, written: &Written, ctx: &Context) -> Result<()> {
    let bytes = args.out.metadata()?.len();
    if ctx.json {
        return ctx.print(json!({
            "file": args.out, "bytes": bytes, "type": quantization.name(),
            "architecture": written.architecture, "tensors": written.types,
        }));
    }
    let types: Vec<String> = written.types.iter().map(|(name, count)| format!("{count} {name}")).collect();
    ctx.print(format_args!(
        "tensors: {}\nsaved {}: {:.1} MiB, architecture {}{}",
        types.join(", "),
        args.out.display(),
        bytes as f64 / (1 << 20) as f64,
        written.architecture,
        if written.architecture == "gd" { ", which llama.cpp does not read" } else { "" }
    ))
}

/// The placeholders of the model card template and their values.
fn model_card(args: &Args, changed: &[usize], loaded: &Loaded) -> Vec<(&'static str, String)> {
    let file_name =
        |path: &std::path::Path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let config = loaded.model.config();
    let select = &config.gd.select;
    let mechanism = match &args.attention {
        None => "unchanged".to_owned(),
        Some(mechanism @ (Mechanism::Softmax | Mechanism::SoftmaxNull | Mechanism::Other(_))) => {
            format!("{} in layers {changed:?}", mechanism.name())
        }
        Some(Mechanism::Gd) => format!(
            "softmax over the {} keys of least energy in layers {changed:?}; score {:?}",
            select.candidates, select.score
        ),
    };
    vec![
        ("name", file_name(&args.out)),
        (
            "summary",
            match &args.adapter {
                Some(adapter) => {
                    format!("{} with the adapter {}.", file_name(&args.model), file_name(adapter))
                }
                None => format!(
                    "{} with its attention replaced, without further training.",
                    file_name(&args.model)
                ),
            },
        ),
        ("parameters", loaded.params.count().to_string()),
        ("mechanism", mechanism),
        ("tokenizer", format!("{} tokens", loaded.tokenizer.vocab_size())),
        ("context", config.max_position_embeddings.to_string()),
        ("data", "that of the source model".into()),
        ("steps", "none".into()),
        ("loss", "not measured".into()),
    ]
}
