//! The result of `gd trace`, as JSON or as text.

use anyhow::Result;
use comfy_table::Table;
use gd_model::trace::{Effect, Seal, Sweep, hex};
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

/// Prints one JSON object with the effects and the summary of a trace.
pub(super) fn print_json(
    ctx: &Context,
    effect: Option<&Effect>,
    sweep: Option<&Sweep>,
    summary: Option<&Summary>,
) -> Result<()> {
    let mut out =
        json!({ "effect": effect, "sweep": sweep, "changed": effect.map(|effect| !effect.is_none()) });
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

/// The position of a key, or that there is none.
pub(super) fn key_name(key: i32) -> String {
    if key < 0 { "nothing".to_owned() } else { key.to_string() }
}

fn print_effect(ctx: &Context, effect: &Effect) -> Result<()> {
    for pick in &effect.picks {
        let place = format!("layer {} head {} at {}", pick.layer, pick.head, pick.query);
        let (before, after) = (key_name(pick.before), key_name(pick.after));
        match pick.before == pick.after {
            true => ctx.print(format_args!("{place}: reads {after} as before"))?,
            false => ctx.print(format_args!("{place}: reads {after} instead of {before}"))?,
        }
    }
    if effect.is_none() {
        return ctx.print(format_args!(
            "nothing changed: the next token has the same distribution, and all {} selections are the same",
            effect.selections
        ));
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
