//! The special tokens of a GGUF file: those that keys name, and end tokens that the vocabulary has.

use std::path::Path;

use super::header::Header;

type Result<T> = std::result::Result<T, String>;

/// Tokens that end a text or a turn of a chat if the vocabulary has them as control or user-defined tokens, whether a key
/// names them or not. They are from llama.cpp's list; most of them belong to formats of chats, and no key names them.
const END_NAMES: [&str; 14] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<end_of_utterance>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// The ids of special tokens.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// The token before a text.
    pub(super) begin: Option<usize>,
    /// The token after a text.
    pub(super) end: Option<usize>,
    /// The token of characters that the vocabulary lacks.
    pub(super) unknown: Option<usize>,
    /// All tokens that end a text or a turn of a chat: first those that keys name.
    pub(super) ends: Vec<usize>,
}

impl SpecialTokens {
    /// Reads the keys `tokenizer.ggml.*_token_id`. An id that is no token is passed over with a warning that names `path`.
    /// `defaults` are the names of the first tokens of a SentencePiece vocabulary, which need no keys. `may_end` tells which
    /// tokens end a text if they have one of the names for it.
    ///
    /// # Errors
    /// A value that is no number.
    pub(super) fn read(
        path: &Path,
        header: &Header,
        tokens: &[String],
        defaults: &[&str],
        may_end: impl Fn(usize) -> bool,
    ) -> Result<Self> {
        let named = |kind: &str, default: Option<usize>| -> Result<Option<usize>> {
            let key = format!("tokenizer.ggml.{kind}_token_id");
            let is_named = |id: &usize| {
                defaults.get(*id).is_some_and(|name| tokens.get(*id).is_some_and(|token| token == name))
            };
            let default = default.filter(is_named);
            Ok(match header.index(&key, tokens.len())? {
                None => default,
                Some(Ok(id)) => Some(id),
                Some(Err(number)) => {
                    let (at, count) = (path.display(), tokens.len());
                    tracing::warn!(
                        "{at}: key {key} is {number}, which is none of the {count} tokens; it is ignored"
                    );
                    default
                }
            })
        };
        let (unknown, begin, end) =
            (named("unknown", Some(0))?, named("bos", Some(1))?, named("eos", Some(2))?);
        let mut ends: Vec<usize> = Vec::new();
        let by_name =
            (0..tokens.len()).filter(|id| may_end(*id) && END_NAMES.contains(&tokens[*id].as_str()));
        for id in [end, named("eot", None)?, named("eom", None)?].into_iter().flatten().chain(by_name) {
            if !ends.contains(&id) {
                ends.push(id);
            }
        }
        Ok(Self { begin, end, unknown, ends })
    }
}
