//! `gd generate`: continues prompts, or answers them as a chat.

mod args;
mod continuation;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use gd_model::Error;
use gd_model::config::DocumentFormat;
use gd_model::data::{Documents, is_jsonl};
use gd_model::infer::generate::{check_prompt, generate_batch};
use gd_model::infer::sampler::Sampler;
use gd_model::infer::stop::StopStrings;
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::files::read_text;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::json;

pub use args::Args;

use self::continuation::Continuation;
use crate::context::{Context, flag_error, usage};

/// Number of prompts that are decoded as one batch.
const PROMPTS_PER_BATCH: usize = 32;

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let sampler = Sampler::new(args.sampling(), ctx.seed()).map_err(flag_error)?;
    let prompts = prompts(&args)?;
    let stop = StopStrings::new(args.stop.clone())?;
    let loaded = pretrained::load(&args.model, &ctx.device)?;
    let end_tokens = loaded.end_tokens().with_context(|| args.model.display().to_string())?;
    let template = chat_template(&args, &loaded)?;
    let ids = prompts
        .iter()
        .map(|prompt| encode(&loaded, template.as_ref(), args.system.as_deref(), prompt))
        .collect::<gd_model::Result<Vec<_>>>()?;
    // A single continuation is written to stdout as it is generated.
    let stream = prompts.len() == 1 && !ctx.json;
    let mut continuations: Vec<Continuation> = prompts
        .iter()
        .map(|prompt| {
            let decoder = loaded.tokenizer.stream();
            Continuation::new(prompt, decoder, stop.clone(), stream.then_some(ctx))
        })
        .collect();
    if stream && !args.chat {
        ctx.write(&prompts[0])?;
    }
    let mut first = true;
    for (batch, ids) in continuations.chunks_mut(PROMPTS_PER_BATCH).zip(ids.chunks(PROMPTS_PER_BATCH)) {
        let timing = generate(&loaded, batch, ids, args.max_tokens, &sampler, &end_tokens, ctx)?;
        for (continuation, ids) in batch.iter_mut().zip(ids) {
            let stopped = continuation.finish()?;
            if ctx.json {
                ctx.print(json!({
                    "prompt": continuation.prompt,
                    "text": continuation.text,
                    "prompt_tokens": ids.len(),
                    "tokens": continuation.tokens,
                    // Rates of the whole batch.
                    "prompt_tokens_per_second": timing.prompt_tokens_per_second,
                    "tokens_per_second": timing.tokens_per_second,
                    "stopped": stopped,
                    "passed_over": loaded.skipped,
                }))?;
            } else if stream {
                ctx.print("")?;
            } else {
                let separator = if first { "" } else { "\n" };
                let prompt = if args.chat { "" } else { continuation.prompt };
                ctx.print(format_args!("{separator}{prompt}{}", continuation.text))?;
            }
            first = false;
        }
    }
    Ok(())
}

/// Generation rates of a batch.
struct Timing {
    prompt_tokens_per_second: f64,
    /// `None` if no token was generated after the first of each prompt.
    tokens_per_second: Option<f64>,
}

/// Continues the prompts of a batch. The prompts are read one after the other, each up to its first new token, and
/// then decoded together.
fn generate(
    loaded: &Loaded,
    batch: &mut [Continuation],
    ids: &[Vec<u32>],
    max_tokens: usize,
    sampler: &Sampler,
    end_tokens: &[u32],
    ctx: &Context,
) -> Result<Timing> {
    let mut samplers = vec![sampler.clone(); ids.len()];
    // The callback of `generate_batch` has another error type.
    let mut error = None;
    let start = Instant::now();
    let (mut has_token, mut prefill_end) = (vec![false; ids.len()], start);
    let on_token = |index: usize, token: u32| {
        if !std::mem::replace(&mut has_token[index], true) {
            prefill_end = Instant::now();
        }
        if end_tokens.contains(&token) {
            return Ok(false);
        }
        batch[index].push(token).or_else(|e| {
            error = Some(e);
            Ok(false)
        })
    };
    let new = generate_batch(&loaded.model, ids, max_tokens, &mut samplers, &ctx.device, on_token)?;
    if let Some(e) = error {
        return Err(e);
    }
    let prefill_seconds = (prefill_end - start).as_secs_f64();
    let decode_seconds = prefill_end.elapsed().as_secs_f64();
    let prompt_tokens: usize = ids.iter().map(Vec::len).sum();
    let decoded_tokens: usize = new.iter().map(|new| new.len().saturating_sub(1)).sum();
    for (continuation, new) in batch.iter_mut().zip(&new) {
        continuation.tokens = new.len();
    }
    Ok(Timing {
        prompt_tokens_per_second: prompt_tokens as f64 / prefill_seconds,
        tokens_per_second: (decoded_tokens > 0).then(|| decoded_tokens as f64 / decode_seconds),
    })
}

/// The prompts of `--prompt` and `--prompts`.
fn prompts(args: &Args) -> Result<Vec<String>> {
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
    Ok(prompts)
}

/// Reads a file of prompts.
fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let prompts: Vec<String> = if is_jsonl(path) {
        let format = DocumentFormat { text_field: "prompt".into(), ..DocumentFormat::default() };
        let documents = Documents::open(&[path.to_path_buf()], &format)?;
        documents.map(|document| Ok(document?.text)).collect::<gd_model::Result<_>>()?
    } else {
        read_text(path)?.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    };
    if prompts.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file has no prompts" }.into());
    }
    Ok(prompts)
}

/// The chat template of the model if `--chat` is given.
fn chat_template(args: &Args, loaded: &Loaded) -> Result<Option<ChatTemplate>> {
    if !args.chat {
        return Ok(None);
    }
    match loaded.chat()? {
        Some(template) => Ok(Some(template)),
        None => Err(usage(format!("--chat: {} has no chat template", args.model.display()))),
    }
}

/// The token ids of a prompt, or of the chat that starts with it.
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
