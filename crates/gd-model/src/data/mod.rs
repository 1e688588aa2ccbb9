//! Training data: text files are tokenized into token streams, from which batches of windows are read.
//!
//! The split into training and validation is made on the text before it is tokenized, and each side is tokenized alone.
//! So neither a training window nor a vocabulary that is learned from [`Texts::train`] contains validation text.

mod documents;
mod map;
mod order;
mod pack;
#[cfg(feature = "parquet")]
mod parquet;
mod prepared;
mod records;
mod shard;
mod source;
mod summary;
mod text;
mod tokens;

pub use documents::{Document, Documents, encode_text, encode_turns};
pub use order::{Permutation, places};
pub use pack::{Batch, Batches};
pub use prepared::{INDEX, Index, Part, Preparation, Prepared, prepare};
pub use shard::{ShardEntry, TokenType};
pub use source::STDIN;
pub use summary::{ReadSummary, counted};
pub use text::{Text, Texts, is_jsonl, text_files};
pub use tokens::Tokens;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::io::tokenizer::Tokenizer;
use text::check_fraction;
use tokens::TokenCollector;

/// The size of the text that is tokenized in parallel at a time.
const CHUNK_BYTES: usize = 8 << 20;

/// The number of tokens that are hashed at a time.
const HASH_CHUNK_TOKENS: usize = 1 << 16;

/// Token streams for training and validation.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// Training tokens. Each text of [`Texts::train`] is a document.
    pub train: Tokens,
    /// Validation tokens; none in a training without validation.
    pub valid: Tokens,
    /// The size of the training text in bytes.
    pub train_bytes: usize,
    /// The size of the validation text in bytes, to which bits per byte refer.
    pub valid_bytes: usize,
}

impl Corpus {
    /// Tokenizes both sides, documents in parallel.
    ///
    /// # Errors
    /// An error of the tokenizer.
    pub fn encode(texts: &Texts, tokenizer: &Tokenizer) -> Result<Self> {
        let framing = tokenizer.framing()?;
        let encode = |documents: &[Text]| -> Result<Tokens> {
            Ok(encode(documents, tokenizer)?.with_framing(framing.clone()))
        };
        let bytes = |documents: &[Text]| documents.iter().map(|text| text.text.len()).sum();
        Ok(Self {
            train: encode(&texts.train)?,
            valid: encode(&texts.valid)?,
            train_bytes: bytes(&texts.train),
            valid_bytes: bytes(&texts.valid),
        })
    }

    /// The hash of both token streams and of the ends of their documents.
    pub fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for tokens in [&self.train, &self.valid] {
            hasher.update(&(tokens.len() as u64).to_le_bytes());
            for at in (0..tokens.len()).step_by(HASH_CHUNK_TOKENS) {
                let ids = tokens.read(at..at + HASH_CHUNK_TOKENS);
                hasher.update(&ids.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<_>>());
                for end in tokens.ends(at..at + HASH_CHUNK_TOKENS) {
                    hasher.update(&((at + end) as u64).to_le_bytes());
                }
                if let Some(learned) = tokens.learned(at..at + HASH_CHUNK_TOKENS) {
                    hasher.update(&learned.into_iter().map(u8::from).collect::<Vec<_>>());
                }
            }
        }
        hasher.finalize()
    }

    /// Checks that each side has at least one window of `context` inputs, and a token to predict. The validation text may
    /// be empty: then the training has no validation.
    ///
    /// # Errors
    /// [`Error::TooShort`], documents of one token each, or [`Error::OutOfRange`] for a context of 0.
    pub fn check(&self, context: usize) -> Result<()> {
        check("the training text", &self.train, context, "")?;
        if self.valid.is_empty() {
            return Ok(());
        }
        let advice =
            "; train.valid_fraction=0 trains without validation, and a smaller train.context needs less text";
        check("the validation text", &self.valid, context, advice)
    }
}

/// Tokenizes documents in parallel, with the tokens that are to be learned.
fn encode_marked(documents: &[Text], tokenizer: &Tokenizer) -> Result<Tokens> {
    let ids = documents.par_iter().map(|text| match &text.turns {
        Some(turns) => encode_turns(tokenizer, &text.text, turns),
        None => {
            let ids = encode_text(tokenizer, &text.text, text.is_chat)?;
            Ok(ids.into_iter().map(|id| (id, true)).collect())
        }
    });
    Ok(Tokens::with_learned(ids.collect::<Result<Vec<_>>>()?))
}

/// Tokenizes documents in parallel, some megabytes at a time, so that their ids of 32 bits are not in memory all at once. A
/// text of bytes is its own ids, so it can be divided; any other document is tokenized as a whole.
fn encode(documents: &[Text], tokenizer: &Tokenizer) -> Result<Tokens> {
    if documents.iter().any(|text| text.turns.is_some()) {
        return encode_marked(documents, tokenizer);
    }
    let bytes = |text: &Text| text.text.len();
    if tokenizer.is_bytes() {
        let mut collector = TokenCollector::with_capacity(documents.iter().map(bytes).sum());
        for document in documents {
            for part in document.text.as_bytes().chunks(CHUNK_BYTES) {
                collector.extend(&part.iter().map(|&b| u32::from(b)).collect::<Vec<_>>());
            }
            collector.end_document();
        }
        return Ok(collector.finish());
    }
    let mut collector = TokenCollector::with_capacity(0);
    let mut rest = documents;
    while !rest.is_empty() {
        let mut size = 0;
        let fits = |text: &&Text| {
            let starts = size < CHUNK_BYTES;
            size += bytes(text);
            starts
        };
        let (some, others) = rest.split_at(rest.iter().take_while(fits).count());
        let ids = some.par_iter().map(|text| encode_text(tokenizer, &text.text, text.is_chat));
        for document in ids.collect::<Result<Vec<_>>>()? {
            collector.extend(&document);
            collector.end_document();
        }
        rest = others;
    }
    Ok(collector.finish())
}

/// Checks that `tokens`, which errors call `what`, have at least one window of `context` inputs and a token to predict.
fn check(what: &'static str, tokens: &Tokens, context: usize, advice: &'static str) -> Result<()> {
    if context == 0 {
        return Err(Error::out_of_range("the context", 0, "at least 1"));
    }
    if tokens.len() <= context {
        return Err(Error::TooShort { what, tokens: tokens.len(), needed: context + 1, advice });
    }
    if tokens.len() == tokens.document_count() {
        return Err(Error::Invalid(format!(
            "{what} has no token to predict: every document has a single token"
        )));
    }
    let learned = |at: usize| tokens.learned(at..at + HASH_CHUNK_TOKENS);
    let is_learned = |at: usize| learned(at).is_none_or(|learned| learned.contains(&true));
    if !(0..tokens.len()).step_by(HASH_CHUNK_TOKENS).any(is_learned) {
        return Err(Error::Invalid(format!("{what} has no turn of an assistant to learn")));
    }
    Ok(())
}
