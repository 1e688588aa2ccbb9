//! Token shards: memory-mapped files of tokens and document boundaries.
//!
//! All numbers are little-endian.
//!
//! | bytes | content |
//! |---|---|
//! | 8 | `gdtokens` |
//! | 4 | version, 1 |
//! | 4 | bytes per token: 2 or 4 |
//! | 8 | T, the number of tokens |
//! | 8 | D, the number of documents |
//! | 8 D | the end of each document in tokens: ascending, the last one is T |
//! | 2 T or 4 T | the tokens |

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::map::map;
use crate::error::{Error, Result};

/// The first bytes of a shard.
const MAGIC: &[u8; 8] = b"gdtokens";
const VERSION: u32 = 1;
/// The size of the header.
const HEADER_BYTES: usize = 32;

/// The integer type of a stored token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenType {
    /// 2 bytes, for vocabularies of at most 65,536.
    U16,
    /// 4 bytes.
    U32,
}

impl TokenType {
    /// The narrowest type that holds all ids of a vocabulary of `vocab` tokens.
    pub fn for_vocab(vocab: usize) -> Self {
        if vocab <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// The entry of a shard in the index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// The file name.
    pub name: String,
    /// The number of tokens.
    pub tokens: u64,
    /// The number of documents.
    pub documents: u64,
    /// The blake3 hash of the file in hexadecimal.
    pub hash: String,
}

/// Writes a shard into `folder` and syncs it. `ends` are the ends of the documents in tokens.
///
/// # Errors
/// Names the file that cannot be written.
pub(super) fn write(
    folder: &Path,
    name: String,
    token_type: TokenType,
    ids: &[u32],
    ends: &[u64],
) -> Result<ShardEntry> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + 8 * ends.len() + token_type.bytes() * ids.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&(token_type.bytes() as u32).to_le_bytes());
    bytes.extend_from_slice(&(ids.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&(ends.len() as u64).to_le_bytes());
    bytes.extend(ends.iter().flat_map(|e| e.to_le_bytes()));
    match token_type {
        TokenType::U16 => bytes.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
        TokenType::U32 => bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
    }
    let path = folder.join(&name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().map_err(|e| Error::write(&path, e))?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    Ok(ShardEntry { name, tokens: ids.len() as u64, documents: ends.len() as u64, hash })
}

/// An open shard.
#[derive(Debug)]
pub(super) struct Shard {
    map: Mmap,
    token_type: TokenType,
    tokens: usize,
    documents: usize,
}

impl Shard {
    /// Opens a shard and checks its content against its entry in the index, and each token against the size `vocab` of the
    /// vocabulary.
    ///
    /// # Errors
    /// Names the file and the reason.
    pub(super) fn open(
        folder: &Path,
        entry: &ShardEntry,
        token_type: TokenType,
        vocab: usize,
    ) -> Result<Self> {
        let path = folder.join(&entry.name);
        let bad = |reason: String| Error::Foreign { path: path.clone(), kind: "token shard", reason };
        let map = map(&path)?;
        let actual = map.len() as u64;
        if map.len() < HEADER_BYTES {
            return Err(Error::Truncated { path, needed: HEADER_BYTES as u64, actual });
        }
        let (u32_at, u64_at) = (|at| u64::from(u32_at(&map, at)), |at| u64_at(&map, at));
        if &map[..8] != MAGIC {
            return Err(bad("it does not start with gdtokens".into()));
        }
        if u32_at(8) != u64::from(VERSION) {
            return Err(bad(format!("version {}; this program reads {VERSION}", u32_at(8))));
        }
        if u32_at(12) != token_type.bytes() as u64 {
            return Err(bad(format!(
                "{} bytes per token, the index says {}",
                u32_at(12),
                token_type.bytes()
            )));
        }
        let (tokens, documents) = (u64_at(16), u64_at(24));
        if (tokens, documents) != (entry.tokens, entry.documents) {
            return Err(bad(format!(
                "{tokens} tokens in {documents} documents, the index says {} in {}",
                entry.tokens, entry.documents
            )));
        }
        let size = || -> Option<u64> {
            let ids = tokens.checked_mul(token_type.bytes() as u64)?;
            documents.checked_mul(8)?.checked_add(ids)?.checked_add(HEADER_BYTES as u64)
        };
        let needed = size().ok_or_else(|| bad(format!("{tokens} tokens fit no file")))?;
        if actual < needed {
            return Err(Error::Truncated { path, needed, actual });
        }
        if actual > needed {
            return Err(bad(format!("{} bytes follow the last token", actual - needed)));
        }
        if blake3::hash(&map).to_hex().as_str() != entry.hash {
            return Err(bad("its content has changed: the checksum differs from the index".into()));
        }
        // The sizes are below that of the file, so they fit into usize.
        let shard = Self { token_type, tokens: tokens as usize, documents: documents as usize, map };
        shard.check(vocab).map_err(bad)?;
        Ok(shard)
    }

    /// Checks the content of a file whose checksum is right but that was written with invalid values.
    fn check(&self, vocab: usize) -> std::result::Result<(), String> {
        let mut last_end = 0;
        for d in 0..self.documents {
            let end = self.end(d);
            if end <= last_end || end > self.tokens {
                return Err(format!(
                    "document {d} ends at token {end}; above {last_end} and at most {} expected",
                    self.tokens
                ));
            }
            last_end = end;
        }
        if last_end != self.tokens {
            return Err(format!("the last document ends at token {last_end} of {}", self.tokens));
        }
        let max_id = self.ids(0..self.tokens).max().unwrap_or(0);
        if max_id as usize >= vocab {
            return Err(format!("token {max_id} is not in the vocabulary of {vocab}"));
        }
        Ok(())
    }

    /// The number of tokens.
    pub(super) fn len(&self) -> usize {
        self.tokens
    }

    /// The number of documents.
    pub(super) fn documents(&self) -> usize {
        self.documents
    }

    /// The end of document `d` in tokens.
    pub(super) fn end(&self, d: usize) -> usize {
        u64_at(&self.map, HEADER_BYTES + 8 * d) as usize
    }

    /// The tokens of `range`.
    pub(super) fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> {
        let (first, width) = (HEADER_BYTES + 8 * self.documents, self.token_type.bytes());
        let bytes = &self.map[first + width * range.start..first + width * range.end];
        bytes.chunks_exact(width).map(|b| b.iter().rev().fold(0, |id, &byte| id << 8 | u32::from(byte)))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}
