//! `gd eval`: loss, perplexity and bits per byte of a model on a text.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use gd_model::Error;
use gd_model::config::DocumentFormat;
use gd_model::data::{Documents, Tokens, encode_text};
use gd_model::eval::{Evaluation, evaluate, observe};
use gd_model::io::files::stream_file;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::json;

use crate::context::{Context, usage};
use crate::data_source::{DocumentArgs, check_tokens, document_error, prepared_data_for};
use crate::generation::token_text;

/// A forward pass contains as many windows as fit in this number of tokens.
const TOKENS_PER_PASS: usize = 2048;

/// Measure a model on a text: loss, perplexity, bits per byte
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The text is tokenized as a whole and cut into consecutive windows of the model's context. The loss \
                  (nats per token) is the mean over all predicted tokens. Documents (JSON records, prepared data) are \
                  predicted from their own text only. Bits per byte count the predicted tokens of the text, without \
                  begin and end tokens, over the bytes of the text. A loss that is not finite is an error.\n\n\
                  Example:\n  gd eval out/tiny --data book.txt --json"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Text to measure on: text files (UTF-8), which are concatenated, JSON records (.jsonl, .ndjson, .json), folders of
    /// them, - for standard input, or the validation part of one folder of prepared data. Files may be compressed by gzip
    /// or Zstandard
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// How files are split into documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Tokens per window (default: the model's context)
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// Write a line of JSON for every predicted token: document, position in it, token, text, and loss in nats
    #[arg(long, value_name = "FILE")]
    pub per_token: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if args.context == Some(0) {
        return Err(usage("--context 0: a window has at least 1 token"));
    }
    let loaded = pretrained::load(&args.model, &ctx.device)?;
    let limit = loaded.model.config().max_position_embeddings;
    let context = args.context.unwrap_or(limit);
    if context > limit {
        return Err(usage(format!(
            "--context {context} exceeds the model's max_position_embeddings {limit}"
        )));
    }
    let (tokens, bytes) = read_tokens(&args, &loaded)?;
    check_tokens(&tokens, &loaded.tokenizer, loaded.model.config())?;
    let sizes = (context, TOKENS_PER_PASS / context);
    let result = match &args.per_token {
        Some(path) => per_token(path, &loaded, &tokens, bytes, sizes, ctx),
        None => evaluate(&loaded.model, &tokens, bytes, sizes.0, sizes.1, &ctx.device),
    };
    let result = result
        .with_context(|| args.data.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "))?;
    if ctx.json {
        let mut json = serde_json::to_value(&result)?;
        json["passed_over"] = serde_json::to_value(&loaded.skipped)?;
        return ctx.print(json);
    }
    ctx.print(format_args!(
        "loss {:.4} nats/token, perplexity {:.2}, {:.4} bits/byte, {} tokens in windows of {context}\n\
         bits/byte: {} text tokens over {:.0} bytes{}\n\
         heads: abstain rate {:.4}, first-token share {:.4}, top-1 margin {:.3}",
        result.loss,
        result.perplexity,
        result.bits_per_byte,
        result.tokens,
        result.text_tokens,
        result.text_bytes,
        if result.text_tokens < result.tokens { ", without begin and end tokens" } else { "" },
        result.heads.abstained,
        result.heads.first_token,
        result.heads.margin
    ))
}

/// Evaluates, and writes a line of JSON for every predicted token.
fn per_token(
    path: &Path,
    loaded: &Loaded,
    tokens: &Tokens,
    bytes: usize,
    sizes: (usize, usize),
    ctx: &Context,
) -> gd_model::Result<Evaluation> {
    let starts: Vec<usize> = tokens.text_ranges().into_iter().map(|(start, _)| start).collect();
    stream_file(path, |out| {
        observe(&loaded.model, tokens, bytes, sizes, &ctx.device, |observed| {
            let ids = tokens.read(observed.first..observed.first + observed.losses.len());
            for (at, (id, loss)) in (observed.first..).zip(ids.iter().zip(observed.losses)) {
                // The document with this position; its first token is not predicted.
                let document = starts.partition_point(|start| *start <= at) - 1;
                if starts[document] == at {
                    continue;
                }
                let (position, text) = (at - starts[document], token_text(&loaded.tokenizer, *id));
                let line = json!({
                    "document": document, "position": position, "token": id, "text": text, "loss": loss,
                });
                writeln!(out, "{line}").map_err(|source| Error::Unwritable { path: path.into(), source })?;
            }
            Ok(())
        })
    })
}

/// Reads the text. Returns its tokens and its length in bytes.
fn read_tokens(args: &Args, loaded: &Loaded) -> Result<(Tokens, usize)> {
    let tokenizer = &loaded.tokenizer;
    if let Some(prepared) = prepared_data_for(&args.data, tokenizer)? {
        if prepared.corpus.valid.is_empty() {
            bail!("{}: there is no validation part to measure on", args.data[0].display());
        }
        return Ok((prepared.corpus.valid, prepared.corpus.valid_bytes));
    }
    let mut format = DocumentFormat::default();
    args.documents.apply(&mut format);
    let documents = Documents::open(&args.data, &format)?.with_chat_template(loaded.chat()?);
    let documents = documents.collect::<gd_model::Result<Vec<_>>>().map_err(document_error)?;
    let bytes = documents.iter().map(|d| d.text.len()).sum();
    let tokens = if documents.iter().all(|d| d.is_file) {
        let text: String = documents.into_iter().map(|d| d.text).collect();
        Tokens::from(tokenizer.encode(&text)?)
    } else {
        let ids = documents.iter().map(|d| encode_text(tokenizer, &d.text, d.is_chat));
        Tokens::documents(ids.collect::<gd_model::Result<Vec<_>>>()?)
    };
    Ok((tokens.with_framing(tokenizer.framing()?), bytes))
}
