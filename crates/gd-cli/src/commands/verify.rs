//! `gd verify`: whether a trace is whole, and whether the model does what it says.

use std::path::PathBuf;

use anyhow::{Result, bail};
use gd_model::model::pretrained;
use gd_model::trace::{self, Hash, Outcome, Trace, hex};
use serde_json::json;

use super::{Context, usage};

/// Check a trace: its hashes, its signature, every selection, and by a replay with the model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without a model: the file, the order of its records, their chain, Merkle root and head, the \
                  signature, and that each winner is the least-energy candidate that the threshold admits, by the \
                  stated margin. With --model the text is read again: on the backend of the record all bits must be \
                  equal, on another one energies may differ by the tolerance, and selections that fall the other \
                  way within it are counted as ambiguous. The chain alone does not stop its owner from writing a \
                  whole new trace: compare the head with one that was kept (--kept), or ask for a signature \
                  (--signer).\n\n\
                  Example:\n  gd verify call.trace --model out/tiny --kept 5f0c..."
)]
pub struct Args {
    /// The trace
    #[arg(value_name = "T")]
    pub trace: PathBuf,
    /// The model to run it again with
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
    /// The head that was kept, 64 hexadecimal digits
    #[arg(long, value_name = "HEAD", value_parser = hash)]
    pub kept: Option<Hash>,
    /// The Ed25519 public key that is to have signed, 64 hexadecimal digits
    #[arg(long, value_name = "KEY", value_parser = hash)]
    pub signer: Option<Hash>,
    /// How far energies may differ on another backend, in units of the energy or of 1
    #[arg(long, value_name = "X", default_value_t = 1e-3, allow_negative_numbers = true)]
    pub tolerance: f32,
}

fn hash(text: &str) -> Result<Hash, String> {
    let hash = blake3::Hash::from_hex(text).map_err(|_| format!("`{text}` is not 64 hexadecimal digits"))?;
    Ok(*hash.as_bytes())
}

/// Runs the command.
///
/// # Errors
/// The first thing that does not hold.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        return Err(usage(format!("--tolerance {} is not finite and at least 0", args.tolerance)));
    }
    let read = Trace::read(&args.trace)?;
    let verified = trace::verify(&read, args.kept, args.signer)?;
    let replay = match &args.model {
        Some(model) => {
            let loaded = pretrained::load(model, &ctx.device)?;
            Some(trace::replay(&read.header, &verified.records, &loaded, args.tolerance, &ctx.device)?)
        }
        None => None,
    };
    let rows = verified.records.iter().flat_map(|record| &record.rows);
    let (selections, abstained) =
        rows.fold((0u64, 0u64), |(all, none), row| (all + 1, none + u64::from(row.selected < 0)));
    let signer = read.signed.map(|signed| hex(&signed.key));
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
            "{} positions, {selections} selections, {abstained} abstained: each is the least of its candidates\n\
             head {}\n{}",
            verified.seal.count,
            hex(&verified.seal.head),
            signer.map_or("not signed".into(), |key| format!("signed by {key}"))
        ))?;
        if let Some(outcome) = &replay {
            ctx.print(told(outcome))?;
        }
    }
    match replay {
        Some(outcome) if outcome.contradictions > 0 => {
            let first =
                outcome.findings.iter().find(|f| !f.starts_with("ambiguous")).cloned().unwrap_or_default();
            let times = outcome.contradictions;
            bail!("{}: the replay contradicts the record {times} times: {first}", args.trace.display())
        }
        _ => Ok(()),
    }
}

fn told(outcome: &Outcome) -> String {
    let how = if outcome.exact { "to the bit" } else { "within the tolerance" };
    let agreed = outcome.selections - outcome.ambiguous.min(outcome.selections);
    let mut text = format!(
        "replay ({how}): {agreed} of {} selections agree, {} ambiguous, {} contradictions",
        outcome.selections, outcome.ambiguous, outcome.contradictions
    );
    for finding in &outcome.findings {
        text += &format!("\n  {finding}");
    }
    text
}
