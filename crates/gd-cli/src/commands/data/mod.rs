//! `gd data`: tokenizes text into shards for training, and describes a folder of such data.

mod turns;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use clap::Subcommand;
use gd_model::config::DocumentFormat;
use gd_model::data::{Documents, Index, Part, Preparation, Prepared, ReadSummary, prepare, text_files};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::checkpoint::{CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG};
use gd_model::io::tokenizer::Tokenizer;
use serde_json::json;

use crate::context::{Context, usage};
use crate::data_source::{DocumentArgs, document_error};
use crate::progress::byte_progress;

/// Prepare text for training
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

/// Tokenize text into shards that training maps into memory
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Writes index.json, tokenizer.json and the shards of the training and the validation part, all with \
                  checksums. The end of each text file goes to the validation part. JSON records, and documents between \
                  separators, go entirely to one part, depending on a hash of their text. If the tokenizer has an \
                  end-of-text token, it follows every document. Records with `messages` are written as text by the chat \
                  template beside the tokenizer.\n\n\
                  Example:\n  gd data prepare --data books/ notes.jsonl --tokenizer bpe:4096 --out data/books\n  \
                  gd train --data data/books"
)]
pub struct PrepareArgs {
    /// Text files (UTF-8), JSON records (.jsonl, .ndjson, .json), folders of them, or - for standard input. Files may be
    /// compressed by gzip or Zstandard
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// How files are split into documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// bytes, bpe:N (train a vocabulary of N tokens on the training part), or a tokenizer.json or a folder with one
    #[arg(long, value_name = "bytes|bpe:N|FILE", default_value = "bytes")]
    pub tokenizer: TokenizerSource,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// A shard ends after the document with which it reaches this number of tokens
    #[arg(long, value_name = "N", default_value_t = 1 << 24, value_parser = clap::value_parser!(u32).range(1..))]
    pub shard_tokens: u32,
    /// Share of the text for validation. 0: none
    #[arg(long, value_name = "SHARE", default_value_t = 0.05)]
    pub valid_fraction: f64,
}

/// Verify prepared data and describe it, or show what a training learns of chats
#[derive(Debug, clap::Args)]
#[command(
    after_help = "With --model, the file has JSON records with `messages`, and the first of them are shown as the template \
                  of the model writes them. What `gd train --from MODEL` learns, the turns of the assistant, is in [[ ]].\n\n\
                  Examples:\n  gd data inspect data/books --json\n  gd data inspect chats.jsonl --model out/book"
)]
pub struct InspectArgs {
    /// Folder of prepared data, or a file of chats
    #[arg(value_name = "DIR|FILE")]
    pub folder: PathBuf,
    /// Model whose template writes the chats
    #[arg(long, value_name = "MODEL")]
    pub model: Option<PathBuf>,
}

/// The value of `--tokenizer`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// One token per byte.
    Bytes,
    /// A BPE vocabulary of this size, trained on the training part.
    Bpe(usize),
    /// A `tokenizer.json`, or a folder with one.
    File(PathBuf),
}

