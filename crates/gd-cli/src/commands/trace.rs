//! `gd trace`: which position every head read, recorded and shown, and what a pick causes.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::DecodePrivateKey;
use gd_model::data::read_text;
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::io::checkpoint::{check_writable, stream_file, write_file};
use gd_model::model::pretrained::{self, Loaded};
use gd_model::trace::{self, Continuation, Effect, Header, Intervention, Record, Seal, Trace, Writer, hex};
use serde_json::{Value, json};

use super::{Context, usage};
use crate::table::plain_table;
use crate::viewer::{self, Shown};

/// Record which position every selecting head reads, show it, and test what it causes
#[derive(Debug, clap::Args)]
#[command(
    after_help = "T gets, for every token, selecting layer and head: the position read (or none), its energy, the \
                  margin to the runner-up, coherence point, gate, the candidates preserved, protected, lifted and \
                  rejected, and how much of the head's output is the selected value and how much the Beacon's \
                  running average: only the first has a single source. Records are chained by hashes; the head \
                  that is printed stands for all of them, and `gd verify` checks it. Sign it with a key of \
                  `openssl genpkey -algorithm ed25519`.\n\n\
                  A pick proves what a head read, not that it mattered. --force, --ban and --ablate change a pick \
                  and report how the next token's distribution changes: LAYER.HEAD@QUERY:POSITION, QUERY a position \
                  or `all` (left out: the last token of the prompt).\n\n\
                  Examples:\n  \
                  gd trace out/tiny --prompt \"Call me\" --max-tokens 100 --out call.trace --html call.html\n  \
                  gd trace out/tiny --prompt \"Call me Ishmael\" --ban 1.3:2 --ablate 0.5\n  \
                  gd trace --from call.trace --from other.trace --html both.html"
)]
pub struct Args {
    /// The model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL", required_unless_present = "from")]
    pub model: Option<PathBuf>,
    /// The text to read
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["file", "from"])]
    pub prompt: Option<String>,
    /// A file with the text to read
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub file: Option<PathBuf>,
    /// A recorded trace to show instead; two stand side by side
    #[arg(long, value_name = "T", conflicts_with_all = ["model", "out"], requires = "html", num_args = 1)]
    pub from: Vec<PathBuf>,
    /// The trace to write
    #[arg(long, value_name = "T")]
    pub out: Option<PathBuf>,
    /// The page to write: one file that any browser shows
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// The most tokens to add to the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token always
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Let the head read this position
    #[arg(long, value_name = "PLACE")]
    pub force: Vec<String>,
    /// Let the head choose as if this position were not there
    #[arg(long, value_name = "PLACE")]
    pub ban: Vec<String>,
    /// Let the head read nothing
    #[arg(long, value_name = "PLACE")]
    pub ablate: Vec<String>,
    /// An Ed25519 key (PKCS#8 PEM) that signs the trace
    #[arg(long, value_name = "FILE", requires = "out")]
    pub key: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used; then no file is written.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let Some(path) = &args.model else { return show(&args, ctx) };
    let interventions = interventions(&args)?;
    if args.out.is_none() && args.html.is_none() && interventions.is_empty() {
        return Err(usage("gd trace needs --out, --html, or something to --force, --ban or --ablate"));
    }
    let key = args.key.as_deref().map(signing_key).transpose()?;
    for file in [&args.out, &args.html].into_iter().flatten() {
        check_writable(file.parent().unwrap_or(Path::new(".")))?;
    }
    let text = match (&args.prompt, &args.file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => read_text(file)?,
        (None, None) => return Err(usage("gd trace needs --prompt or --file")),
    };
    let sampling = Sampling { temperature: args.temperature, ..Sampling::default() };
    let seed = ctx.seed.unwrap_or(0);
    let sampler = Sampler::new(sampling, seed).map_err(|e| usage(format!("--{e}")))?;
    let loaded = pretrained::load(path, &ctx.device)?;
    let prompt = loaded.tokenizer.encode(&text)?;
    let interventions: Vec<_> = interventions.into_iter().map(|i| i.placed(prompt.len())).collect();
    let draws = (args.max_tokens > 0).then_some((sampling, seed));
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
    let header = Header::new(&loaded, &name, &prompt, draws, &interventions, &ctx.device)
        .with_context(|| path.display().to_string())?;
    let effect = match interventions.is_empty() {
        true => None,
        false => Some(trace::effect(&loaded, &header, &prompt, &ctx.device)?),
    };
    let mut recorded = None;
    if args.out.is_some() || args.html.is_some() {
        let onward = match draws {
            Some(_) => Some(Continuation { max_tokens: args.max_tokens, sampler, ends: loaded.ends()? }),
            None => None,
        };
        recorded = Some(record(&args, &loaded, &header, &prompt, onward, key.as_ref(), ctx)?);
    }
    report(&args, ctx, effect.as_ref(), recorded.as_ref())
}

