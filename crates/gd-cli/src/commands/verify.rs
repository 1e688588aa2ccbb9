//! `gd verify`: checks that a trace is intact, and that a model makes the recorded selections.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use gd_model::model::pretrained;
use gd_model::trace::{self, Hash, Header, Outcome, Proof, Proven, Signed, Trace, hex};
use serde_json::{Value, json};

use crate::context::{Context, incomplete, usage};

/// Verify a trace: its hashes, its signature, every selection, and optionally by a replay with the model
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Without a model the command checks the file, the order of the records, the hash chain, the Merkle root \
                  and the head, the signature, that each selected position is the least-energy candidate that the \
                  threshold admits, with the recorded margin, and that the text can end as it does. With --model the text \
                  is processed again, and texts, tokens and the end are compared, too. On the backend of the record all \
                  bits must be equal. On another backend energies may differ by the tolerance, selections that differ \
                  within it are counted as ambiguous, and the drawn tokens cannot be checked. What was not checked is \
                  printed, and the exit code is then 3. The hash chain does not prevent its author from writing a new \
                  trace: compare the head with a stored one (--kept), or require a signature (--signer).\n\n\
                  --prove prints the proof that the trace contains one record. `gd verify` checks such a file without \
                  the trace.\n\n\
                  Examples:\n  gd verify call.trace --model out/tiny\n  gd verify call.trace --prove 12 > record12.json\n  \
                  gd verify record12.json"
)]
pub struct Args {
    /// Trace to verify, or a proof by --prove
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
    /// Print the proof that the trace contains the record of this position
    #[arg(long, value_name = "N", conflicts_with = "model")]
    pub prove: Option<u64>,
}

fn parse_hash(text: &str) -> Result<Hash, String> {
    let hash = blake3::Hash::from_hex(text).map_err(|_| format!("`{text}` is not 64 hexadecimal digits"))?;
    Ok(*hash.as_bytes())
}

/// Runs the command.
///
/// # Errors
/// Names the first check that fails, or what could not be checked.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if !(args.tolerance >= 0.0 && args.tolerance.is_finite()) {
        return Err(usage(format!("--tolerance {} is not finite and at least 0", args.tolerance)));
    }
    if is_proof(&args.trace) {
        return check_proof(&args, ctx);
    }
    let trace = Trace::read(&args.trace)?;
    let verified = trace::verify(&trace, args.expected_head, args.signer)?;
    if let Some(position) = args.prove {
        return ctx.print(serde_json::to_string(
            &Proof::new(&trace, position).map_err(crate::context::flag_error)?,
        )?);
    }
    let replay = match &args.model {
        Some(model) => {
            let loaded = pretrained::load(model, &ctx.device)?;
            let (header, records) = (&trace.header, trace.decoded()?);
            Some(trace::replay(header, &records, trace.ending, &loaded, args.tolerance, &ctx.device)?)
        }
        None => None,
    };
    let unchecked = unchecked(&trace, replay.as_ref());
    if ctx.json {
        print_json(ctx, &trace, &verified, &unchecked, replay.as_ref())?;
    } else {
        print_text(ctx, &trace, &verified, &unchecked, replay.as_ref())?;
    }
    let path = args.trace.display();
    match replay {
        Some(Outcome { contradictions, first_contradiction: Some(first), .. }) => {
            bail!("{path}: the replay contradicts the record {contradictions} times: {first}")
        }
        Some(outcome) if !outcome.unchecked.is_empty() => {
            Err(incomplete(format!("{path}: not everything was checked: {}", outcome.unchecked.join("; "))))
        }
        _ => Ok(()),
    }
}

/// What was not checked.
fn unchecked(trace: &Trace, replay: Option<&Outcome>) -> Vec<String> {
    let mut unchecked = match replay {
        Some(outcome) => outcome.unchecked.clone(),
        None => vec![
            "that the model makes these selections, that it draws these tokens, and that the texts are those of the \
             tokens (--model)"
                .to_owned(),
        ],
    };
    if trace.signed.as_ref().is_some_and(|signed| signed.statement.is_none()) {
        unchecked.push("time and version: the signature, of version 1, covers the head alone".into());
    }
    unchecked
}

