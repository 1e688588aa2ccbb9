//! The file format of traces. Integers are little-endian.
//!
//! | bytes | content |
//! |---|---|
//! | `GDTRACE1` | magic number |
//! | u32 n, n bytes | the header as JSON |
//! | blocks of u32 raw, u32 stored, stored bytes | zstd frame of `raw` bytes of records, each a u32 length and its bytes |
//! | u32 0 | end of the blocks |
//! | u64 count, chain, root, head | the hashes of [`Seal`], 32 bytes each |
//! | u8 0, or u8 1, key, signature | no signature, or Ed25519 over the head: 32 bytes public key, 64 bytes signature |
//! | 32 bytes | BLAKE3 of all preceding bytes |
//!
//! The last hash detects damage to the file. The hashes of [`Seal`] depend on the header and the records only, not on their
//! compression.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

#[cfg(feature = "sign")]
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use super::chain::{Chain, Hash, Seal};
use super::header::Header;
use super::record::Record;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"GDTRACE1";

/// The size from which on a block of records is compressed and written.
const BLOCK_BYTES: usize = 1 << 18;

/// The maximal size of a block before compression; larger ones are refused as damaged. A block exceeds [`BLOCK_BYTES`] by
/// less than one record, which has at most 255 candidates per head.
const MAX_BLOCK_BYTES: usize = 1 << 26;

/// The compression level of zstd.
const COMPRESSION_LEVEL: i32 = 1;

/// Writes a trace record by record.
pub struct Writer<'a> {
    path: PathBuf,
    out: &'a mut dyn Write,
    /// The hash of all bytes written so far.
    file_hash: blake3::Hasher,
    chain: Chain,
    block: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Writes the header of a trace to `out`. `path` is used in error messages only.
    ///
    /// # Errors
    /// [`Error::Unwritable`] with the path and the system's reason.
    pub fn new(path: &Path, out: &'a mut dyn Write, header: &Header) -> Result<Self> {
        let text = serde_json::to_vec(header)
            .map_err(|e| Error::Invalid(format!("the header cannot be written as JSON: {e}")))?;
        let chain = Chain::new(&text);
        let mut writer =
            Self { path: path.into(), out, file_hash: blake3::Hasher::new(), chain, block: Vec::new() };
        writer.put(MAGIC)?;
        writer.put(&length(text.len())?)?;
        writer.put(&text)?;
        Ok(writer)
    }

    /// Appends a record.
    ///
    /// # Errors
    /// As [`Record::encode`], or [`Error::Unwritable`].
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let at = self.block.len();
        self.block.extend([0; 4]);
        record.encode(&mut self.block)?;
        let bytes = &self.block[at + 4..];
        self.chain.push(bytes);
        let size = length(bytes.len())?;
        self.block[at..at + 4].copy_from_slice(&size);
        if self.block.len() >= BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes the end of the trace without a signature, and returns its hashes.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn finish(mut self) -> Result<Seal> {
        self.flush()?;
        let seal = self.chain.seal();
        self.end(&seal, &[0])?;
        Ok(seal)
    }

    /// Writes the end of the trace with the Ed25519 signature of its head by `key`, and returns its hashes.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    #[cfg(feature = "sign")]
    pub fn finish_signed(mut self, key: &SigningKey) -> Result<Seal> {
        self.flush()?;
        let seal = self.chain.seal();
        let mut signature = vec![1];
        signature.extend(key.verifying_key().as_bytes());
        signature.extend(key.sign(&seal.head).to_bytes());
        self.end(&seal, &signature)?;
        Ok(seal)
    }

    /// Writes the end of the file: end of the blocks, count and hashes, `signature` with its leading kind, hash of the file.
    fn end(&mut self, seal: &Seal, signature: &[u8]) -> Result<()> {
        let mut end = length(0)?.to_vec();
        end.extend(seal.count.to_le_bytes());
        for part in [seal.chain, seal.root, seal.head] {
            end.extend(part);
        }
        end.extend(signature);
        self.put(&end)?;
        let file_hash = *self.file_hash.finalize().as_bytes();
        self.put(&file_hash)
    }

    fn flush(&mut self) -> Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let raw = std::mem::take(&mut self.block);
        let stored =
            zstd::bulk::compress(&raw, COMPRESSION_LEVEL).map_err(|e| Error::write(&self.path, e))?;
        self.put(&length(raw.len())?)?;
        self.put(&length(stored.len())?)?;
        self.put(&stored)?;
        self.block = raw;
        self.block.clear();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file_hash.update(bytes);
        self.out.write_all(bytes).map_err(|e| Error::write(&self.path, e))
    }
}

/// A length as little-endian u32.
fn length(n: usize) -> Result<[u8; 4]> {
    let n = u32::try_from(n).map_err(|_| {
        Error::Invalid(format!("a part of a trace has {n} bytes; the maximum is {}", u32::MAX))
    })?;
    Ok(n.to_le_bytes())
}

/// The signature of a trace.
#[derive(Debug, Clone, Copy)]
pub struct Signed {
    /// The Ed25519 public key of the signer.
    pub key: Hash,
    /// The Ed25519 signature of the head.
    pub signature: [u8; 64],
}

