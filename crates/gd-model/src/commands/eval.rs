//! `gd eval`: loss, perplexity and bits per byte of a model on a text.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::Context;

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
    /// UTF-8 text files to measure on
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
pub fn run(_args: Args, _ctx: &Context) -> Result<()> {
    bail!("eval: waits for the model")
}
