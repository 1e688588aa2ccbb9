//! `gd generate`: continues prompts, or answers them as a chat.

mod args;
mod continuation;
mod prompts;

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use gd_model::infer::generate::{check_prompt, generate_batch};
use gd_model::infer::sampler::Sampler;
use gd_model::infer::stop::StopStrings;
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::{Value, json};

pub use args::Args;

use self::continuation::{Continuation, FinishReason};
use self::prompts::Prompt;
use crate::context::{Context, flag_error, one_line, usage};

/// Number of prompts that are decoded as one batch.
const PROMPTS_PER_BATCH: usize = 32;

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid. If a prompt has no answer, the others are answered first.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let sampler = Sampler::new(args.sampling(), ctx.seed()).map_err(flag_error)?;
    if args.stop.iter().any(String::is_empty) {
        return Err(usage("--stop is empty"));
    }
    let prompts = prompts::read(&args)?;
    let loaded = pretrained::load(&args.model, &ctx.device)?;
    let end_tokens = loaded.end_tokens().with_context(|| args.model.display().to_string())?;
    let special = loaded.tokenizer.special_tokens();
    let generation = Generation {
        template: chat_template(&args, &loaded)?,
        stop: StopStrings::new(args.stop.clone())?.with_special_tokens(&special),
        // A single continuation is written to stdout as it is generated.
        stream: (prompts.len() == 1 && !ctx.json).then_some(ctx),
        loaded: &loaded,
        args: &args,
        sampler,
        end_tokens,
        ctx,
    };
    let (mut failures, mut separator) = (Vec::new(), "");
    for batch in prompts.chunks(PROMPTS_PER_BATCH) {
        for (prompt, answer) in batch.iter().zip(generation.answer(batch)) {
            match answer {
                Ok(answer) if ctx.json => ctx.print(answer.json(prompt, &loaded))?,
                Ok(_) if generation.stream.is_some() => ctx.print("")?,
                Ok(answer) => {
                    let text = if args.chat { "" } else { &prompt.text };
                    ctx.print(format_args!("{separator}{text}{}", answer.text))?;
                    separator = "\n";
                }
                Err(error) => {
                    if ctx.json {
                        ctx.print(failure(prompt, &error))?;
                    } else if prompts.len() > 1 {
                        tracing::error!("{prompt}: {}", one_line(&error));
                    }
                    failures.push((prompt, error));
                }
            }
        }
    }
    let count = failures.len();
    match failures.into_iter().next() {
        None => Ok(()),
        Some((_, error)) if prompts.len() == 1 => Err(error),
        Some((prompt, error)) => {
            let first = one_line(&error);
            Err(anyhow!("{count} of {} prompts have no answer; {prompt}: {first}", prompts.len()))
        }
    }
}

/// The answer to a prompt.
struct Answer {
    text: String,
    prompt_tokens: usize,
    /// Number of generated tokens.
    tokens: usize,
    finish_reason: FinishReason,
    timing: Timing,
}

/// Generation rates of a batch.
#[derive(Clone, Copy)]
struct Timing {
    prompt_tokens_per_second: f64,
    /// `None` if no token was generated after the first of each prompt.
    tokens_per_second: Option<f64>,
}

impl Answer {
    /// The line of `--json`.
    fn json(&self, prompt: &Prompt, loaded: &Loaded) -> Value {
        json!({
            "prompt": prompt.text,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            // Rates of the whole batch.
            "prompt_tokens_per_second": self.timing.prompt_tokens_per_second,
            "tokens_per_second": self.timing.tokens_per_second,
            "finish_reason": self.finish_reason,
            "stopped": self.finish_reason == FinishReason::Stop,
            "passed_over": loaded.skipped,
        })
    }
}

/// The line of `--json` for a prompt without an answer.
fn failure(prompt: &Prompt, error: &anyhow::Error) -> Value {
    let mut line = json!({ "prompt": prompt.text, "error": one_line(error) });
    if let Some(number) = prompt.line {
        line["line"] = number.into();
    }
    line
}

/// How prompts are continued.
struct Generation<'a> {
    loaded: &'a Loaded,
    args: &'a Args,
    template: Option<ChatTemplate>,
    stop: StopStrings,
    sampler: Sampler,
    end_tokens: Vec<u32>,
    /// Where the text is written while it is generated, if it is.
    stream: Option<&'a Context>,
    ctx: &'a Context,
}

