//! A chat and the cache that its turns share.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, anyhow, bail};
use gd_model::config::Mechanism;
use gd_model::infer::engine::{BatchEngine, EngineLimits, Event, Request, Source};
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::infer::stop::StopStrings;
use gd_model::infer::text::{FinishReason, TextStream};
use gd_model::io::chat_template::{ChatTemplate, Message};
use gd_model::io::files::{read_text, write_file};
use gd_model::model::pretrained::Loaded;
use serde::{Deserialize, Serialize};

use super::command::message;
use super::sources;
use crate::context::Context;

/// Tokens that are read in one step; between steps, an answer can be stopped.
const TOKENS_PER_STEP: usize = 512;

/// How answers are sampled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) sampling: Sampling,
    pub(super) max_tokens: usize,
    /// The seed of the next answer; that of the one after it is greater by 1.
    pub(super) seed: u64,
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty } = self.sampling;
        let shown = |value: Option<String>| value.unwrap_or_else(|| "none".into());
        let (top_k, top_p) = (shown(top_k.map(|k| k.to_string())), shown(top_p.map(|p| p.to_string())));
        let min_p = shown(min_p.map(|p| p.to_string()));
        write!(
            f,
            "temperature={temperature} top_k={top_k} top_p={top_p} min_p={min_p} \
             repetition_penalty={repetition_penalty} max_tokens={} seed={}",
            self.max_tokens, self.seed
        )
    }
}

impl Settings {
    /// Sets a value by its name. `none` removes a filter.
    ///
    /// # Errors
    /// Names what is not valid; the settings are unchanged then.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let mut new = *self;
        let invalid = || anyhow!("/set {name}={value}: not a valid value");
        fn filter<T: std::str::FromStr>(value: &str) -> Option<Option<T>> {
            if value == "none" { Some(None) } else { value.parse().ok().map(Some) }
        }
        match name {
            "temperature" => new.sampling.temperature = value.parse().ok().with_context(invalid)?,
            "top_k" => new.sampling.top_k = filter(value).with_context(invalid)?,
            "top_p" => new.sampling.top_p = filter(value).with_context(invalid)?,
            "min_p" => new.sampling.min_p = filter(value).with_context(invalid)?,
            "repetition_penalty" => {
                new.sampling.repetition_penalty = value.parse().ok().with_context(invalid)?;
            }
            "max_tokens" => new.max_tokens = value.parse().ok().with_context(invalid)?,
            "seed" => new.seed = value.parse().ok().with_context(invalid)?,
            _ => bail!("/set {name}: there is no such setting; /set shows all"),
        }
        new.sampling.validate()?;
        *self = new;
        Ok(())
    }
}

/// An answer.
#[derive(Debug, Serialize)]
pub(super) struct Answer {
    text: String,
    /// Tokens of the chat up to the answer, and how many of them were cached.
    prompt_tokens: usize,
    reused_tokens: usize,
    tokens: usize,
    /// `interrupted` if the user stopped it.
    finish_reason: &'static str,
}

/// A chat in a file, which is a record that training takes.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    messages: Vec<Message>,
}

/// The state of a chat.
pub(super) struct Session<'a> {
    loaded: &'a Loaded,
    template: ChatTemplate,
    end_tokens: &'a [u32],
    stop: StopStrings,
    engine: BatchEngine<'a>,
    selects: bool,
    pub(super) settings: Settings,
    pub(super) system: Option<String>,
    /// The turns without the system message.
    messages: Vec<Message>,
    /// The tokens of the last prompt and answer, with the sources of those of the answer.
    last: (Vec<u32>, Vec<(u32, Vec<Source>)>),
}

impl<'a> Session<'a> {
    pub(super) fn new(
        loaded: &'a Loaded,
        template: ChatTemplate,
        end_tokens: &'a [u32],
        settings: Settings,
        ctx: &'a Context,
    ) -> Result<Self> {
        let config = loaded.model.config();
        let limits = EngineLimits {
            sequences: 1,
            tokens_per_step: TOKENS_PER_STEP,
            // The prompt and the whole turn: a model with running averages needs both.
            stored_tokens: 2 * config.max_position_embeddings,
        };
        Ok(Self {
            engine: BatchEngine::new(&loaded.model, &ctx.device, limits)?,
            selects: (0..config.num_hidden_layers).any(|layer| *config.mechanism(layer) == Mechanism::Gd),
            stop: StopStrings::default(),
            system: None,
            messages: Vec::new(),
            last: Default::default(),
            loaded,
            template,
            end_tokens,
            settings,
        })
    }

