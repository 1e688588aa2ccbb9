//! The text of a sequence that is being generated, and why it ends.

use serde::Serialize;

use crate::error::Result;
use crate::infer::stop::StopStrings;
use crate::io::tokenizer::StreamDecoder;

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// A stop string.
    Stop,
    /// An end token of the model.
    Eos,
    /// The maximum number of tokens, or the last position of the model.
    Length,
}

/// Turns tokens into text up to a stop string or an end token, neither of which belongs to the text.
pub struct TextStream<'a> {
    decoder: StreamDecoder<'a>,
    stop: StopStrings,
    end_tokens: &'a [u32],
    at_end_token: bool,
}

impl<'a> TextStream<'a> {
    /// A text that ends at a string of `stop` or at one of `end_tokens`.
    pub fn new(decoder: StreamDecoder<'a>, stop: StopStrings, end_tokens: &'a [u32]) -> Self {
        Self { decoder, stop, end_tokens, at_end_token: false }
    }

    /// Adds a token. Returns the text that no later token can change, and whether the text goes on.
    ///
    /// # Errors
    /// As [`StreamDecoder::push`].
    pub fn push(&mut self, token: u32) -> Result<(String, bool)> {
        let mut text = String::new();
        if self.stop.has_special(token) {
            // What precedes the token is complete.
            let decoded = self.decoder.finish()?.unwrap_or_default();
            text = self.stop.push(&decoded) + &self.stop.push_special(token);
            if self.stop.stopped() {
                return Ok((text, false));
            }
        }
        if self.end_tokens.contains(&token) {
            self.at_end_token = true;
            return Ok((text, false));
        }
        let decoded = self.decoder.push(token)?.unwrap_or_default();
        text += &self.stop.push(&decoded);
        Ok((text, !self.stop.stopped()))
    }

    /// The text that was held back, an incomplete character or the start of a stop string, and why the text ended.
    ///
    /// # Errors
    /// As [`StreamDecoder::finish`].
    pub fn finish(&mut self) -> Result<(String, FinishReason)> {
        let decoded = self.decoder.finish()?.unwrap_or_default();
        let text = self.stop.push(&decoded) + &self.stop.finish();
        let reason = match (self.stop.stopped(), self.at_end_token) {
            (true, _) => FinishReason::Stop,
            (false, true) => FinishReason::Eos,
            (false, false) => FinishReason::Length,
        };
        Ok((text, reason))
    }
}