/// The content of a trace file whose file hash matches. [`verify`](super::verify) checks the records.
#[derive(Debug)]
pub struct Trace {
    /// The path of the file, for error messages.
    pub path: PathBuf,
    /// The header.
    pub header: Header,
    /// The hashes that are stored in the file.
    pub stated: Seal,
    /// The signature, if there is one.
    pub signed: Option<Signed>,
    /// The bytes of the header, which the chain starts with.
    header_bytes: Vec<u8>,
    /// The records without compression, each a u32 length and its bytes.
    pub bytes: Vec<u8>,
}

impl Trace {
    /// Reads a trace file.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] for another format; [`Error::Damaged`] with the reason.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_bytes(path, &std::fs::read(path).map_err(|e| Error::read(path, "trace", e))?)
    }

    /// Decodes the bytes of a trace file. `path` is used in error messages only.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub fn from_bytes(path: &Path, file: &[u8]) -> Result<Self> {
        if !file.starts_with(MAGIC) {
            let reason = format!("it does not start with {:?}", String::from_utf8_lossy(MAGIC));
            return Err(Error::Foreign { path: path.into(), kind: "trace", reason });
        }
        let damaged = |reason: String| Error::Damaged { path: path.into(), reason };
        let Some((body, file_hash)) = file.split_last_chunk::<32>() else {
            return Err(damaged(format!("{} bytes", file.len())));
        };
        if blake3::hash(body).as_bytes() != file_hash {
            return Err(damaged("the hash of the file does not match its content".into()));
        }
        Self::parse(path, &body[MAGIC.len()..]).map_err(damaged)
    }

    fn parse(path: &Path, mut rest: &[u8]) -> std::result::Result<Self, String> {
        let at = &mut rest;
        let size = word(at)?;
        let header_bytes = take(at, size)?.to_vec();
        let header: Header = serde_json::from_slice(&header_bytes).map_err(|e| format!("the header: {e}"))?;
        header.check()?;
        let mut bytes = Vec::new();
        loop {
            let raw = word(at)?;
            if raw == 0 {
                break;
            }
            if raw > MAX_BLOCK_BYTES {
                return Err(format!("a block of {raw} bytes"));
            }
            let size = word(at)?;
            let before = bytes.len();
            let reader = zstd::stream::read::Decoder::new(take(at, size)?).map_err(|e| e.to_string())?;
            // Reading one more byte detects a block that is longer than stated.
            let read = reader.take(raw as u64 + 1).read_to_end(&mut bytes);
            read.map_err(|e| format!("a block does not decompress: {e}"))?;
            if bytes.len() - before != raw {
                return Err(format!("a block does not have the stated {raw} bytes"));
            }
        }
        let count = u64::from_le_bytes(array(at)?);
        let (chain, root, head) = (array(at)?, array(at)?, array(at)?);
        let signed = match array::<1>(at)? {
            [0] => None,
            [1] => Some(Signed { key: array(at)?, signature: array(at)? }),
            [other] => return Err(format!("a signature of kind {other}")),
        };
        if !at.is_empty() {
            return Err(format!("{} bytes after the end", at.len()));
        }
        let stated = Seal { count, chain, root, head };
        Ok(Self { path: path.into(), header, stated, signed, header_bytes, bytes })
    }

    /// The bytes of every record.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a record that is longer than the rest of the data.
    pub fn records(&self) -> impl Iterator<Item = Result<&[u8]>> {
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let record = word(&mut rest).and_then(|size| take(&mut rest, size));
            Some(record.map_err(|reason| {
                rest = &[];
                Error::Damaged { path: self.path.clone(), reason }
            }))
        })
    }

    /// Computes the hashes of the header and the records.
    ///
    /// # Errors
    /// As [`Trace::records`].
    pub fn seal(&self) -> Result<Seal> {
        let mut chain = Chain::new(&self.header_bytes);
        for record in self.records() {
            chain.push(record?);
        }
        Ok(chain.seal())
    }

    /// Whether the trace has a signature, and the signature of `head` by its key is valid.
    #[cfg(feature = "sign")]
    pub fn signature_is_valid(&self, head: &Hash) -> bool {
        self.signed.is_some_and(|Signed { key, signature }| {
            let key = VerifyingKey::from_bytes(&key);
            key.is_ok_and(|key| key.verify_strict(head, &Signature::from_bytes(&signature)).is_ok())
        })
    }
}

/// Removes the first `n` bytes.
fn take<'a>(rest: &mut &'a [u8], n: usize) -> std::result::Result<&'a [u8], String> {
    let left = rest.len();
    let (head, tail) =
        rest.split_at_checked(n).ok_or_else(|| format!("{n} bytes are stated, {left} are left"))?;
    *rest = tail;
    Ok(head)
}

fn array<const N: usize>(rest: &mut &[u8]) -> std::result::Result<[u8; N], String> {
    let mut out = [0; N];
    out.copy_from_slice(take(rest, N)?);
    Ok(out)
}

fn word(rest: &mut &[u8]) -> std::result::Result<usize, String> {
    array(rest).map(|bytes| u32::from_le_bytes(bytes) as usize)
}
