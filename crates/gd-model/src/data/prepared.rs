//! Prepared data: a folder of token shards with their tokenizer and an index.
//!
//! | file | content |
//! |---|---|
//! | `index.json` | sizes and checksums of the other files, and a checksum of itself |
//! | `tokenizer.json` | the tokenizer |
//! | `train-00000.tokens` .. | the training part |
//! | `valid-00000.tokens` .. | the validation part |

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::documents::{Document, Documents, encode_text};
use super::shard::{self, Shard, ShardEntry, TokenType};
use super::text::without_validation;
use super::{CHUNK_BYTES, Corpus, Tokens, check_fraction};
use crate::error::{Error, Result};
use crate::io::checkpoint::{TOKENIZER, check_replaceable, write_folder};
use crate::io::files::{read_file, write_file};
use crate::io::tokenizer::Tokenizer;

/// The file name of the index.
pub const INDEX: &str = "index.json";

/// The version of the format of the index.
const VERSION: u32 = 1;

/// The training part or the validation part.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// The number of tokens in all shards.
    pub tokens: u64,
    /// The number of documents in all shards.
    pub documents: u64,
    /// The size of their text in bytes.
    pub bytes: u64,
    /// The shards.
    pub shards: Vec<ShardEntry>,
}

/// The index of a folder of prepared data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// The version of the format: 1.
    pub version: u32,
    /// The blake3 hash of `tokenizer.json` in hexadecimal.
    pub tokenizer: String,
    /// The size of the vocabulary.
    pub vocab_size: usize,
    /// The integer type of the stored tokens.
    pub token_type: TokenType,
    /// The training part.
    pub train: Part,
    /// The validation part.
    pub valid: Part,
}

/// The content of `index.json`: the index and the blake3 hash of its compact JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    index: Index,
    hash: String,
}

fn hash(index: &Index) -> Result<String> {
    let bytes = serde_json::to_vec(index).map_err(|e| Error::Invalid(format!("{INDEX}: {e}")))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// The settings of [`prepare`].
#[derive(Clone, Debug)]
pub struct Preparation<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The number of tokens after which a shard ends, at the end of a document.
    pub shard_tokens: usize,
    /// The fraction of the text for validation, in [0, 1); see [`Document::split`].
    pub valid_fraction: f64,
}

/// Writes the shards of one part.
struct Writer<'a> {
    folder: &'a Path,
    name: &'static str,
    token_type: TokenType,
    shard_tokens: usize,
    ids: Vec<u32>,
    ends: Vec<u64>,
    part: Part,
}

impl Writer<'_> {
    fn push(&mut self, ids: &[u32], bytes: usize) -> Result<()> {
        self.part.bytes += bytes as u64;
        if ids.is_empty() {
            return Ok(());
        }
        self.ids.extend_from_slice(ids);
        self.ends.push(self.ids.len() as u64);
        if self.ids.len() >= self.shard_tokens { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        let name = format!("{}-{:05}.tokens", self.name, self.part.shards.len());
        let entry = shard::write(self.folder, name, self.token_type, &self.ids, &self.ends)?;
        self.part.tokens += entry.tokens;
        self.part.documents += entry.documents;
        self.part.shards.push(entry);
        self.ids.clear();
        self.ends.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<Part> {
        if self.part.shards.is_empty() || !self.ids.is_empty() {
            self.close()?;
        }
        Ok(self.part)
    }
}

/// Tokenizes documents in parallel and writes them into a new folder. The memory holds at most a few megabytes of text or
/// the longest document, and one shard of each part. `progress` is called with the number of bytes of text files that were
/// read and tokenized since the last call.
///
/// If no document falls to the validation part, it is empty, and a warning says so.
///
/// # Errors
/// Text that cannot be read, bad lines, no text for training, or a folder that exists or cannot be written. No files are
/// left behind then.
pub fn prepare(
    folder: &Path,
    documents: &mut Documents,
    preparation: &Preparation,
    mut progress: impl FnMut(u64),
) -> Result<Index> {
    check_fraction(preparation.valid_fraction)?;
    if preparation.shard_tokens == 0 {
        return Err(Error::out_of_range("the tokens of a shard", 0, "at least 1"));
    }
    check_replaceable(folder)?;
    let vocab_size = preparation.tokenizer.vocab_size();
    let token_type = TokenType::for_vocab(vocab_size);
    let json = preparation.tokenizer.to_json()?;
    let mut index = Index {
        version: VERSION,
        tokenizer: blake3::hash(json.as_bytes()).to_hex().to_string(),
        vocab_size,
        token_type,
        train: Part::default(),
        valid: Part::default(),
    };
    write_folder(folder, |new| {
        let writer = |name| Writer {
            folder: new,
            name,
            token_type,
            shard_tokens: preparation.shard_tokens,
            ids: Vec::new(),
            ends: Vec::new(),
            part: Part::default(),
        };
        let (mut train, mut valid) = (writer("train"), writer("valid"));
        let (mut waiting, mut size) = (Vec::new(), 0);
        for document in documents {
            let document = document?;
            size += document.text.len();
            waiting.push(document);
            if size >= CHUNK_BYTES {
                progress(write_documents(preparation, &waiting, &mut train, &mut valid)?);
                waiting.clear();
                size = 0;
            }
        }
        progress(write_documents(preparation, &waiting, &mut train, &mut valid)?);
        (index.train, index.valid) = (train.finish()?, valid.finish()?);
        let Preparation { valid_fraction, .. } = *preparation;
        if index.train.tokens == 0 {
            return Err(Error::Invalid(format!(
                "no text is left for the training part with a validation fraction of {valid_fraction}; with 0 all text \
                 is for training"
            )));
        }
        if index.valid.tokens == 0 && valid_fraction > 0.0 {
            tracing::warn!("{}", without_validation(index.train.documents as usize, valid_fraction));
        }
        write_file(&new.join(TOKENIZER), json.as_bytes())?;
        let sealed = Sealed { hash: hash(&index)?, index: index.clone() };
        let text =
            serde_json::to_string_pretty(&sealed).map_err(|e| Error::Invalid(format!("{INDEX}: {e}")))?;
        // Without a line break at the end, so that a truncated file is never valid.
        write_file(&new.join(INDEX), text.as_bytes())
    })?;
    Ok(index)
}

/// Tokenizes documents in parallel and writes them in their order. Returns the number of bytes that were read for them.
fn write_documents(
    preparation: &Preparation,
    documents: &[Document],
    train: &mut Writer,
    valid: &mut Writer,
) -> Result<u64> {
    let sides = |document: &Document| {
        let (t, v) = document.split(preparation.valid_fraction);
        Ok([
            (encode_text(preparation.tokenizer, t, document.is_chat)?, t.len()),
            (encode_text(preparation.tokenizer, v, document.is_chat)?, v.len()),
        ])
    };
    for [(t, t_bytes), (v, v_bytes)] in documents.par_iter().map(sides).collect::<Result<Vec<_>>>()? {
        train.push(&t, t_bytes)?;
        valid.push(&v, v_bytes)?;
    }
    Ok(documents.iter().map(|d| d.bytes).sum())
}

/// An open folder of prepared data.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The index.
    pub index: Index,
    /// The tokens, mapped into memory.
    pub corpus: Corpus,
    /// The tokenizer that the tokens were made with.
    pub tokenizer: Tokenizer,
}

