//! `gd generate`: continues a prompt, token by token.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::Context;

/// Continue a prompt; prompt and continuation go to stdout as they come
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  gd generate out/tiny --prompt \"Once upon a time\" --max-tokens 100 --temperature 0.8 --top-p 0.95 --seed 7"
)]
pub struct Args {
    /// The model: a checkpoint folder or a safetensors file in one
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// The most tokens to add
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token always
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample among the K likeliest tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that together hold this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample among the tokens with at least this share of the likeliest one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Divides the scores of tokens already present (1 changes nothing)
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,
    /// Stop before this text (may be given more than once)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(_args: Args, _ctx: &Context) -> Result<()> {
    bail!("generate: waits for the model")
}