fn print_json(
    ctx: &Context,
    trace: &Trace,
    verified: &trace::Verified,
    unchecked: &[String],
    replay: Option<&Outcome>,
) -> Result<()> {
    ctx.print(json!({
        "interventions": trace.header.interventions,
        "head": hex(&verified.seal.head),
        "root": hex(&verified.seal.root),
        "records": verified.seal.count,
        "selections": verified.selections,
        "abstained": verified.abstained,
        "ending": trace.ending,
        "signer": trace.signed.as_ref().map(|signed| hex(&signed.key)),
        "signature": trace.signed.as_ref().map(signature_json),
        "not_checked": unchecked,
        "replay": replay,
    }))
}

fn signature_json(signed: &Signed) -> Value {
    json!({
        "key": hex(&signed.key),
        "key_id": hex(&signed.key_id()),
        "seconds": signed.statement.as_ref().map(|s| s.seconds),
        "version": signed.statement.as_ref().map(|s| &s.version),
    })
}

fn print_text(
    ctx: &Context,
    trace: &Trace,
    verified: &trace::Verified,
    unchecked: &[String],
    replay: Option<&Outcome>,
) -> Result<()> {
    print_interventions(ctx, &trace.header)?;
    ctx.print(format_args!(
        "{} positions, {} selections, {} abstained: each selection has the least energy of its candidates",
        verified.seal.count, verified.selections, verified.abstained
    ))?;
    if let Some(ending) = trace.ending {
        ctx.print(format_args!("ends with {ending}"))?;
    }
    ctx.print(format_args!("head {}\n{}", hex(&verified.seal.head), signature_text(trace.signed.as_ref())))?;
    if let Some(outcome) = replay {
        ctx.print(replay_text(outcome))?;
    }
    unchecked.iter().try_for_each(|text| ctx.print(format_args!("not checked: {text}")))
}

/// Prints that the selections are not the model's own, if they are not.
fn print_interventions(ctx: &Context, header: &Header) -> Result<()> {
    if header.interventions.is_empty() {
        return Ok(());
    }
    let all: Vec<_> = header.interventions.iter().map(ToString::to_string).collect();
    ctx.print(format_args!(
        "{} interventions: the model did not select and write freely: {}",
        all.len(),
        all.join(", ")
    ))
}

fn signature_text(signed: Option<&Signed>) -> String {
    let Some(signed) = signed else { return "not signed".into() };
    let mut text = format!("signed by {} (identifier {})", hex(&signed.key), hex(&signed.key_id()));
    if let Some(statement) = &signed.statement {
        text += &format!(
            ", {} seconds after the start of 1970 by the signer's clock, by gd {}",
            statement.seconds, statement.version
        );
    }
    text
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

/// Whether a file is JSON, as a proof is.
fn is_proof(path: &Path) -> bool {
    let mut start = [0];
    let is_file = path.metadata().is_ok_and(|m| m.is_file());
    is_file
        && std::fs::File::open(path)
            .is_ok_and(|mut file| std::io::Read::read_exact(&mut file, &mut start).is_ok())
        && start == *b"{"
}

/// Checks the proof that a trace contains a record.
fn check_proof(args: &Args, ctx: &Context) -> Result<()> {
    if args.model.is_some() || args.prove.is_some() {
        return Err(usage("a proof of one record is checked without --model and --prove"));
    }
    let proof = Proof::read(&args.trace)?;
    let Proven { header, record, count, ending, head, signed } = proof
        .check(args.expected_head, args.signer)
        .map_err(|reason| anyhow::anyhow!("{}: the proof is not valid: {reason}", args.trace.display()))?;
    let unchecked = "the other records, and that the model makes these selections and draws this token";
    if ctx.json {
        return ctx.print(json!({
            "interventions": header.interventions,
            "head": hex(&head),
            "records": count,
            "position": record.position,
            "token": record.token,
            "text": record.text,
            "generated": record.generated,
            "ending": ending,
            "signer": signed.as_ref().map(|signed| hex(&signed.key)),
            "signature": signed.as_ref().map(signature_json),
            "not_checked": [unchecked],
        }));
    }
    print_interventions(ctx, &header)?;
    ctx.print(format_args!(
        "the trace of this head contains record {} of {count}: token {}, text {:?}, {}\nhead {}\n{}\nnot checked: {unchecked}",
        record.position,
        record.token,
        record.text,
        if record.generated { "generated" } else { "read" },
        hex(&head),
        signature_text(signed.as_ref())
    ))
}
