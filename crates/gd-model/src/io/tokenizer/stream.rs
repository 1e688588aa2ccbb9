//! Decoding of ids that arrive one at a time.

use super::Tokenizer;
use crate::error::Result;

/// Decodes a stream of ids into chunks of text. The chunks, including that of [`StreamDecoder::finish`], together are the
/// text that [`Tokenizer::decode`] gives for all ids, or what follows the text of the prompt in it.
///
/// A chunk is returned when later ids cannot change it: an incomplete character is held back, and so are the bytes of a
/// tokenizer with byte fallback (`<0xE2>`) until another token follows, because one broken byte breaks all bytes beside it.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    state: State,
}

enum State {
    /// Of a bytewise tokenizer.
    Bytes {
        /// The start of an incomplete character.
        incomplete: Vec<u8>,
        /// Whether this start belongs to the prompt, in whose text it is a U+FFFD.
        of_prompt: bool,
    },
    /// Of any other tokenizer: the last ids that have a text, decoded together because the text of a token may depend on
    /// its neighbours.
    Window {
        ids: Vec<u32>,
        /// The text of the ids as far as it was returned or belongs to the prompt.
        returned: String,
    },
}

/// The number of preceding ids that are decoded together with a new one if the text of a token depends on its neighbours.
const CONTEXT_TOKENS: usize = 16;

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        let state = match tokenizer.bytewise {
            true => State::Bytes { incomplete: Vec::new(), of_prompt: false },
            false => State::Window { ids: Vec::new(), returned: String::new() },
        };
        Self { tokenizer, state }
    }

    pub(super) fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<Self> {
        if tokenizer.bytewise {
            let mut incomplete = prompt.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
            whole_characters(&mut incomplete);
            let of_prompt = !incomplete.is_empty();
            return Ok(Self { tokenizer, state: State::Bytes { incomplete, of_prompt } });
        }
        let mut ids = prompt.to_vec();
        ids.retain(|&id| tokenizer.text_token(id).is_some());
        let mut start = ids.len().saturating_sub(CONTEXT_TOKENS);
        loop {
            // The bytes of a run are decoded together.
            while start > 0 && tokenizer.is_fallback_byte(ids[start - 1]) {
                start -= 1;
            }
            let returned = tokenizer.decode(&ids[start..])?;
            if start == 0 || !returned.is_empty() {
                ids.drain(..start);
                return Ok(Self { tokenizer, state: State::Window { ids, returned } });
            }
            start = start.saturating_sub(CONTEXT_TOKENS);
        }
    }

    /// Adds an id. Returns the text that is complete now; `None` if there is none.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        match &mut self.state {
            State::Bytes { incomplete, .. } => {
                incomplete.extend(self.tokenizer.token_bytes(id));
                let text = whole_characters(incomplete);
                Ok(self.without_replacement_of_prompt(text))
            }
            State::Window { .. } if self.tokenizer.text_token(id).is_none() => Ok(None),
            State::Window { ids, .. } => {
                ids.push(id);
                if self.tokenizer.is_fallback_byte(id) {
                    return Ok(None);
                }
                let text = self.tokenizer.decode(ids)?;
                // This may be an incomplete character.
                if text.ends_with(char::REPLACEMENT_CHARACTER) {
                    return Ok(None);
                }
                self.advance(text)
            }
        }
    }

    /// The rest of the text at the end of the stream, or before a token that does not belong to the text; `None` if there is
    /// none. An incomplete character becomes U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<Option<String>> {
        match &mut self.state {
            State::Bytes { incomplete, .. } => {
                let text = String::from_utf8_lossy(&std::mem::take(incomplete)).into_owned();
                Ok(self.without_replacement_of_prompt(text))
            }
            State::Window { ids, .. } => {
                let text = self.tokenizer.decode(ids)?;
                self.advance(text)
            }
        }
    }

    /// The text without the U+FFFD that an incomplete character at the end of the prompt is in the text of the prompt.
    fn without_replacement_of_prompt(&mut self, text: String) -> Option<String> {
        let State::Bytes { of_prompt, .. } = &mut self.state else { return Some(text) };
        let rest = match !text.is_empty() && std::mem::take(of_prompt) {
            true => text.strip_prefix(char::REPLACEMENT_CHARACTER).unwrap_or(&text),
            false => &text,
        };
        (!rest.is_empty()).then(|| rest.to_owned())
    }

    /// Returns what is new in `text`, that of the window, and shortens the window.
    fn advance(&mut self, text: String) -> Result<Option<String>> {
        let State::Window { ids, returned } = &mut self.state else { return Ok(None) };
        let common = text.chars().zip(returned.chars()).take_while(|(a, b)| a == b);
        let new = text[common.map(|(c, _)| c.len_utf8()).sum()..].to_owned();
        *returned = text;
        if ids.len() >= 2 * CONTEXT_TOKENS {
            let context = &ids[ids.len() - CONTEXT_TOKENS..];
            let text = self.tokenizer.decode(context)?;
            // At the start of a text, decoders may remove a space: the window must not seem to be one.
            if !text.is_empty() {
                *ids = context.to_vec();
                *returned = text;
            }
        }
        Ok((!new.is_empty()).then_some(new))
    }
}

impl Tokenizer {
    /// Whether a token has the name of a byte in a vocabulary with byte fallback, such as `<0xE2>`.
    fn is_fallback_byte(&self, id: u32) -> bool {
        let token = self.inner.id_to_token(id).unwrap_or_default();
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        digits.is_some_and(|digits| digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
    }
}

/// Removes the complete characters from `bytes` and returns them.
fn whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut used = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        // An incomplete sequence at the end may be completed by the next token.
        let rest = &bytes[used..];
        if rest.is_empty()
            || std::str::from_utf8(rest).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
        {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        used += chunk.invalid().len();
    }
    bytes.drain(..used);
    text
}
