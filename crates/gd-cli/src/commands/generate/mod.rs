//! `gd generate`: continues prompts, or answers them as a chat.

mod args;
mod continuation;
mod prompts;

use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use gd_model::infer::engine::{BatchEngine, EngineLimits, Request};
use gd_model::infer::generate::check_prompt;
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::infer::stop::StopStrings;
use gd_model::infer::text::{FinishReason, TextStream};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};

pub use args::Args;

use self::continuation::Continuation;
use self::prompts::Prompt;
use crate::context::{Context, one_line, usage};
use crate::generation::logprobs_json;

/// Number of sequences that are decoded as one batch.
const SEQUENCES_PER_BATCH: usize = 32;

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid. If a prompt has no answer, the others are answered first.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    args.sampling.validate()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(usage("--stop is empty"));
    }
    let prompts = prompts::read(&args)?;
    let loaded = args.cache.load(&args.model, ctx)?;
    let at = || args.model.display().to_string();
    let end_tokens = loaded.end_tokens().with_context(at)?;
    let special = loaded.tokenizer.special_tokens();
    let generation = Generation {
        template: chat_template(&args, &loaded)?,
        stop: StopStrings::new(args.stop.clone())?.with_special_tokens(&special),
        // A single continuation is written to stdout as it is generated.
        stream: (prompts.len() == 1 && args.n == 1 && !ctx.json).then_some(ctx),
        sampling: args.sampling.sampling(&loaded.generation).with_context(at)?,
        loaded: &loaded,
        args: &args,
        end_tokens,
        ctx,
    };
    let (mut failures, mut separator) = (Vec::new(), "");
    let per_batch = SEQUENCES_PER_BATCH.div_ceil(usize::from(args.n));
    for batch in prompts.chunks(per_batch) {
        for (prompt, answers) in batch.iter().zip(generation.answer(batch)) {
            match answers {
                Ok(answers) => {
                    for (choice, answer) in answers.iter().enumerate() {
                        generation.show(prompt, choice, answer, separator)?;
                        separator = "\n";
                    }
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
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
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
    sampling: Sampling,
    end_tokens: Vec<u32>,
    /// Where the text is written while it is generated, if it is.
    stream: Option<&'a Context>,
    ctx: &'a Context,
}

impl Generation<'_> {
    /// Answers the prompts of a batch, each `--n` times. Each prompt has answers or an error of its own.
    fn answer(&self, batch: &[Prompt]) -> Vec<Result<Vec<Answer>>> {
        let encoded: Vec<_> = batch.iter().map(|prompt| self.encode(&prompt.text)).collect();
        let valid: Vec<&[u32]> = encoded.iter().flatten().map(Vec::as_slice).collect();
        let mut answers = match self.generate(&valid, batch) {
            Ok(answers) => answers,
            // An error of the device is that of all prompts.
            Err(error) => {
                let message = one_line(&error);
                valid.iter().map(|_| Err(anyhow!("{message}"))).collect()
            }
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
    fn generate(&self, ids: &[&[u32]], batch: &[Prompt]) -> Result<Vec<Result<Vec<Answer>>>> {
        let choices = usize::from(self.args.n);
        let limits = EngineLimits {
            sequences: (ids.len() * choices).max(1),
            // The cache of a prompt with several continuations is computed once.
            stored_tokens: if choices > 1 { ids.iter().map(|ids| ids.len()).max().unwrap_or(0) } else { 0 },
            ..EngineLimits::default()
        };
        let mut engine = BatchEngine::new(&self.loaded.model, &self.ctx.device, limits)?;
        let mut continuations = Vec::with_capacity(limits.sequences);
        for ids in ids {
            for choice in 0..choices {
                let sampler = Sampler::new(self.sampling, self.ctx.seed().wrapping_add(choice as u64))?;
                let mut request = Request::new(ids.to_vec(), self.args.max_tokens, sampler);
                request.logprobs = self.args.logprobs.map(usize::from);
                engine.submit(request)?;
                let decoder = self.loaded.tokenizer.stream_after(ids)?;
                let stream = TextStream::new(decoder, self.stop.clone(), &self.end_tokens);
                continuations.push(Continuation::new(stream, self.stream));
            }
        }
        if let (Some(ctx), [prompt], [_], false) = (self.stream, batch, ids, self.args.chat) {
            ctx.write(&prompt.text)?;
        }
        let start = Instant::now();
        while !engine.is_idle() {
            engine.step(|id, event| continuations[id as usize].take(event))?;
        }
        let timing = timing(start, engine.counts().prompt_tokens, &continuations);
        let mut continuations = continuations.into_iter();
        let answers = ids.iter().map(|ids| {
            let of_prompt = continuations.by_ref().take(choices).collect::<Vec<_>>().into_iter();
            of_prompt.map(|one| answer(one, ids.len(), timing)).collect()
        });
        Ok(answers.collect())
    }

    /// Prints an answer that was not written while it was generated.
    fn show(&self, prompt: &Prompt, choice: usize, answer: &Answer, separator: &str) -> Result<()> {
        if self.ctx.json {
            return self.ctx.print(self.json(prompt, choice, answer));
        }
        if self.stream.is_some() {
            return self.ctx.print("");
        }
        let text = if self.args.chat { "" } else { &prompt.text };
        self.ctx.write(format!("{separator}{text}{}\n", answer.text)).map(|_| ())
    }

    /// The line of `--json`.
    fn json(&self, prompt: &Prompt, choice: usize, answer: &Answer) -> Value {
        let mut line = json!({
            "prompt": prompt.text,
            "text": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": answer.tokens.len(),
            "token_ids": answer.tokens,
            // Rates of the whole batch.
            "prompt_tokens_per_second": answer.timing.prompt_tokens_per_second,
            "tokens_per_second": answer.timing.tokens_per_second,
            "finish_reason": answer.finish_reason,
            "stopped": answer.finish_reason == FinishReason::Stop,
            "passed_over": self.loaded.skipped,
        });
        if self.args.n > 1 {
            line["choice"] = choice.into();
        }
        if self.args.logprobs.is_some() {
            let tokenizer = &self.loaded.tokenizer;
            line["logprobs"] = answer.logprobs.iter().map(|token| logprobs_json(tokenizer, token)).collect();
        }
        line
    }
}

fn answer(mut continuation: Continuation, prompt_tokens: usize, timing: Timing) -> Result<Answer> {
    let finish_reason = continuation.finish()?;
    let Continuation { text, tokens, logprobs, .. } = continuation;
    Ok(Answer { text, prompt_tokens, tokens, logprobs, finish_reason, timing })
}

/// The rates of a batch that has just ended. Its prompts were read when the last of them had its first token.
fn timing(start: Instant, prompt_tokens: u64, continuations: &[Continuation]) -> Timing {
    let prefill_end = continuations.iter().filter_map(|one| one.first_token).max().unwrap_or(start);
    let decoded: usize = continuations.iter().map(|one| one.tokens.len().saturating_sub(1)).sum();
    let decode_seconds = prefill_end.elapsed().as_secs_f64();
    Timing {
        prompt_tokens_per_second: prompt_tokens as f64 / (prefill_end - start).as_secs_f64(),
        tokens_per_second: (decoded > 0).then(|| decoded as f64 / decode_seconds),
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
