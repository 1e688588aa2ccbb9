//! `gd eval`: loss, perplexity and bits per byte of a model on a text.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::{Context, usage};
use crate::data::{Tokens, read_text, text_files};
use crate::evaluate::evaluate;
use crate::model_file;

/// Tokens of a forward pass: as many windows go together as fit.
const TOGETHER: usize = 2048;

/// Measure a model on a text: loss, perplexity, bits per byte
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The text is tokenised whole, cut into consecutive windows of the model's context, and the loss \
                  (nats per token) is averaged over every predicted token.\n\n\
                  Example:\n  gd eval out/tiny --data book.txt --json"
)]
pub struct Args {
    /// The model: a checkpoint folder or a safetensors file in one
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// UTF-8 text files or folders to measure on; several are joined into one text
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Tokens a window (default: the model's context)
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if args.context == Some(0) {
        return Err(usage("--context 0: a window has at least 1 token"));
    }
    let loaded = model_file::load(&args.model, &ctx.device)?;
    let limit = loaded.model.config().max_position_embeddings;
    let context = args.context.unwrap_or(limit);
    if context > limit {
        return Err(usage(format!(
            "--context {context} exceeds the model's max_position_embeddings {limit}"
        )));
    }
    let files = text_files(&args.data)?;
    let text = files.iter().map(|f| read_text(f)).collect::<crate::Result<Vec<_>>>()?.concat();
    let tokens = Tokens::from(loaded.tokenizer.encode(&text)?);
    let result = evaluate(&loaded.model, &tokens, text.len(), context, TOGETHER / context, &ctx.device)
        .with_context(|| files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", "))?;
    if ctx.json {
        return ctx.print(serde_json::to_string(&result)?);
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
