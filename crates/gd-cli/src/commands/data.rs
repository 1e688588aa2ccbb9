//! `gd data`: tokenises text once, into shards that training maps into memory; shows what such a folder holds.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use gd_model::data::{Documents, Index, Part, Preparation, Prepared, Reading, prepare, text_files};
use gd_model::io::tokenizer::Tokenizer;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{Context, usage};

/// Prepare text for training, once
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  gd data prepare --data book.txt notes.jsonl --tokenizer bpe:4096 --out data/book"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Prepare(PrepareArgs),
    Inspect(InspectArgs),
}

/// Flags that say how files become documents.
#[derive(Debug, Clone, clap::Args)]
pub struct ReadingArgs {
    /// The field of a JSONL line that holds its text (default: text)
    #[arg(long, value_name = "FIELD")]
    pub text_field: Option<String>,
    /// In text files, a line that stands between documents (default: every file is one document)
    #[arg(long, value_name = "LINE", allow_hyphen_values = true)]
    pub separator: Option<String>,
}

impl ReadingArgs {
    /// Puts the flags that were given in the place of what the configuration says.
    pub fn apply(&self, reading: &mut Reading) {
        if let Some(field) = &self.text_field {
            reading.text_field.clone_from(field);
        }
        if self.separator.is_some() {
            reading.separator.clone_from(&self.separator);
        }
    }
}

/// Tokenise text into shards that training maps into memory
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Writes index.json, tokenizer.json and the shards of a training and a validation part, with checksums \
                  of everything. Text files give their end for validation; JSONL lines and documents between \
                  separators go to one part as a whole, chosen by a hash of their text. A tokenizer with an \
                  end-of-text token gets it after every document.\n\n\
                  Example:\n  gd data prepare --data books/ notes.jsonl --tokenizer bpe:4096 --out data/books\n  \
                  gd train --data data/books"
)]
pub struct PrepareArgs {
    /// Text files (UTF-8), JSONL files, or folders of them
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// How files become documents
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// bytes, bpe:N (learn N tokens from the training part), or a tokenizer.json
    #[arg(long, value_name = "bytes|bpe:N|FILE", default_value = "bytes")]
    pub tokenizer: TokenizerSource,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Close a shard after the document with which it has this many tokens
    #[arg(long, value_name = "N", default_value_t = 1 << 24, value_parser = clap::value_parser!(u32).range(1..))]
    pub shard_tokens: u32,
    /// The share that is kept for validation
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    pub valid_fraction: f64,
}

/// Check prepared data and show what it holds
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd data inspect data/books --json")]
pub struct InspectArgs {
    /// The folder
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// Where a tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// One token a byte.
    Bytes,
    /// Learned from the training part.
    Bpe(usize),
    /// A `tokenizer.json`.
    File(PathBuf),
}

impl FromStr for TokenizerSource {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.strip_prefix("bpe:") {
            _ if s == "bytes" => Ok(Self::Bytes),
            Some(n) => n.parse().map(Self::Bpe).map_err(|_| format!("bpe:{n}: {n:?} is no number of tokens")),
            None => Ok(Self::File(s.into())),
        }
    }
}

/// The prepared data that `--data` names, if it is that.
pub(super) fn prepared(paths: &[PathBuf]) -> Result<Option<Prepared>> {
    match paths.iter().find(|p| Prepared::is_at(p)) {
        None => Ok(None),
        Some(folder) if paths.len() == 1 => Ok(Some(Prepared::open(folder)?)),
        Some(folder) => {
            Err(usage(format!("--data: {} is prepared data, which stands alone", folder.display())))
        }
    }
}

/// As [`prepared`], for a model whose tokenizer is to be the one it was prepared with.
pub(super) fn prepared_for(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Option<Prepared>> {
    let Some(prepared) = prepared(paths)? else { return Ok(None) };
    if prepared.tokenizer.to_json()? != tokenizer.to_json()? {
        bail!("{}: prepared with another tokenizer than the model's", paths[0].display());
    }
    Ok(Some(prepared))
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.command {
        Command::Prepare(args) => run_prepare(&args, ctx),
        Command::Inspect(args) => show(&args.folder, &Prepared::open(&args.folder)?.index, ctx),
    }
}

fn run_prepare(args: &PrepareArgs, ctx: &Context) -> Result<()> {
    if !(args.valid_fraction > 0.0 && args.valid_fraction < 1.0) {
        return Err(usage(format!("--valid-fraction {} is outside (0, 1)", args.valid_fraction)));
    }
    let mut reading = Reading::default();
    args.reading.apply(&mut reading);
    let mut total = 0;
    for file in text_files(&args.data)? {
        total += file.metadata().with_context(|| file.display().to_string())?.len();
    }
    let tokenizer = match &args.tokenizer {
        TokenizerSource::Bytes => Tokenizer::bytes()?,
        TokenizerSource::File(path) => Tokenizer::load(path)?,
        TokenizerSource::Bpe(vocab) => learn(args, &reading, *vocab, total)?,
    };
    let bar = bar("tokenising", total)?;
    let what = Preparation {
        paths: &args.data,
        reading: &reading,
        tokenizer: &tokenizer,
        shard_tokens: args.shard_tokens as usize,
        valid_fraction: args.valid_fraction,
    };
    let index = prepare(&args.out, &what, |bytes| bar.inc(bytes))?;
    bar.finish();
    show(&args.out, &index, ctx)
}

/// Learns a vocabulary from the training part, which is read for that and not kept.
fn learn(args: &PrepareArgs, reading: &Reading, vocab: usize, total: u64) -> Result<Tokenizer> {
    let bar = bar("learning tokens", total)?;
    let mut failed = None;
    let documents = Documents::open(&args.data, reading)?.map_while(|document| match document {
        Ok(document) => {
            bar.inc(document.bytes);
            Some(document.split(args.valid_fraction).0.to_owned())
        }
        Err(e) => {
            failed = Some(e);
            None
        }
    });
    let tokenizer = Tokenizer::train_bpe(documents, vocab);
    bar.finish();
    match failed {
        Some(e) => Err(e.into()),
        None => Ok(tokenizer?),
    }
}

fn bar(what: &'static str, bytes: u64) -> Result<ProgressBar> {
    let bar = ProgressBar::new(bytes).with_message(what);
    let style = "{msg} {bar:30} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {elapsed_precise}";
    bar.set_style(ProgressStyle::with_template(style)?);
    bar.enable_steady_tick(Duration::from_millis(500));
    Ok(bar)
}

fn show(folder: &Path, index: &Index, ctx: &Context) -> Result<()> {
    if ctx.json {
        return ctx.print(json!({ "folder": folder, "index": index }));
    }
    let line = |name: &str, part: &Part| {
        format!(
            "{name}: {} tokens of {} documents in {} shards, {:.3} bytes a token",
            part.tokens,
            part.documents,
            part.shards.len(),
            part.bytes as f64 / part.tokens as f64
        )
    };
    ctx.print(format_args!(
        "{}\n{}\nvocabulary of {}, in {}",
        line("train", &index.train),
        line("valid", &index.valid),
        index.vocab_size,
        folder.display()
    ))
}