impl Prepared {
    /// Whether `path` is a folder of prepared data.
    pub fn is_at(path: &Path) -> bool {
        path.join(INDEX).is_file()
    }

    /// Opens a folder and checks its files against their checksums.
    ///
    /// # Errors
    /// Names the file that is missing or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX);
        let bad = |path: &Path, kind, reason| Error::Foreign { path: path.into(), kind, reason };
        let bytes = read_file(&path, "index of prepared data")?;
        let Sealed { index, hash: stored_hash } =
            serde_json::from_slice(&bytes).map_err(|e| bad(&path, "data index", e.to_string()))?;
        if index.version != VERSION {
            let reason = format!("version {}; this program reads {VERSION}", index.version);
            return Err(bad(&path, "data index", reason));
        }
        if hash(&index)? != stored_hash {
            return Err(bad(&path, "data index", "its checksum differs from its content".into()));
        }
        let open = |part: &Part| -> Result<Tokens> {
            if let Some(entry) =
                part.shards.iter().find(|s| Path::new(&s.name).file_name() != Some(s.name.as_ref()))
            {
                return Err(Error::ShardName { path: path.clone(), name: entry.name.clone() });
            }
            let shards = part.shards.par_iter();
            let shards = shards.map(|entry| Shard::open(folder, entry, index.token_type, index.vocab_size));
            let tokens = Tokens::shards(shards.collect::<Result<Vec<_>>>()?);
            if tokens.len() as u64 != part.tokens || tokens.document_count() as u64 != part.documents {
                return Err(bad(
                    &path,
                    "data index",
                    "the size of a part is not the sum of those of its shards".into(),
                ));
            }
            Ok(tokens)
        };
        let (train, valid) = (open(&index.train)?, open(&index.valid)?);
        let file = folder.join(TOKENIZER);
        let bytes = read_file(&file, "tokenizer file")?;
        if blake3::hash(&bytes).to_hex().as_str() != index.tokenizer {
            return Err(bad(&file, "tokenizer.json", "its checksum differs from the index".into()));
        }
        let tokenizer = Tokenizer::load(&file)?;
        if tokenizer.vocab_size() != index.vocab_size {
            let reason = format!("{} tokens, the index says {}", tokenizer.vocab_size(), index.vocab_size);
            return Err(bad(&file, "tokenizer.json", reason));
        }
        let framing = tokenizer.framing()?;
        let corpus = Corpus {
            train: train.with_framing(framing.clone()),
            valid: valid.with_framing(framing),
            train_bytes: index.train.bytes as usize,
            valid_bytes: index.valid.bytes as usize,
        };
        Ok(Self { index, corpus, tokenizer })
    }
}
