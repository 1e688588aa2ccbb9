//! `gd compare --memory`: the peak memory of one training step. Each step runs in a separate process because the peak
//! of a process never decreases.

use anyhow::{Context as _, Result};
use gd_model::analysis::variants::Variant;
use gd_model::config::Recipe;
use gd_model::train::Trainer;
use gd_model::train::memory::Peak;
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::render::table::{TERMINAL, plain_table};
use crate::subprocess::json_of_process;
use crate::terminal::note;
use crate::training::placeholder_corpus;

/// One measurement.
#[derive(Debug, Serialize, Deserialize)]
struct Cell {
    mechanism: String,
    /// Number of tokens of the sequence.
    context: usize,
    /// `None` if the system does not report it.
    mib: Option<f64>,
}

/// The output of `--json`.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    memory: Vec<Cell>,
}

/// Measures every mechanism at every context length. A single pair is measured in this process; the processes for
/// several pairs are called with one each.
pub(super) fn run(configs: &[String], variants: &[Variant], contexts: &[u32], ctx: &Context) -> Result<()> {
    let base = Recipe::merged(configs, &[])?;
    for v in variants {
        v.config(&base.model)?;
    }
    let mut memory = Vec::new();
    match (variants, contexts) {
        ([variant], [context]) => memory.push(measure(&base, variant, *context as usize, ctx)?),
        _ => {
            for (v, context) in variants.iter().flat_map(|v| contexts.iter().map(move |c| (v, c))) {
                note(format_args!("{} at {context} tokens", v.name));
                memory.extend(in_subprocess(configs, v, *context, ctx)?);
            }
        }
    }
    if ctx.json {
        return ctx.print(serde_json::to_string(&Report { memory })?);
    }
    let lengths: Vec<String> = contexts.iter().map(u32::to_string).collect();
    let header: Vec<&str> = std::iter::once("MiB").chain(lengths.iter().map(String::as_str)).collect();
    let mut table = plain_table(TERMINAL, &header);
    for (v, row) in variants.iter().zip(memory.chunks(contexts.len())) {
        let cells = row.iter().map(|c| c.mib.map_or(String::new(), |m| format!("{m:.1}")));
        table.add_row(std::iter::once(v.name.to_owned()).chain(cells));
    }
    ctx.print(table)
}

/// One measurement in a separate process.
fn in_subprocess(configs: &[String], variant: &Variant, context: u32, ctx: &Context) -> Result<Vec<Cell>> {
    let tokens = context.to_string();
    let mut args = vec!["compare", "--json", "--mechanisms", variant.name, "--memory", &tokens];
    args.extend(configs.iter().flat_map(|config| ["--config", config.as_str()]));
    let report: Report = json_of_process(&args, &ctx.device, ctx.seed())
        .with_context(|| format!("{} at {context} tokens", variant.name))?;
    Ok(report.memory)
}

/// One training step on one sequence, in this process.
fn measure(base: &Recipe, variant: &Variant, context: usize, ctx: &Context) -> Result<Cell> {
    let mut recipe = Recipe { model: variant.config(&base.model)?, train: base.train.clone() };
    recipe.model.max_position_embeddings = recipe.model.max_position_embeddings.max(context);
    let train = &mut recipe.train;
    (train.batch, train.accumulation, train.context) = (1, 1, context);
    // No evaluation follows the step: it is not the last one, and it is not a multiple of `eval_every`.
    (train.steps, train.eval_every) = (train.steps.max(2), u64::MAX);
    let corpus = placeholder_corpus(recipe.model.vocab_size, context + 1);
    let mut trainer = Trainer::new(recipe, corpus, ctx.seed(), &ctx.device)?;
    let peak = Peak::start();
    trainer.train_step()?;
    Ok(Cell { mechanism: variant.name.to_owned(), context, mib: peak.and_then(Peak::above_start) })
}
