//! `gd verify`: checks that a trace is intact, and that a model makes the recorded selections.

use std::path::PathBuf;

use anyhow::{Result, bail};
use gd_model::model::pretrained;
use gd_model::trace::{self, Hash, Outcome, Trace, hex};
use serde_json::json;

use crate::context::{Context, usage};

/// Verify a trace: its hashes, its signature, every selection, and optionally by a replay with the model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without a model the command checks the file, the order of the records, the hash chain, the Merkle root \
                  and the head, the signature, and that each selected position is the least-energy candidate that the \
                  threshold admits, with the recorded margin. With --model the text is processed again. On the backend \
                  of the record all bits must be equal. On another backend energies may differ by the tolerance, and \
                  selections that differ within it are counted as ambiguous. The hash chain does not prevent its author \
                  from writing a new trace: compare the head with a stored one (--kept), or require a signature \
                  (--signer).\n\n\
                  Example:\n  gd verify call.trace --model out/tiny"
)]
pub struct Args {
    /// Trace to verify
    #[arg(value_name = "T")]
    pub trace: PathBuf,
    /// Model for a replay
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// Expected head, 64 hexadecimal digits
    #[arg(id = "kept", long = "kept", value_name = "HEAD", value_parser = parse_hash)]
    pub expected_head: Option<Hash>,
    /// Ed25519 public key of the required signature, 64 hexadecimal digits
    #[arg(long, value_name = "KEY", value_parser = parse_hash)]
    pub signer: Option<Hash>,
    /// Maximum difference of energies on another backend, relative to the larger of the energy and 1
    #[arg(long, value_name = "X", default_value_t = 1e-3, allow_negative_numbers = true)]
    pub tolerance: f32,
}

fn parse_hash(text: &str) -> Result<Hash, String> {
    let hash = blake3::Hash::from_hex(text).map_err(|_| format!("`{text}` is not 64 hexadecimal digits"))?;
    Ok(*hash.as_bytes())
}

/// Runs the command.
///
/// # Errors
/// Names the first check that fails.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        return Err(usage(format!("--tolerance {} is not finite and at least 0", args.tolerance)));
    }
    let trace = Trace::read(&args.trace)?;
    let verified = trace::verify(&trace, args.expected_head, args.signer)?;
    let replay = match &args.model {
        Some(model) => {
            let loaded = pretrained::load(model, &ctx.device)?;
            Some(trace::replay(&trace.header, &verified.records, &loaded, args.tolerance, &ctx.device)?)
        }
        None => None,
    };
    let rows = verified.records.iter().flat_map(|record| &record.rows);
    let (selections, abstained) =
        rows.fold((0u64, 0u64), |(all, none), row| (all + 1, none + u64::from(row.selected < 0)));
    let signer = trace.signed.map(|signed| hex(&signed.key));
    if ctx.json {
        ctx.print(json!({
            "head": hex(&verified.seal.head),
            "root": hex(&verified.seal.root),
            "records": verified.seal.count,
            "selections": selections,
            "abstained": abstained,
            "signer": signer,
            "replay": replay,
        }))?;
    } else {
        ctx.print(format_args!(
            "{} positions, {selections} selections, {abstained} abstained: each selection has the least energy of its \
             candidates\nhead {}\n{}",
            verified.seal.count,
            hex(&verified.seal.head),
            signer.map_or("not signed".into(), |key| format!("signed by {key}"))
        ))?;
        if let Some(outcome) = &replay {
            ctx.print(replay_text(outcome))?;
        }
    }
    match replay.and_then(|outcome| outcome.first_contradiction.map(|first| (outcome.contradictions, first)))
    {
        Some((count, first)) => {
            bail!("{}: the replay contradicts the record {count} times: {first}", args.trace.display())
        }
        None => Ok(()),
    }
}

/// Describes the result of a replay.
fn replay_text(outcome: &Outcome) -> String {
    let comparison = if outcome.exact { "bit-exact" } else { "within the tolerance" };
    let equal = outcome.selections - outcome.ambiguous.min(outcome.selections);
    let mut text = format!(
        "replay ({comparison}): {equal} of {} selections agree, {} ambiguous, {} contradictions",
        outcome.selections, outcome.ambiguous, outcome.contradictions
    );
    for finding in &outcome.findings {
        text += &format!("\n  {finding}");
    }
    text
}
