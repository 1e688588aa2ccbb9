//! `gd generate`: continues a prompt, token by token.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::{Context, usage};
use crate::error::Error;
use crate::generate::{check_prompt, generate};
use crate::model_file;
use crate::sampler::{Sampler, Sampling};
use crate::stop::StopStrings;

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

impl Args {
    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

/// A setting outside its range, under the name of its flag.
fn flag(e: Error) -> anyhow::Error {
    let text = e.to_string();
    let (name, rest) = text.split_once(' ').unwrap_or((&text, ""));
    usage(format!("--{} {rest}", name.replace('_', "-")))
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let mut sampler = Sampler::new(args.sampling(), ctx.seed.unwrap_or(0)).map_err(flag)?;
    if args.prompt.is_empty() {
        return Err(usage("--prompt is empty"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(usage("--stop is empty"));
    }
    let mut stop = StopStrings::new(args.stop)?;
    let loaded = model_file::load(&args.model, &ctx.device)?;
    let prompt = loaded.tokenizer.encode(&args.prompt)?;
    check_prompt(&loaded.model, &prompt)?;
    let mut out = Output { ctx, text: String::new(), open: true };
    if !ctx.json {
        out.open = ctx.write(&args.prompt)?;
    }
    let (mut decoder, end) = (loaded.tokenizer.stream(), loaded.tokenizer.end_of_text());
    let (started, mut failed) = (Instant::now(), None);
    let tokens = generate(&loaded.model, &prompt, args.max_tokens, &mut sampler, &ctx.device, |token| {
        let piece = decoder.push(token)?.unwrap_or_default();
        match out.push(&stop.push(&piece)) {
            Ok(open) => Ok(open && !stop.stopped() && Some(token) != end),
            Err(e) => {
                failed = Some(e);
                Ok(false)
            }
        }
    })?;
    if let Some(e) = failed {
        return Err(e);
    }
    let seconds = started.elapsed().as_secs_f64();
    // A character or a stop string that the last token leaves unfinished.
    if let Some(rest) = decoder.finish()? {
        out.push(&stop.push(&rest))?;
    }
    let stopped = stop.stopped();
    out.push(&stop.finish())?;
    if ctx.json {
        return ctx.print(json!({
            "prompt": args.prompt,
            "text": out.text,
            "tokens": tokens.len(),
            "tokens_per_second": tokens.len() as f64 / seconds,
            "stopped": stopped,
            "passed_over": loaded.passed_over,
        }));
    }
    ctx.print("")
}

/// The continuation: kept for `--json`, otherwise shown as it comes.
struct Output<'a> {
    ctx: &'a Context,
    text: String,
    /// Whether somebody still reads stdout.
    open: bool,
}

impl Output<'_> {
    fn push(&mut self, piece: &str) -> Result<bool> {
        if self.ctx.json {
            self.text.push_str(piece);
        } else if self.open && !piece.is_empty() {
            self.open = self.ctx.write(piece)?;
        }
        Ok(self.open)
    }
}
