//! Answers: as one object, or as a stream of server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse::{KeepAlive, Sse};
use axum::response::{IntoResponse, Response, sse};
use futures_util::stream;
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::text::FinishReason;
use serde_json::{Map, Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;

use super::error::{ApiError, json_response};
use super::job::{NewToken, Update};
use super::server::Server;
use crate::generation::token_text;

/// The log-probability that stands for −∞, which JSON does not have.
const MIN_LOGPROB: f64 = -9999.0;
/// The last event of a stream.
const DONE: &str = "[DONE]";

/// The endpoint of a request.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Completion {
        /// Whether the answer begins with the prompt.
        echo: bool,
    },
    Chat,
}

impl Kind {
    /// Whether the answer begins with the prompt.
    pub(super) fn echoes(self) -> bool {
        matches!(self, Self::Completion { echo: true })
    }
}

/// A choice of an answer.
#[derive(Debug, Default)]
struct Choice {
    prompt: Vec<u32>,
    /// What was written and not sent, or all of it.
    text: String,
    tokens: Vec<NewToken>,
    prompt_logprobs: Vec<TokenLogprobs>,
    /// The number of tokens that were written.
    count: usize,
    reason: Option<FinishReason>,
    /// The number of characters of the tokens that were reported.
    offset: usize,
    /// Whether a part was sent.
    begun: bool,
}

/// An answer that is being written.
pub(super) struct Reply {
    kind: Kind,
    server: Arc<Server>,
    id: String,
    created: u64,
    /// The number of choices of each prompt.
    n: usize,
    choices: Vec<Choice>,
    pub(super) logprobs: bool,
    pub(super) sources: bool,
}

impl Reply {
    /// An answer with a choice for each of `prompts`, in which every prompt is repeated `n` times.
    pub(super) fn new(
        kind: Kind,
        server: Arc<Server>,
        created: u64,
        prompts: Vec<Vec<u32>>,
        n: usize,
    ) -> Self {
        let prefix = match kind {
            Kind::Completion { .. } => "cmpl",
            Kind::Chat => "chatcmpl",
        };
        let id = format!("{prefix}-{:032x}", rand::random::<u128>());
        let choice = |prompt: Vec<u32>| {
            let text = if kind.echoes() { server.prompts.text(&prompt) } else { String::new() };
            Choice { prompt, text, ..Choice::default() }
        };
        let choices = prompts.into_iter().map(choice).collect();
        Self { kind, server, id, created, n, choices, logprobs: false, sources: false }
    }

    /// The whole answer as one object.
    pub(super) async fn whole(
        mut self,
        mut updates: UnboundedReceiver<Update>,
    ) -> Result<Response, ApiError> {
        while let Some(update) = updates.recv().await {
            self.take(update)?;
        }
        if self.choices.iter().any(|choice| choice.reason.is_none()) {
            return Err(ApiError::internal("the model has ended before the answer"));
        }
        let choices: Vec<Value> = (0..self.choices.len()).map(|at| self.part(at, false)).collect();
        let mut body = self.envelope(false, choices.into());
        body["usage"] = self.usage();
        Ok(json_response(&body))
    }

    /// The answer as events. The client is gone when the response is dropped, and with it `updates`.
    pub(super) fn stream(
        self,
        updates: UnboundedReceiver<Update>,
        include_usage: bool,
        permit: OwnedSemaphorePermit,
    ) -> Response {
        let state = Stream { reply: self, updates, include_usage, ready: VecDeque::new(), ended: false };
        // The permit is held until the last event is sent.
        let events = stream::unfold((state, permit), async |(mut state, permit)| {
            let data = state.next().await?;
            Some((Ok::<_, Infallible>(sse::Event::default().data(data)), (state, permit)))
        });
        Sse::new(events).keep_alive(KeepAlive::default()).into_response()
    }

    /// Adds what the worker reports. Returns the choice that it concerns.
    fn take(&mut self, update: Update) -> Result<usize, ApiError> {
        let unknown = || ApiError::internal("the model has written a choice that does not exist");
        let (at, text) = match update {
            Update::Failed(error) => return Err(error),
            Update::Prompt { choice, logprobs } => {
                let of = self.choices.get_mut(choice).ok_or_else(unknown)?;
                of.prompt_logprobs = logprobs;
                return Ok(choice);
            }
            Update::Token(mut token) => {
                let (at, text) = (token.choice, std::mem::take(&mut token.text));
                let choice = self.choices.get_mut(at).ok_or_else(unknown)?;
                choice.count += 1;
                choice.tokens.push(*token);
                (at, text)
            }
            Update::End { choice, text, reason } => {
                self.choices.get_mut(choice).ok_or_else(unknown)?.reason = Some(reason);
                (choice, text)
            }
        };
        self.choices[at].text += &text;
        Ok(at)
    }

    /// What was added to a choice since the last call, as an element of `choices`.
    fn part(&mut self, at: usize, streams: bool) -> Value {
        let first = !std::mem::replace(&mut self.choices[at].begun, true);
        let text = std::mem::take(&mut self.choices[at].text);
        let tokens = std::mem::take(&mut self.choices[at].tokens);
        let mut part = json!({ "index": at, "finish_reason": self.finish_reason(at), "logprobs": null });
        match (self.kind, streams) {
            (Kind::Completion { .. }, _) => part["text"] = text.into(),
            (Kind::Chat, false) => part["message"] = json!({ "role": "assistant", "content": text }),
            (Kind::Chat, true) => {
                let mut delta = Map::new();
                if first {
                    delta.insert("role".into(), "assistant".into());
                }
                if first || !text.is_empty() {
                    delta.insert("content".into(), text.into());
                }
                part["delta"] = delta.into();
            }
        }
        if self.logprobs {
            part["logprobs"] = match self.kind {
                Kind::Completion { .. } => self.completion_logprobs(at, &tokens, first),
                Kind::Chat => self.chat_logprobs(&tokens),
            };
        }
        if self.sources {
            part["gd"] = self.sources_json(at, &tokens, first);
        }
        part
    }

