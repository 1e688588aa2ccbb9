//! The continuation of one prompt, token by token.

use anyhow::Result;
use gd_model::infer::stop::StopStrings;
use gd_model::io::tokenizer::StreamDecoder;
use serde::Serialize;

use crate::context::Context;

/// Why a continuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FinishReason {
    /// A stop string.
    Stop,
    /// An end token of the model.
    Eos,
    /// The maximum number of tokens, or the last position of the model.
    Length,
}

/// A continuation that is being generated.
pub(super) struct Continuation<'a> {
    /// The text so far.
    pub(super) text: String,
    decoder: StreamDecoder<'a>,
    stop: StopStrings,
    end_tokens: &'a [u32],
    ended: bool,
    /// Where the text is written while it is generated, if it is.
    stream: Option<&'a Context>,
}

impl<'a> Continuation<'a> {
    pub(super) fn new(
        decoder: StreamDecoder<'a>,
        stop: StopStrings,
        end_tokens: &'a [u32],
        stream: Option<&'a Context>,
    ) -> Self {
        Self { text: String::new(), decoder, stop, end_tokens, ended: false, stream }
    }

    /// Adds a token. Returns whether the generation continues.
    pub(super) fn push(&mut self, token: u32) -> Result<bool> {
        if self.stop.has_special(token) {
            // What precedes the token is complete.
            let decoded = self.decoder.finish()?.unwrap_or_default();
            let text = self.stop.push(&decoded) + &self.stop.push_special(token);
            if !self.append(&text)? || self.stop.stopped() {
                return Ok(false);
            }
        }
        if self.end_tokens.contains(&token) {
            self.ended = true;
            return Ok(false);
        }
        let decoded = self.decoder.push(token)?.unwrap_or_default();
        let text = self.stop.push(&decoded);
        Ok(self.append(&text)? && !self.stop.stopped())
    }

    /// Adds the text that was held back: an incomplete character, or the start of a stop string. Returns why the text
    /// ended.
    pub(super) fn finish(&mut self) -> Result<FinishReason> {
        if let Some(decoded) = self.decoder.finish()? {
            let text = self.stop.push(&decoded);
            self.append(&text)?;
        }
        let rest = self.stop.finish();
        self.append(&rest)?;
        Ok(match (self.stop.stopped(), self.ended) {
            (true, _) => FinishReason::Stop,
            (false, true) => FinishReason::Eos,
            (false, false) => FinishReason::Length,
        })
    }

    /// Appends text. Returns false if the reader of stdout has closed the pipe.
    fn append(&mut self, text: &str) -> Result<bool> {
        self.text.push_str(text);
        match self.stream {
            Some(ctx) if !text.is_empty() => ctx.write(text),
            _ => Ok(true),
        }
    }
}
