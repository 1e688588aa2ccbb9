//! `gd generate`: continues prompts, token by token, or answers them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use gd_model::data::{Documents, Reading, is_jsonl, read_text};
use gd_model::error::Error;
use gd_model::infer::generate::{check_prompt, generate_batch};
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::infer::stop::StopStrings;
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::tokenizer::StreamDecoder;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::json;

use super::{Context, usage};

/// Prompts that are decoded as one batch.
const TOGETHER: usize = 32;

/// Continue a prompt; prompt and continuation go to stdout as they come
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Several prompts (--prompt more than once, or --prompts) are continued together, each as it would be \
                  alone; with --json there is one line for each. --chat writes the prompt as the model's chat template \
                  has it and shows the answer alone. A text ends at the tokens that the model names for that.\n\n\
                  Example:\n  gd generate out/tiny --prompt \"Once upon a time\" --max-tokens 100 --temperature 0.8 --top-p 0.95 --seed 7"
)]
pub struct Args {
    /// The model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// The text to continue (may be given more than once)
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    pub prompt: Vec<String>,
    /// More prompts: a line of a text file each, or the field `prompt` of a line of a .jsonl file
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Take each prompt for the user's turn of a chat
    #[arg(long)]
    pub chat: bool,
    /// The system's turn before it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,
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
    let sampler = Sampler::new(args.sampling(), ctx.seed.unwrap_or(0)).map_err(flag)?;
    let mut prompts = args.prompt.clone();
    if prompts.iter().any(String::is_empty) {
        return Err(usage("--prompt is empty"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(usage("--stop is empty"));
    }
    if let Some(path) = &args.prompts {
        prompts.extend(read_prompts(path)?);
    }
    let stop = StopStrings::new(args.stop.clone())?;
    let loaded = pretrained::load(&args.model, &ctx.device)?;
    let ends = loaded.ends().with_context(|| args.model.display().to_string())?;
    let template = match args.chat {
        true => Some(
            loaded
                .chat()?
                .ok_or_else(|| usage(format!("--chat: {} has no chat template", args.model.display())))?,
        ),
        false => None,
    };
    let written =
        prompts.iter().map(|prompt| encode(&loaded, template.as_ref(), args.system.as_deref(), prompt));
    let written = written.collect::<gd_model::Result<Vec<_>>>()?;
    let one = prompts.len() == 1;
    let mut texts: Vec<Text> = prompts
        .iter()
        .map(|prompt| Text {
            prompt,
            decoder: loaded.tokenizer.stream(),
            stop: stop.clone(),
            text: String::new(),
            shown: (one && !ctx.json).then_some(ctx),
        })
        .collect();
    if one && !ctx.json && !args.chat {
        ctx.write(&prompts[0])?;
    }
    let mut first = true;
    for (texts, ids) in texts.chunks_mut(TOGETHER).zip(written.chunks(TOGETHER)) {
        let mut samplers = vec![sampler.clone(); ids.len()];
        let mut failed = None;
        // Prompts are read one after the other, each up to its first token; then all are continued.
        let started = Instant::now();
        let (mut begun, mut prompts_read) = (vec![false; ids.len()], started);
        let emit = |place: usize, token: u32| {
            if !std::mem::replace(&mut begun[place], true) {
                prompts_read = Instant::now();
            }
            if ends.contains(&token) {
                return Ok(false);
            }
            texts[place].push(token).or_else(|e| {
                failed = Some(e);
                Ok(false)
            })
        };
        let new = generate_batch(&loaded.model, ids, args.max_tokens, &mut samplers, &ctx.device, emit)?;
        if let Some(e) = failed {
            return Err(e);
        }
        let reading = (prompts_read - started).as_secs_f64();
        let writing = prompts_read.elapsed().as_secs_f64();
        let read: usize = ids.iter().map(Vec::len).sum();
        let written: usize = new.iter().map(|new| new.len().saturating_sub(1)).sum();
        for ((text, ids), new) in texts.iter_mut().zip(ids).zip(&new) {
            let stopped = text.finish()?;
            if ctx.json {
                ctx.print(json!({
                    "prompt": text.prompt,
                    "text": text.text,
                    "prompt_tokens": ids.len(),
                    "tokens": new.len(),
                    // Of all that were continued together: up to the first tokens, and from then on.
                    "prompt_tokens_per_second": read as f64 / reading,
                    "tokens_per_second": (written > 0).then(|| written as f64 / writing),
                    "stopped": stopped,
                    "passed_over": loaded.passed_over,
                }))?;
            } else if one {
                ctx.print("")?;
            } else {
                let (gap, prompt) = (if first { "" } else { "\n" }, if args.chat { "" } else { text.prompt });
                ctx.print(format_args!("{gap}{prompt}{}", text.text))?;
            }
            first = false;
        }
    }
    Ok(())
}

/// The prompts in a file.
fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let prompts: Vec<String> = if is_jsonl(path) {
        let reading = Reading { text_field: "prompt".into(), separator: None };
        let documents = Documents::open(&[path.to_path_buf()], &reading)?;
        documents.map(|document| Ok(document?.text)).collect::<gd_model::Result<_>>()?
    } else {
        read_text(path)?.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    };
    if prompts.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "no prompts in it" }.into());
    }
    Ok(prompts)
}

/// The ids of a prompt, or of the chat that it opens; checked against the model.
fn encode(
    loaded: &Loaded,
    template: Option<&ChatTemplate>,
    system: Option<&str>,
    prompt: &str,
) -> gd_model::Result<Vec<u32>> {
    let ids = match template {
        Some(template) => loaded.tokenizer.encode_written(&template.render(system, prompt)?)?,
        None => loaded.tokenizer.encode(prompt)?,
    };
    check_prompt(&loaded.model, &ids)?;
    Ok(ids)
}

/// A continuation, as it comes.
struct Text<'a> {
    prompt: &'a str,
    decoder: StreamDecoder<'a>,
    stop: StopStrings,
    text: String,
    /// Where it is shown as it comes.
    shown: Option<&'a Context>,
}

impl Text<'_> {
    /// Takes a token; whether the text goes on.
    fn push(&mut self, token: u32) -> Result<bool> {
        let piece = self.decoder.push(token)?.unwrap_or_default();
        let piece = self.stop.push(&piece);
        Ok(self.show(&piece)? && !self.stop.stopped())
    }

    /// Adds what is still held back: a character or a stop string that the last token leaves unfinished.
    /// Whether a stop string ended the text.
    fn finish(&mut self) -> Result<bool> {
        if let Some(rest) = self.decoder.finish()? {
            let piece = self.stop.push(&rest);
            self.show(&piece)?;
        }
        let rest = self.stop.finish();
        self.show(&rest)?;
        Ok(self.stop.stopped())
    }

    /// Whether somebody still reads.
    fn show(&mut self, piece: &str) -> Result<bool> {
        self.text.push_str(piece);
        match self.shown {
            Some(ctx) if !piece.is_empty() => ctx.write(piece),
            _ => Ok(true),
        }
    }
}
