//! One continuation of a prompt, token by token.

use std::time::Instant;

use anyhow::Result;
use gd_model::infer::engine::{Event, Generated};
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::text::{FinishReason, TextStream};

use crate::context::Context;

/// A continuation that is being generated.
pub(super) struct Continuation<'a> {
    /// The text so far.
    pub(super) text: String,
    /// The tokens so far, with an end token.
    pub(super) tokens: Vec<u32>,
    /// The log-probabilities of the tokens, if they were asked for.
    pub(super) logprobs: Vec<TokenLogprobs>,
    /// When the first token was there.
    pub(super) first_token: Option<Instant>,
    stream: TextStream<'a>,
    /// Where the text is written while it is generated, if it is.
    out: Option<&'a Context>,
    error: Option<anyhow::Error>,
}

impl<'a> Continuation<'a> {
    pub(super) fn new(stream: TextStream<'a>, out: Option<&'a Context>) -> Self {
        Self {
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            first_token: None,
            stream,
            out,
            error: None,
        }
    }

    /// Takes what the engine reports. Returns whether the generation continues.
    pub(super) fn take(&mut self, event: Event) -> bool {
        let result = match event {
            Event::Prompt(_) => Ok(true),
            Event::Token(generated) => self.push(generated),
            Event::Failed(error) => Err(error.into()),
        };
        result.unwrap_or_else(|error| {
            self.error = Some(error);
            false
        })
    }

    fn push(&mut self, generated: Generated) -> Result<bool> {
        self.first_token.get_or_insert_with(Instant::now);
        self.tokens.push(generated.token);
        self.logprobs.extend(generated.logprobs);
        let (text, goes_on) = self.stream.push(generated.token)?;
        Ok(self.append(&text)? && goes_on)
    }

    /// Adds the text that was held back. Returns why the text ended.
    pub(super) fn finish(&mut self) -> Result<FinishReason> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let (text, reason) = self.stream.finish()?;
        self.append(&text)?;
        Ok(reason)
    }

    /// Appends text. Returns false if the reader of stdout has closed the pipe.
    fn append(&mut self, text: &str) -> Result<bool> {
        self.text.push_str(text);
        match self.out {
            Some(ctx) if !text.is_empty() => ctx.write(text),
            _ => Ok(true),
        }
    }
}
