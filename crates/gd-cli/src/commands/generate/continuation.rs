//! The continuation of one prompt, token by token.

use anyhow::Result;
use gd_model::infer::stop::StopStrings;
use gd_model::io::tokenizer::StreamDecoder;

use crate::context::Context;

/// A continuation that is being generated.
pub(super) struct Continuation<'a> {
    /// The prompt.
    pub(super) prompt: &'a str,
    /// The text so far.
    pub(super) text: String,
    /// Number of generated tokens.
    pub(super) tokens: usize,
    decoder: StreamDecoder<'a>,
    stop: StopStrings,
    /// Where the text is written while it is generated, if it is.
    stream: Option<&'a Context>,
}

impl<'a> Continuation<'a> {
    pub(super) fn new(
        prompt: &'a str,
        decoder: StreamDecoder<'a>,
        stop: StopStrings,
        stream: Option<&'a Context>,
    ) -> Self {
        Self { prompt, text: String::new(), tokens: 0, decoder, stop, stream }
    }

    /// Adds a token. Returns whether the generation continues.
    pub(super) fn push(&mut self, token: u32) -> Result<bool> {
        let decoded = self.decoder.push(token)?.unwrap_or_default();
        let text = self.stop.push(&decoded);
        Ok(self.append(&text)? && !self.stop.stopped())
    }

    /// Adds the text that was held back: an incomplete character, or the start of a stop string. Returns whether a
    /// stop string ended the text.
    pub(super) fn finish(&mut self) -> Result<bool> {
        if let Some(decoded) = self.decoder.finish()? {
            let text = self.stop.push(&decoded);
            self.append(&text)?;
        }
        let rest = self.stop.finish();
        self.append(&rest)?;
        Ok(self.stop.stopped())
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
