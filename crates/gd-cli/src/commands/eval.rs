//! `gd eval`: loss, perplexity and bits per byte of a model on a text.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use gd_model::config::DocumentFormat;
use gd_model::data::{Documents, Tokens};
use gd_model::eval::evaluate;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained;

use crate::context::{Context, usage};
use crate::data_source::{DocumentArgs, check_tokens, prepared_data_for};

/// A forward pass contains as many windows as fit in this number of tokens.
const TOKENS_PER_PASS: usize = 2048;

/// Measure a model on a text: loss, perplexity, bits per byte
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The text is tokenized as a whole and cut into consecutive windows of the model's context. The loss \
                  (nats per token) is the mean over all predicted tokens. Documents (JSONL lines, prepared data) are \
                  predicted from their own text only.\n\n\
                  Example:\n  gd eval out/tiny --data book.txt --json"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Text to measure on: text files (UTF-8), which are concatenated, JSONL files, folders of them, or the
    /// validation part of one folder of prepared data
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// How files are split into documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Tokens per window (default: the model's context)
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
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
    let (tokens, bytes) = read_tokens(&args, &loaded.tokenizer)?;
    check_tokens(&tokens, &loaded.tokenizer, loaded.model.config())?;
    let result = evaluate(&loaded.model, &tokens, bytes, context, TOKENS_PER_PASS / context, &ctx.device)
        .with_context(|| args.data.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "))?;
    if ctx.json {
        let mut json = serde_json::to_value(&result)?;
        json["passed_over"] = serde_json::to_value(&loaded.skipped)?;
        return ctx.print(json);
    }
    ctx.print(format_args!(
        "loss {:.4} nats/token, perplexity {:.2}, {:.4} bits/byte, {} tokens in windows of {context}\n\
         heads: abstain rate {:.4}, first-token share {:.4}, top-1 margin {:.3}",
        result.loss,
        result.perplexity,
        result.bits_per_byte,
        result.tokens,
        result.heads.abstained,
        result.heads.first_token,
        result.heads.margin
    ))
}

/// Reads the text. Returns its tokens and its length in bytes.
fn read_tokens(args: &Args, tokenizer: &Tokenizer) -> Result<(Tokens, usize)> {
    if let Some(prepared) = prepared_data_for(&args.data, tokenizer)? {
        return Ok((prepared.corpus.valid, prepared.corpus.valid_bytes));
    }
    let mut format = DocumentFormat::default();
    args.documents.apply(&mut format);
    let documents = Documents::open(&args.data, &format)?.collect::<gd_model::Result<Vec<_>>>()?;
    let bytes = documents.iter().map(|d| d.text.len()).sum();
    if documents.iter().all(|d| d.is_file) {
        let text: String = documents.iter().map(|d| d.text.as_str()).collect();
        return Ok((tokenizer.encode(&text)?.into(), bytes));
    }
    let ids = documents.iter().map(|d| tokenizer.encode_document(&d.text));
    Ok((Tokens::documents(ids.collect::<gd_model::Result<Vec<_>>>()?), bytes))
}