    fn finish_reason(&self, at: usize) -> Option<&'static str> {
        self.choices[at].reason.map(|reason| match reason {
            FinishReason::Stop | FinishReason::Eos => "stop",
            FinishReason::Length => "length",
        })
    }

    fn envelope(&self, streams: bool, choices: Value) -> Value {
        let object = match (self.kind, streams) {
            (Kind::Completion { .. }, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
        };
        let model = &self.server.model;
        json!({ "id": self.id, "object": object, "created": self.created, "model": model, "choices": choices })
    }

    fn usage(&self) -> Value {
        // A prompt with several choices counts once.
        let prompt: usize = self.choices.iter().step_by(self.n).map(|choice| choice.prompt.len()).sum();
        let completion: usize = self.choices.iter().map(|choice| choice.count).sum();
        json!({ "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion })
    }

    fn token_text(&self, id: u32) -> String {
        token_text(&self.server.prompts.tokenizer, id)
    }

    fn chat_logprobs(&self, tokens: &[NewToken]) -> Value {
        let one = |id: u32, logprob: f64| {
            let (token, logprob) = (self.token_text(id), logprob.max(MIN_LOGPROB));
            json!({ "token": token, "logprob": logprob, "bytes": null })
        };
        let token = |token: &TokenLogprobs| {
            let mut value = one(token.token, token.logprob);
            value["top_logprobs"] = token.top.iter().map(|(id, logprob)| one(*id, *logprob)).collect();
            value
        };
        let content: Vec<Value> = tokens.iter().filter_map(|new| new.logprobs.as_ref()).map(token).collect();
        json!({ "content": content, "refusal": null })
    }

    fn completion_logprobs(&mut self, at: usize, tokens: &[NewToken], first: bool) -> Value {
        let (mut texts, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
        let choice = &self.choices[at];
        let mut offset = choice.offset;
        let mut add = |id: u32, of: Option<&TokenLogprobs>| {
            let text = self.token_text(id);
            offsets.push(offset);
            offset += text.chars().count();
            texts.push(text);
            logprobs.push(of.map(|of| of.logprob.max(MIN_LOGPROB)));
            let top = |of: &TokenLogprobs| -> Map<String, Value> {
                let pairs = of.top.iter();
                pairs.map(|(id, logprob)| (self.token_text(*id), logprob.max(MIN_LOGPROB).into())).collect()
            };
            tops.push(of.map(top));
        };
        if first && self.kind.echoes() {
            // Nothing predicts the first token.
            let predicted = choice.prompt_logprobs.iter().map(Some);
            for (id, of) in choice.prompt.iter().zip(std::iter::once(None).chain(predicted)) {
                add(*id, of);
            }
        }
        for new in tokens {
            add(new.id, new.logprobs.as_ref());
        }
        self.choices[at].offset = offset;
        json!({ "tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets })
    }

    /// The tokens with their sources, and at first the tokens of the prompt, to whose positions sources refer.
    fn sources_json(&self, at: usize, tokens: &[NewToken], first: bool) -> Value {
        let prompts = &self.server.prompts;
        let token = |new: &NewToken| {
            let mut value = prompts.token_json(new.id);
            value["sources"] = json!(new.sources);
            value
        };
        let mut value = json!({ "tokens": tokens.iter().map(token).collect::<Vec<_>>() });
        if first {
            let prompt = self.choices[at].prompt.iter().map(|id| prompts.token_json(*id));
            value["prompt"] = prompt.collect();
        }
        value
    }
}

/// The state of a stream of events.
struct Stream {
    reply: Reply,
    updates: UnboundedReceiver<Update>,
    include_usage: bool,
    /// Events that are not sent.
    ready: VecDeque<String>,
    ended: bool,
}

impl Stream {
    /// The data of the next event; `None` at the end.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.ended {
                return None;
            }
            match self.updates.recv().await {
                Some(update) => self.take(update),
                None => self.end(),
            }
        }
    }

    fn take(&mut self, update: Update) {
        match self.reply.take(update) {
            Ok(at) => {
                let choice = &self.reply.choices[at];
                let reports = (self.reply.logprobs || self.reply.sources) && !choice.tokens.is_empty();
                if choice.begun && choice.text.is_empty() && !reports && choice.reason.is_none() {
                    return;
                }
                let part = self.reply.part(at, true);
                let mut chunk = self.reply.envelope(true, vec![part].into());
                if self.include_usage {
                    chunk["usage"] = Value::Null;
                }
                self.ready.push_back(chunk.to_string());
            }
            Err(error) => {
                self.ready.push_back(error.json().to_string());
                self.ended = true;
            }
        }
    }

    fn end(&mut self) {
        self.ended = true;
        if self.reply.choices.iter().any(|choice| choice.reason.is_none()) {
            let error = ApiError::internal("the model has ended before the answer");
            self.ready.push_back(error.json().to_string());
            return;
        }
        if self.include_usage {
            let mut chunk = self.reply.envelope(true, json!([]));
            chunk["usage"] = self.reply.usage();
            self.ready.push_back(chunk.to_string());
        }
        self.ready.push_back(DONE.to_owned());
    }
}
