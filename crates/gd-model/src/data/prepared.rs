//! Prepared data: a folder of token shards, their tokenizer, and an index of both.
//!
//! | file | content |
//! |---|---|
//! | `index.json` | sizes and checksums of everything, and a checksum of itself |
//! | `tokenizer.json` | the tokenizer |
//! | `train-00000.tokens` .. | the training part |
//! | `valid-00000.tokens` .. | the validation part |

use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::documents::{Document, Documents};
use super::shard::{self, Shard, ShardEntry, TokenType};
use super::{Corpus, Tokens, check_fraction};
use crate::config::DocumentFormat;
use crate::error::{Error, Result};
use crate::io::checkpoint::{TOKENIZER, check_replaceable, write_folder};
use crate::io::files::write_file;
use crate::io::tokenizer::Tokenizer;

/// The index of a prepared folder.
pub const INDEX: &str = "index.json";

const VERSION: u32 = 1;

/// Text that is tokenised at a time, in bytes: enough for every thread.
const TOGETHER: usize = 8 << 20;

/// One part of the data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Tokens in all shards.
    pub tokens: u64,
    /// Documents in all shards.
    pub documents: u64,
    /// Bytes of text that they stand for.
    pub bytes: u64,
    /// The files.
    pub shards: Vec<ShardEntry>,
}

/// What a prepared folder holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// Of this format: 1.
    pub version: u32,
    /// blake3 of `tokenizer.json`, in hexadecimal.
    pub tokenizer: String,
    /// Its tokens.
    pub vocab_size: usize,
    /// How tokens are stored.
    pub token_type: TokenType,
    /// For training.
    pub train: Part,
    /// For validation.
    pub valid: Part,
}

/// `index.json`: the index and the blake3 of its compact JSON.
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

/// What is to be prepared.
#[derive(Clone, Debug)]
pub struct Preparation<'a> {
    /// Text files, JSONL files and folders.
    pub paths: &'a [PathBuf],
    /// How they become documents.
    pub format: &'a DocumentFormat,
    /// How documents become tokens.
    pub tokenizer: &'a Tokenizer,
    /// A shard is closed after the document with which it has this many tokens.
    pub shard_tokens: usize,
    /// The share for validation, in (0, 1); see [`Document::split`].
    pub valid_fraction: f64,
}

/// The open shard of one part and what has been written of it.
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

/// Tokenises documents in parallel and writes them as a new folder. In memory at any time are some
/// megabytes of text or the longest document, and one open shard of either part. `progress` gets the bytes
/// of text files that were read and tokenised since the last call.
///
/// # Errors
/// Text that cannot be read, lines that are no documents, no text on one side, or a folder that exists or
/// cannot be written; nothing is left behind then.
pub fn prepare(folder: &Path, what: &Preparation, mut progress: impl FnMut(u64)) -> Result<Index> {
    check_fraction(what.valid_fraction)?;
    if what.shard_tokens == 0 {
        return Err(Error::out_of_range("the tokens of a shard", 0, "at least 1"));
    }
    check_replaceable(folder)?;
    let documents = Documents::open(what.paths, what.format)?;
    let vocab_size = what.tokenizer.vocab_size();
    let token_type = TokenType::for_vocab(vocab_size);
    let json = what.tokenizer.to_json()?;
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
            shard_tokens: what.shard_tokens,
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
            if size >= TOGETHER {
                progress(write_documents(what, &waiting, &mut train, &mut valid)?);
                waiting.clear();
                size = 0;
            }
        }
        progress(write_documents(what, &waiting, &mut train, &mut valid)?);
        (index.train, index.valid) = (train.finish()?, valid.finish()?);
        for (part, name) in [(&index.train, "training"), (&index.valid, "validation")] {
            if part.tokens == 0 {
                return Err(Error::Invalid(format!(
                    "no text is left for the {name} part with a validation share of {}",
                    what.valid_fraction
                )));
            }
        }
        write_file(&new.join(TOKENIZER), json.as_bytes())?;
        let sealed = Sealed { hash: hash(&index)?, index: index.clone() };
        let text =
            serde_json::to_string_pretty(&sealed).map_err(|e| Error::Invalid(format!("{INDEX}: {e}")))?;
        // Without a line end, so that a cut never leaves it whole.
        write_file(&new.join(INDEX), text.as_bytes())
    })?;
    Ok(index)
}

/// Tokenises documents in parallel and writes them in order; returns the bytes of their files.
fn write_documents(
    what: &Preparation,
    documents: &[Document],
    train: &mut Writer,
    valid: &mut Writer,
) -> Result<u64> {
    let sides = |document: &Document| {
        let (t, v) = document.split(what.valid_fraction);
        Ok([(what.tokenizer.encode_document(t)?, t.len()), (what.tokenizer.encode_document(v)?, v.len())])
    };
    for [(t, t_bytes), (v, v_bytes)] in documents.par_iter().map(sides).collect::<Result<Vec<_>>>()? {
        train.push(&t, t_bytes)?;
        valid.push(&v, v_bytes)?;
    }
    Ok(documents.iter().map(|d| d.bytes).sum())
}

/// Prepared data, open.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// What the folder says it holds.
    pub index: Index,
    /// Its tokens, mapped into memory.
    pub corpus: Corpus,
    /// What they were made with.
    pub tokenizer: Tokenizer,
}

impl Prepared {
    /// Whether there is prepared data at `path`.
    pub fn is_at(path: &Path) -> bool {
        path.join(INDEX).is_file()
    }

    /// Opens a folder and checks all that it holds against its checksums.
    ///
    /// # Errors
    /// Names the file that is missing or damaged.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX);
        let bad = |path: &Path, kind, reason| Error::Foreign { path: path.into(), kind, reason };
        let bytes = fs::read(&path).map_err(|e| Error::read(&path, "index of prepared data", e))?;
        let Sealed { index, hash: announced } =
            serde_json::from_slice(&bytes).map_err(|e| bad(&path, "data index", e.to_string()))?;
        if index.version != VERSION {
            let reason = format!("version {}; this program reads {VERSION}", index.version);
            return Err(bad(&path, "data index", reason));
        }
        if hash(&index)? != announced {
            return Err(bad(&path, "data index", "its content does not have its checksum".into()));
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
                return Err(bad(&path, "data index", "a part is not the sum of its shards".into()));
            }
            Ok(tokens)
        };
        let corpus = Corpus {
            train: open(&index.train)?,
            valid: open(&index.valid)?,
            train_bytes: index.train.bytes as usize,
            valid_bytes: index.valid.bytes as usize,
        };
        let file = folder.join(TOKENIZER);
        let bytes = fs::read(&file).map_err(|e| Error::read(&file, "tokenizer file", e))?;
        if blake3::hash(&bytes).to_hex().as_str() != index.tokenizer {
            return Err(bad(&file, "tokenizer.json", "its checksum differs from the index".into()));
        }
        let tokenizer = Tokenizer::load(&file)?;
        if tokenizer.vocab_size() != index.vocab_size {
            let reason = format!("{} tokens, the index says {}", tokenizer.vocab_size(), index.vocab_size);
            return Err(bad(&file, "tokenizer.json", reason));
        }
        Ok(Self { index, corpus, tokenizer })
    }
}
