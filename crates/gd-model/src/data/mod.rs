//! Text files to token streams, and token streams to batches of windows.
//!
//! The split into training and validation happens on the text, before any token is made, and each side is
//! tokenised alone: no training window, and no vocabulary learned from [`Texts::train`], ever sees a
//! validation character.

mod documents;
mod map;
mod order;
mod pack;
mod prepared;
mod shard;
mod text;
mod tokens;

pub use documents::{Document, Documents};
pub use order::{Permutation, places};
pub use pack::{Batch, Batches};
pub use prepared::{INDEX, Index, Part, Preparation, Prepared, prepare};
pub use shard::{ShardEntry, TokenType};
pub use text::{Texts, is_jsonl, text_files};
pub use tokens::Tokens;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::io::tokenizer::Tokenizer;
use text::check_fraction;

/// Tokens that are hashed at a time.
const HASHED: usize = 1 << 16;

/// Token streams for training and validation.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Training tokens; the pieces of [`Texts::train`] are its documents.
    pub train: Tokens,
    /// Validation tokens.
    pub valid: Tokens,
    /// Bytes of training text.
    pub train_bytes: usize,
    /// Bytes of validation text: nats per token × tokens / bytes / ln 2 is bits per byte.
    pub valid_bytes: usize,
}

impl Corpus {
    /// Tokenises both sides.
    pub fn encode(texts: &Texts, tokenizer: &Tokenizer) -> Result<Self> {
        let encode = |documents: &[String]| -> Result<Tokens> {
            let documents = documents.par_iter().map(|text| tokenizer.encode_document(text));
            Ok(Tokens::documents(documents.collect::<Result<Vec<_>>>()?))
        };
        Ok(Self {
            train: encode(&texts.train)?,
            valid: encode(&texts.valid)?,
            train_bytes: texts.train.iter().map(String::len).sum(),
            valid_bytes: texts.valid.iter().map(String::len).sum(),
        })
    }

    /// A hash of both token streams and of where their documents end.
    pub fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for tokens in [&self.train, &self.valid] {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            for at in (0..tokens.len()).step_by(HASHED) {
                let ids = tokens.read(at..at + HASHED);
                hasher.update(&ids.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>());
                for end in tokens.ends(at..at + HASHED) {
                    hasher.update(&((at + end) as u64).to_le_bytes());
                }
            }
        }
        hasher.finalize()
    }

    /// Fails unless both sides have at least one window of `context` inputs.
    pub fn check(&self, context: usize) -> Result<()> {
        check("the training text", &self.train, context)?;
        check("the validation text", &self.valid, context)
    }
}

fn check(what: &'static str, tokens: &Tokens, context: usize) -> Result<()> {
    if context == 0 {
        return Err(Error::out_of_range("the context", 0, "at least 1"));
    }
    if tokens.len() <= context {
        return Err(Error::TooShort { what, tokens: tokens.len(), needed: context + 1 });
    }
    Ok(())
}
