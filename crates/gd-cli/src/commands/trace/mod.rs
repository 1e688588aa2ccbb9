//! `gd trace`: records which position every head reads, and measures the effect of selections.

mod args;
mod output;
mod sweep;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use gd_model::infer::sampler::Sampling;
use gd_model::io::files::{check_writable, read_text, stream_file, write_file};
use gd_model::model::pretrained::{self, Loaded};
use gd_model::trace::{self, Generation, Header, Record, Trace, Writer};
use serde_json::json;

pub use args::Args;

use self::output::Summary;
use crate::context::{Context, flag_error, usage};
use crate::render::plot;
use crate::render::viewer;

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid; no file is written then.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let Some(model) = &args.model else { return show_recorded(&args, ctx) };
    let interventions = args.interventions()?;
    let records = args.out.is_some() || args.html.is_some() || args.export.is_some();
    if !records && interventions.is_empty() && args.sweep.is_none() {
        return Err(usage(
            "gd trace needs --out, --html, --export, an intervention (--force, --ban or --ablate), or --sweep",
        ));
    }
    let key = args.key.as_deref().map(signing_key).transpose()?;
    for file in [&args.out, &args.html, &args.export, &args.plot].into_iter().flatten() {
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
    let make = if args.blend { Header::with_blends } else { Header::new };
    let header = make(&loaded, &name, &prompt, generation.as_ref(), &interventions, &ctx.device)
        .map_err(|e| with_remedy(e, model))?;
    let sweep = match args.sweep {
        None => None,
        Some(act) => Some(trace::sweep(&loaded, &header, &prompt, act.into(), &ctx.device)?),
    };
    if let Some((plot, sweep)) = args.plot.as_ref().zip(sweep.as_ref()) {
        plot::save(plot, &sweep::grid(sweep))?;
    }
    let effect = match interventions.is_empty() {
        true => None,
        false => Some(trace::effect(&loaded, &header, &prompt, &ctx.device)?),
    };
    let mut summary = None;
    if records {
        summary = Some(record(&args, &loaded, &header, &prompt, key.as_ref(), ctx)?);
    }
    if ctx.json {
        return output::print_json(ctx, effect.as_ref(), sweep.as_ref(), summary.as_ref());
    }
    if let Some(sweep) = &sweep {
        sweep::print(ctx, sweep, &prompt, &loaded.tokenizer)?;
    }
    output::print(ctx, effect.as_ref(), summary.as_ref(), args.max_tokens > 0)
}

/// An error of a model, and what can be done if none of its layers selects.
fn with_remedy(error: gd_model::Error, model: &Path) -> anyhow::Error {
    let model = model.display();
    match error {
        gd_model::Error::NothingSelects { .. } => anyhow::anyhow!(
            "{model}: {error}. `gd trace {model} --blend` records the greatest weights of softmax heads; \
             `gd convert {model} --attention gd --k 1 --out DIR` makes a model that selects"
        ),
        error => anyhow::Error::new(error).context(model.to_string()),
    }
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
            // The page names its trace by the file.
            temporary = tempfile::tempdir()?;
            let name = args.html.as_deref().and_then(Path::file_stem).unwrap_or("trace".as_ref());
            &temporary.path().join(name).with_extension("trace")
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
    if let Some(file) = &args.export {
        export(file, path)?;
    }
    Ok(Summary { seal, text, selections, abstained })
}

/// The time by the clock of this machine.
fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Writes the page of the traces of `--from`, or one of them for other programs.
fn show_recorded(args: &Args, ctx: &Context) -> Result<()> {
    if args.html.is_none() && args.export.is_none() {
        return Err(usage("--from needs --html or --export"));
    }
    if args.from.len() > 2 {
        return Err(usage(format!(
            "--from is given {} times; a page shows one trace or two",
            args.from.len()
        )));
    }
    if let Some(html) = &args.html {
        write_page(html, &args.from)?;
    }
    match (&args.export, args.from.as_slice()) {
        (Some(file), [path]) => export(file, path)?,
        (Some(_), paths) => {
            return Err(usage(format!("--export takes one trace; --from is given {} times", paths.len())));
        }
        (None, _) => {}
    }
    if ctx.json {
        return ctx.print(json!({ "html": args.html, "export": args.export }));
    }
    [&args.html, &args.export].into_iter().flatten().try_for_each(|file| ctx.print(file.display()))
}

/// Verifies a trace and writes it as its name says: arrays in an archive of NumPy, or lines of JSON.
fn export(file: &Path, path: &Path) -> Result<()> {
    let trace = Trace::read(path)?;
    trace::verify(&trace, None, None)?;
    if file.extension().is_some_and(|e| e == "npz") {
        return Ok(write_file(file, &trace::export::npz(&trace)?)?);
    }
    Ok(stream_file(file, |out| trace::export::json_lines(&trace, out))?)
}

/// Verifies recorded traces and writes a page that shows them.
fn write_page(html: &Path, paths: &[PathBuf]) -> Result<()> {
    let traces = paths.iter().map(|path| Trace::read(path)).collect::<gd_model::Result<Vec<_>>>()?;
    write_file(html, viewer::page_of(&traces)?.as_bytes())?;
    Ok(())
}

fn signing_key(path: &Path) -> Result<SigningKey> {
    let text = read_text(path)?;
    SigningKey::from_pkcs8_pem(&text)
        .map_err(|e| anyhow::anyhow!("{}: not an Ed25519 key in PKCS#8 PEM: {e}", path.display()))
}