/// What was recorded, in numbers.
struct Recorded {
    seal: Seal,
    text: String,
    selections: u64,
    abstained: u64,
}

fn record(
    args: &Args,
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    onward: Option<Continuation>,
    key: Option<&SigningKey>,
    ctx: &Context,
) -> Result<Recorded> {
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
        trace::record(loaded, header, prompt, onward, &ctx.device, |record: Record| {
            text.push_str(&record.text);
            selections += record.rows.len() as u64;
            abstained += record.rows.iter().filter(|row| row.selected < 0).count() as u64;
            writer.push(&record)
        })?;
        match key {
            Some(key) => writer.finish_signed(key),
            None => writer.finish(),
        }
    })?;
    if let Some(html) = &args.html {
        write_page(html, std::slice::from_ref(path))?;
    }
    Ok(Recorded { seal, text, selections, abstained })
}

/// Writes the page of recorded traces.
fn show(args: &Args, ctx: &Context) -> Result<()> {
    let Some(html) = &args.html else { return Err(usage("--from needs --html")) };
    if args.from.len() > 2 {
        return Err(usage(format!("--from {} times; a page shows one trace or two", args.from.len())));
    }
    write_page(html, &args.from)?;
    if ctx.json { ctx.print(json!({ "html": html })) } else { ctx.print(html.display()) }
}

/// Verifies the traces and writes a page of them.
fn write_page(html: &Path, paths: &[PathBuf]) -> Result<()> {
    let traces = paths.iter().map(|path| Trace::read(path)).collect::<gd_model::Result<Vec<_>>>()?;
    let mut shown = Vec::new();
    for trace in &traces {
        let verified = trace::verify(trace, None, None)?;
        let name = trace.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        shown.push((name, serde_json::to_value(&trace.header)?, hex(&verified.seal.head), &trace.bytes));
    }
    let shown: Vec<Shown> =
        shown.iter().map(|(name, header, head, records)| Shown { name, header, head, records }).collect();
    write_file(html, viewer::page(&shown)?.as_bytes())?;
    Ok(())
}

fn interventions(args: &Args) -> Result<Vec<Intervention>> {
    let mut all = Vec::new();
    for (name, places) in [("force", &args.force), ("ban", &args.ban), ("ablate", &args.ablate)] {
        for place in places {
            all.push(Intervention::parse(name, place).map_err(|e| usage(format!("--{name}: {e}")))?);
        }
    }
    Ok(all)
}

fn signing_key(path: &Path) -> Result<SigningKey> {
    let text = read_text(path)?;
    SigningKey::from_pkcs8_pem(&text)
        .map_err(|e| anyhow::anyhow!("{}: not an Ed25519 key in PKCS#8 PEM: {e}", path.display()))
}

fn report(args: &Args, ctx: &Context, effect: Option<&Effect>, recorded: Option<&Recorded>) -> Result<()> {
    if ctx.json {
        let mut out = json!({ "effect": effect });
        if let Some(Recorded { seal, text, selections, abstained }) = recorded {
            out["text"] = Value::from(text.as_str());
            out["head"] = Value::from(hex(&seal.head));
            out["root"] = Value::from(hex(&seal.root));
            out["records"] = Value::from(seal.count);
            out["selections"] = Value::from(*selections);
            out["abstained"] = Value::from(*abstained);
        }
        return ctx.print(out);
    }
    if let Some(effect) = effect {
        for pick in &effect.picks {
            let name = |key: i32| if key < 0 { "nothing".to_owned() } else { key.to_string() };
            ctx.print(format_args!(
                "layer {} head {} at {}: reads {} instead of {}",
                pick.layer,
                pick.head,
                pick.query,
                name(pick.after),
                name(pick.before)
            ))?;
        }
        ctx.print(format_args!(
            "next token: KL {:.6} nats, total variation {:.6}; mean KL from position {} on {:.6} nats; {} of {} other \
             selections differ",
            effect.kl, effect.total_variation, effect.first, effect.mean_kl, effect.others, effect.selections
        ))?;
        let mut table = plain_table(UTF8_FULL_CONDENSED, &["next token", "before", "after"]);
        for change in &effect.tokens {
            let percent = |p: f64| format!("{:.2} %", 100.0 * p);
            table.add_row(vec![format!("{:?}", change.text), percent(change.before), percent(change.after)]);
        }
        ctx.print(table)?;
    }
    if let Some(Recorded { seal, text, selections, abstained }) = recorded {
        if args.max_tokens > 0 {
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