impl FromStr for TokenizerSource {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s.strip_prefix("bpe:") {
            _ if s == "bytes" => Ok(Self::Bytes),
            Some(n) => {
                n.parse().map(Self::Bpe).map_err(|_| format!("bpe:{n}: {n:?} is not a number of tokens"))
            }
            None => Ok(Self::File(s.into())),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.command {
        Command::Prepare(args) => run_prepare(&args, ctx),
        Command::Inspect(InspectArgs { folder, model: None }) => {
            print_index(&folder, &Prepared::open(&folder)?.index, None, ctx)
        }
        Command::Inspect(InspectArgs { folder, model: Some(model) }) => turns::print(&folder, &model, ctx),
    }
}

fn run_prepare(args: &PrepareArgs, ctx: &Context) -> Result<()> {
    if !(0.0..1.0).contains(&args.valid_fraction) {
        return Err(usage(format!("--valid-fraction {} is outside [0, 1)", args.valid_fraction)));
    }
    let mut format = DocumentFormat::default();
    args.documents.apply(&mut format);
    // Standard input has no size, and a file that cannot be read is an error where it is opened.
    let size = |file: &PathBuf| file.metadata().map_or(0, |metadata| metadata.len());
    let total_bytes = text_files(&args.data)?.iter().map(size).sum();
    let mut template = None;
    let tokenizer = match &args.tokenizer {
        TokenizerSource::Bytes => Tokenizer::bytes()?,
        TokenizerSource::File(path) => {
            let file = if path.is_dir() { path.join(TOKENIZER) } else { path.clone() };
            template = template_beside(&file)?;
            Tokenizer::load(&file)?
        }
        TokenizerSource::Bpe(vocab) => train_tokenizer(args, &format, *vocab, total_bytes)?,
    };
    let progress = byte_progress("tokenizing", total_bytes)?;
    let preparation = Preparation {
        tokenizer: &tokenizer,
        shard_tokens: args.shard_tokens as usize,
        valid_fraction: args.valid_fraction,
    };
    let mut documents = Documents::open(&args.data, &format)?.with_chat_template(template);
    let index = prepare(&args.out, &mut documents, &preparation, |bytes| progress.inc(bytes));
    progress.finish();
    print_index(&args.out, &index.map_err(document_error)?, Some(documents.summary()), ctx)
}

/// The chat template in the folder of a `tokenizer.json`, if there is one.
fn template_beside(tokenizer: &Path) -> Result<Option<ChatTemplate>> {
    let mut files = BTreeMap::new();
    for name in [TOKENIZER_CONFIG, CHAT_TEMPLATE] {
        let path = tokenizer.with_file_name(name);
        if path.is_file() {
            let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
            files.insert(name.to_owned(), content);
        }
    }
    Ok(ChatTemplate::find(&files)?)
}

/// Trains a BPE vocabulary on the training part.
fn train_tokenizer(
    args: &PrepareArgs,
    format: &DocumentFormat,
    vocab: usize,
    total_bytes: u64,
) -> Result<Tokenizer> {
    let progress = byte_progress("training the tokenizer", total_bytes)?;
    // The tokenizer takes an iterator of texts, which ends at the first error.
    let mut error = None;
    let documents = Documents::open(&args.data, format)?.map_while(|document| match document {
        Ok(document) => {
            progress.inc(document.bytes);
            Some(document.split(args.valid_fraction).0.to_owned())
        }
        Err(e) => {
            error = Some(e);
            None
        }
    });
    let tokenizer = Tokenizer::train_bpe(documents, vocab);
    progress.finish();
    match error {
        Some(e) => Err(document_error(e)),
        None => Ok(tokenizer?),
    }
}

/// Prints the content of a folder of prepared data, and what was read for it if it has been written now.
fn print_index(folder: &Path, index: &Index, read: Option<ReadSummary>, ctx: &Context) -> Result<()> {
    if ctx.json {
        let mut json = json!({ "folder": folder, "index": index });
        if let Some(read) = read {
            json["data"] = serde_json::to_value(read)?;
        }
        return ctx.print(json);
    }
    let line = |name: &str, part: &Part| match part.tokens {
        0 => format!("{name}: none"),
        _ => format!(
            "{name}: {} tokens of {} documents in {} shards, {:.3} bytes per token",
            part.tokens,
            part.documents,
            part.shards.len(),
            part.bytes as f64 / part.tokens as f64
        ),
    };
    let read = read.map_or(String::new(), |read| format!("data: {read}\n"));
    ctx.print(format_args!(
        "{read}{}\n{}\nvocabulary of {} tokens, in {}",
        line("train", &index.train),
        line("valid", &index.valid),
        index.vocab_size,
        folder.display()
    ))
}