impl Generation<'_> {
    /// Answers the prompts of a batch. Each has an answer or an error of its own.
    fn answer(&self, batch: &[Prompt]) -> Vec<Result<Answer>> {
        let encoded: Vec<_> = batch.iter().map(|prompt| self.encode(&prompt.text)).collect();
        let valid: Vec<&[u32]> = encoded.iter().flatten().map(Vec::as_slice).collect();
        let mut answers: Vec<Result<Answer>> = match self.generate(&valid, batch) {
            Ok(answers) => answers.into_iter().map(Ok).collect(),
            Err(error) if valid.len() == 1 => vec![Err(error)],
            // The error may be that of one prompt: alone, each has the same answer as in the batch.
            Err(_) => valid.iter().map(|ids| Ok(self.generate(&[*ids], batch)?.swap_remove(0))).collect(),
        };
        let mut next = answers.drain(..);
        let answer =
            |ids: Result<Vec<u32>>| ids.and_then(|_| next.next().context("an answer for each prompt")?);
        encoded.into_iter().map(answer).collect()
    }

    /// The token ids of a prompt, or of the chat that starts with it.
    fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let ids = match &self.template {
            Some(template) => {
                let text = template.render(self.args.system.as_deref(), prompt)?;
                self.loaded.tokenizer.encode_written(&text)?
            }
            None => self.loaded.encode_prompt(prompt)?,
        };
        check_prompt(&self.loaded.model, &ids)?;
        Ok(ids)
    }

    /// Continues the prompts with these ids. They are read one after the other, each up to its first new token, and then
    /// decoded together.
    fn generate(&self, ids: &[&[u32]], batch: &[Prompt]) -> Result<Vec<Answer>> {
        let continuation = |ids: &&[u32]| {
            let decoder = self.loaded.tokenizer.stream_after(ids)?;
            Ok(Continuation::new(decoder, self.stop.clone(), &self.end_tokens, self.stream))
        };
        let mut continuations = ids.iter().map(continuation).collect::<Result<Vec<_>>>()?;
        if let (Some(ctx), [prompt], [_], false) = (self.stream, batch, ids, self.args.chat) {
            ctx.write(&prompt.text)?;
        }
        let mut samplers = vec![self.sampler.clone(); ids.len()];
        // The callback of `generate_batch` has another error type.
        let mut error = None;
        let start = Instant::now();
        let (mut has_token, mut prefill_end) = (vec![false; ids.len()], start);
        let on_token = |index: usize, token: u32| {
            if !std::mem::replace(&mut has_token[index], true) {
                prefill_end = Instant::now();
            }
            continuations[index].push(token).or_else(|e| {
                error = Some(e);
                Ok(false)
            })
        };
        let (model, max_tokens) = (&self.loaded.model, self.args.max_tokens);
        let new = generate_batch(model, ids, max_tokens, &mut samplers, &self.ctx.device, on_token)?;
        if let Some(e) = error {
            return Err(e);
        }
        let prefill_seconds = (prefill_end - start).as_secs_f64();
        let decode_seconds = prefill_end.elapsed().as_secs_f64();
        let prompt_tokens: usize = ids.iter().map(|ids| ids.len()).sum();
        let decoded_tokens: usize = new.iter().map(|new| new.len().saturating_sub(1)).sum();
        let timing = Timing {
            prompt_tokens_per_second: prompt_tokens as f64 / prefill_seconds,
            tokens_per_second: (decoded_tokens > 0).then(|| decoded_tokens as f64 / decode_seconds),
        };
        let answer = |((mut continuation, ids), new): ((Continuation, &&[u32]), Vec<u32>)| {
            let finish_reason = continuation.finish()?;
            let (text, prompt_tokens, tokens) = (continuation.text, ids.len(), new.len());
            Ok(Answer { text, prompt_tokens, tokens, finish_reason, timing })
        };
        continuations.into_iter().zip(ids).zip(new).map(answer).collect()
    }
}

/// The chat template of the model if `--chat` is given.
fn chat_template(args: &Args, loaded: &Loaded) -> Result<Option<ChatTemplate>> {
    if !args.chat {
        return Ok(None);
    }
    let Some(template) = loaded.chat()? else {
        return Err(usage(format!("--chat: {} has no chat template", args.model.display())));
    };
    match &args.chat_template_kwargs {
        Some(variables) => {
            let template = template.with_variables(variables);
            template.map(Some).map_err(|e| usage(format!("--chat-template-kwargs: {e}")))
        }
        None => Ok(Some(template)),
    }
}
