//! The result of `gd trace`, as JSON or as text.

use anyhow::Result;
use comfy_table::Table;
use gd_model::trace::{Effect, Seal, hex};
use serde_json::{Value, json};

use crate::context::Context;
use crate::render::table::{TERMINAL, plain_table};

/// The summary of a recorded trace.
pub(super) struct Summary {
    pub(super) seal: Seal,
    /// Prompt and continuation.
    pub(super) text: String,
    /// Number of (position, layer, head) triples.
    pub(super) selections: u64,
    /// Number of selections in which the head abstained.
    pub(super) abstained: u64,
}

/// Prints the effect of interventions and the summary of a trace. The text of the trace is printed if `show_text`.
pub(super) fn print(
    ctx: &Context,
    effect: Option<&Effect>,
    summary: Option<&Summary>,
    show_text: bool,
) -> Result<()> {
    if ctx.json {
        return print_json(ctx, effect, summary);
    }
    if let Some(effect) = effect {
        print_effect(ctx, effect)?;
    }
    if let Some(Summary { seal, text, selections, abstained }) = summary {
        if show_text {
            ctx.print(text)?;
        }
        ctx.print(format_args!(
            "{} positions, {selections} selections, {abstained} abstained\nhead {}",
            seal.count,
            hex(&seal.head)
        ))?;
    }
    Ok(())
}

fn print_json(ctx: &Context, effect: Option<&Effect>, summary: Option<&Summary>) -> Result<()> {
    let mut out = json!({ "effect": effect });
    if let Some(Summary { seal, text, selections, abstained }) = summary {
        out["text"] = Value::from(text.as_str());
        out["head"] = Value::from(hex(&seal.head));
        out["root"] = Value::from(hex(&seal.root));
        out["records"] = Value::from(seal.count);
        out["selections"] = Value::from(*selections);
        out["abstained"] = Value::from(*abstained);
    }
    ctx.print(out)
}

fn print_effect(ctx: &Context, effect: &Effect) -> Result<()> {
    for pick in &effect.picks {
        let key_name = |key: i32| if key < 0 { "nothing".to_owned() } else { key.to_string() };
        ctx.print(format_args!(
            "layer {} head {} at {}: reads {} instead of {}",
            pick.layer,
            pick.head,
            pick.query,
            key_name(pick.after),
            key_name(pick.before)
        ))?;
    }
    ctx.print(format_args!(
        "next token: KL {:.6} nats, total variation {:.6}; mean KL from position {} on {:.6} nats; {} of {} other \
         selections differ",
        effect.kl, effect.total_variation, effect.first, effect.mean_kl, effect.others, effect.selections
    ))?;
    ctx.print(token_table(effect))
}

/// The probabilities of the next token before and after the interventions.
fn token_table(effect: &Effect) -> Table {
    let mut table = plain_table(TERMINAL, &["next token", "before", "after"]);
    for change in &effect.tokens {
        let percent = |p: f64| format!("{:.2} %", 100.0 * p);
        table.add_row(vec![format!("{:?}", change.text), percent(change.before), percent(change.after)]);
    }
    table
}