    /// Ends answers at these strings.
    ///
    /// # Errors
    /// An empty string.
    pub(super) fn stop_at(&mut self, stops: Vec<String>) -> Result<()> {
        let special = self.loaded.tokenizer.special_tokens();
        self.stop = StopStrings::new(stops)?.with_special_tokens(&special);
        Ok(())
    }

    /// Forgets the turns.
    pub(super) fn reset(&mut self) {
        self.messages.clear();
        self.last = Default::default();
    }

    /// The system message and the turns.
    fn chat(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        system.chain(self.messages.iter().cloned()).collect()
    }

    /// Writes the chat.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let record = Record { messages: self.chat() };
        Ok(write_file(path, format!("{}\n", serde_json::to_string(&record)?).as_bytes())?)
    }

    /// Reads a chat and returns the number of its messages.
    pub(super) fn load(&mut self, path: &Path) -> Result<usize> {
        let record: Record =
            serde_json::from_str(&read_text(path)?).with_context(|| path.display().to_string())?;
        let mut messages = record.messages;
        let count = messages.len();
        self.system = match messages.first() {
            Some(first) if first.role == "system" => Some(messages.remove(0).content),
            _ => None,
        };
        self.reset();
        self.messages = messages;
        Ok(count)
    }

    /// Answers a message, up to the time when `stop` is set. Writes the answer to `out` as it comes. An error leaves the chat
    /// as it was.
    pub(super) fn answer(&mut self, line: &str, stop: &AtomicBool, out: Option<&Context>) -> Result<Answer> {
        self.messages.push(Message::new("user", message(line)));
        let result = self.generate(stop, out);
        match &result {
            Ok(answer) => self.messages.push(Message::new("assistant", answer.text.as_str())),
            Err(_) => _ = self.messages.pop(),
        }
        self.settings.seed = self.settings.seed.wrapping_add(1);
        result
    }

    fn generate(&mut self, stop: &AtomicBool, out: Option<&Context>) -> Result<Answer> {
        let ids = self.loaded.tokenizer.encode_written(&self.template.render_chat(&self.chat())?)?;
        let sampler = Sampler::new(self.settings.sampling, self.settings.seed)?;
        let sources = self.selects;
        let request = Request { sources, ..Request::new(ids.clone(), self.settings.max_tokens, sampler) };
        let id = self.engine.submit(request)?;
        let decoder = self.loaded.tokenizer.stream_after(&ids)?;
        let mut stream = TextStream::new(decoder, self.stop.clone(), self.end_tokens);
        let (mut text, mut tokens, mut reused_tokens) = (String::new(), Vec::new(), 0);
        let mut failure = None;
        let mut append = |new: &str| -> Result<bool> {
            text.push_str(new);
            out.map_or(Ok(true), |ctx| ctx.write(new))
        };
        while !self.engine.is_idle() && !stop.load(Ordering::Relaxed) {
            self.engine.step(|_, event| {
                let goes_on = match event {
                    Event::Prompt(prompt) => {
                        reused_tokens = prompt.reused;
                        return true;
                    }
                    Event::Failed(error) => Err(error.into()),
                    Event::Token(token) => {
                        tokens.push((token.token, token.sources));
                        stream.push(token.token).map_err(Into::into).and_then(|(new, goes_on)| {
                            Ok(append(&new)? && goes_on && !stop.load(Ordering::Relaxed))
                        })
                    }
                };
                goes_on.unwrap_or_else(|error: anyhow::Error| {
                    failure = Some(error);
                    false
                })
            })?;
        }
        self.engine.cancel(&[id])?;
        if let Some(error) = failure {
            return Err(error);
        }
        let (rest, reason) = stream.finish()?;
        append(&rest)?;
        let finish_reason = match (stop.load(Ordering::Relaxed), reason) {
            (true, _) => "interrupted",
            (_, FinishReason::Stop) => "stop",
            (_, FinishReason::Eos) => "eos",
            (_, FinishReason::Length) => "length",
        };
        let (prompt_tokens, count) = (ids.len(), tokens.len());
        self.last = (ids, tokens);
        Ok(Answer { text, prompt_tokens, reused_tokens, tokens: count, finish_reason })
    }

    /// Which positions were read for each token of the last answer, as a table.
    ///
    /// # Errors
    /// No answer, or a model without layers that select.
    pub(super) fn sources(&self) -> Result<String> {
        let (prompt, answer) = &self.last;
        if !self.selects {
            bail!("no layer of the model selects, so that words have no sources");
        }
        if answer.is_empty() {
            bail!("there is no answer yet");
        }
        Ok(sources::table(&self.loaded.tokenizer, prompt, answer))
    }
}
