//! `gd trace`: records which position every head reads, and measures the effect of a selection.

mod args;
mod output;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use gd_model::infer::sampler::Sampling;
use gd_model::io::files::{check_writable, read_text, stream_file, write_file};
use gd_model::model::pretrained::{self, Loaded};
use gd_model::trace::{self, Generation, Header, Record, Trace, Writer, hex};
use serde_json::json;

pub use args::Args;

use self::output::Summary;
use crate::context::{Context, flag_error, usage};
use crate::render::viewer::{self, TraceView};

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid; no file is written then.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let Some(model) = &args.model else { return show_recorded(&args, ctx) };
    let interventions = args.interventions()?;
    if args.out.is_none() && args.html.is_none() && interventions.is_empty() {
        return Err(usage("gd trace needs --out, --html, or an intervention (--force, --ban or --ablate)"));
    }
    let key = args.key.as_deref().map(signing_key).transpose()?;
    for file in [&args.out, &args.html].into_iter().flatten() {
        check_writable(file.parent().unwrap_or(Path::new(".")))?;
    }
    let text = input_text(&args)?;
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    sampling.validate().map_err(flag_error)?;
    let loaded = pretrained::load(model, &ctx.device)?;
    let prompt = loaded.tokenizer.encode(&text)?;
    let interventions: Vec<_> = interventions.into_iter().map(|i| i.with_position(prompt.len())).collect();
    let generation = match args.max_tokens {
        0 => None,
        max_tokens => {
            Some(Generation { sampling, seed: ctx.seed(), max_tokens, end_tokens: loaded.end_tokens()? })
        }
    };
    let name = model.file_name().unwrap_or(model.as_os_str()).to_string_lossy();
    let header = Header::new(&loaded, &name, &prompt, generation.as_ref(), &interventions, &ctx.device)
        .with_context(|| model.display().to_string())?;
    let effect = match interventions.is_empty() {
        true => None,
        false => Some(trace::effect(&loaded, &header, &prompt, &ctx.device)?),
    };
    let mut summary = None;
    if args.out.is_some() || args.html.is_some() {
        summary = Some(record(&args, &loaded, &header, &prompt, key.as_ref(), ctx)?);
    }
    output::print(ctx, effect.as_ref(), summary.as_ref(), args.max_tokens > 0)
}

fn input_text(args: &Args) -> Result<String> {
    match (&args.prompt, &args.file) {
        (Some(prompt), _) => Ok(prompt.clone()),
        (None, Some(file)) => Ok(read_text(file)?),
        (None, None) => Err(usage("gd trace needs --prompt or --file")),
    }
}

/// Records a trace in the file of `--out`, or in a temporary file, and writes the page of `--html`.
fn record(
    args: &Args,
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    key: Option<&SigningKey>,
    ctx: &Context,
) -> Result<Summary> {
    let temporary;
    let path = match &args.out {
        Some(path) => path,
        None => {
            temporary = tempfile::NamedTempFile::new()?.into_temp_path();
            &temporary.to_path_buf()
        }
    };
    let (mut text, mut selections, mut abstained) = (String::new(), 0, 0);
    let seal = stream_file(path, |out| {
        let mut writer = Writer::new(path, out, header)?;
        let (_, ending) = trace::record(loaded, header, prompt, &ctx.device, |record: Record| {
            text.push_str(&record.text);
            selections += record.rows.len() as u64;
            abstained += record.rows.iter().filter(|row| row.selected < 0).count() as u64;
            writer.push(&record)
        })?;
        match key {
            Some(key) => writer.finish_signed(ending, key, seconds_since_1970()),
            None => writer.finish(ending),
        }
    })?;
    if let Some(html) = &args.html {
        write_page(html, std::slice::from_ref(path))?;
    }
    Ok(Summary { seal, text, selections, abstained })
}

/// The time by the clock of this machine.
fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Writes the page of the traces of `--from`.
fn show_recorded(args: &Args, ctx: &Context) -> Result<()> {
    let Some(html) = &args.html else { return Err(usage("--from needs --html")) };
    if args.from.len() > 2 {
        return Err(usage(format!(
            "--from is given {} times; a page shows one trace or two",
            args.from.len()
        )));
    }
    write_page(html, &args.from)?;
    if ctx.json { ctx.print(json!({ "html": html })) } else { ctx.print(html.display()) }
}

/// Verifies recorded traces and writes a page that shows them.
fn write_page(html: &Path, paths: &[PathBuf]) -> Result<()> {
    let traces = paths.iter().map(|path| Trace::read(path)).collect::<gd_model::Result<Vec<_>>>()?;
    let mut parts = Vec::new();
    for trace in &traces {
        let verified = trace::verify(trace, None, None)?;
        let name = trace.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        parts.push((
            name,
            serde_json::to_value(&trace.header)?,
            hex(&verified.seal.head),
            trace.record_bytes()?,
        ));
    }
    let views: Vec<TraceView> =
        parts.iter().map(|(name, header, head, records)| TraceView { name, header, head, records }).collect();
    write_file(html, viewer::page(&views)?.as_bytes())?;
    Ok(())
}

fn signing_key(path: &Path) -> Result<SigningKey> {
    let text = read_text(path)?;
    SigningKey::from_pkcs8_pem(&text)
        .map_err(|e| anyhow::anyhow!("{}: not an Ed25519 key in PKCS#8 PEM: {e}", path.display()))
}
