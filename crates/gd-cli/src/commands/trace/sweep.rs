//! The result of `gd trace --sweep`: a table of the heads with the greatest effects, and a heat map of all of them.

use anyhow::Result;
use comfy_table::Table;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::trace::{HeadEffect, Sweep, SweepAct};

use super::output::key_name;
use crate::context::Context;
use crate::render::plot::Grid;
use crate::render::table::{TERMINAL, plain_table};

/// The table lists this many heads.
const MAX_ROWS: usize = 20;

/// Prints the effects, the greatest first. `prompt` are the tokens that the heads read.
pub(super) fn print(ctx: &Context, sweep: &Sweep, prompt: &[u32], tokenizer: &Tokenizer) -> Result<()> {
    let act = match sweep.act {
        SweepAct::Ban => "each head cannot read what it reads",
        SweepAct::Ablate => "each head abstains",
    };
    ctx.print(format_args!(
        "{act} at position {}, one at a time; the most probable next token is {:?} ({:.2} %)",
        sweep.query,
        sweep.likeliest,
        100.0 * sweep.probability
    ))?;
    let mut heads: Vec<&HeadEffect> = sweep.heads.iter().collect();
    heads.sort_by(|a, b| b.kl.total_cmp(&a.kl));
    ctx.print(table(&heads[..heads.len().min(MAX_ROWS)], sweep, prompt, tokenizer)?)?;
    match heads.len().saturating_sub(MAX_ROWS) {
        0 => Ok(()),
        more => ctx.print(format_args!(
            "{more} more heads with smaller effects (--json lists all, --plot shows them)"
        )),
    }
}

fn table(heads: &[&HeadEffect], sweep: &Sweep, prompt: &[u32], tokenizer: &Tokenizer) -> Result<Table> {
    let likeliest = format!("{:?}", sweep.likeliest);
    let header = ["head", "reads", "instead", "KL in nats", "total variation", &likeliest, "new first token"];
    let mut table = plain_table(TERMINAL, &header);
    let key = |key: i32| -> Result<String> {
        let token = usize::try_from(key).ok().and_then(|key| prompt.get(key));
        let text = token.map(|token| tokenizer.decode(&[*token])).transpose()?;
        Ok(text.map_or(key_name(key), |text| format!("{key} {text:?}")))
    };
    for head in heads {
        table.add_row(vec![
            format!("{}.{}", head.layer, head.head),
            key(head.before)?,
            if head.before == head.after { "the same".into() } else { key(head.after)? },
            format!("{:.6}", head.kl),
            format!("{:.6}", head.total_variation),
            format!("{:.2} %", 100.0 * head.probability),
            head.likeliest.as_ref().map_or(String::new(), |text| format!("{text:?}")),
        ]);
    }
    Ok(table)
}

/// The divergence of every head as a heat map.
pub(super) fn grid(sweep: &Sweep) -> Grid {
    let mut rows: Vec<(String, Vec<f64>)> = Vec::new();
    for layer in sweep.heads.chunk_by(|a, b| a.layer == b.layer) {
        rows.push((layer[0].layer.to_string(), layer.iter().map(|head| head.kl).collect()));
    }
    let act = match sweep.act {
        SweepAct::Ban => "cannot read what it reads",
        SweepAct::Ablate => "abstains",
    };
    Grid {
        title: format!("Change of the next token if a head {act} at position {}", sweep.query),
        x: "head".into(),
        y: "layer".into(),
        value: "KL in nats".into(),
        rows,
    }
}
