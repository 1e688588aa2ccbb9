//! A trace on disk.
//!
//! | bytes | |
//! |---|---|
//! | `GDTRACE1` | |
//! | u32 n, n bytes | the header, JSON |
//! | blocks of u32 raw, u32 stored, stored bytes | zstd of raw bytes: records, each a u32 length and its bytes |
//! | u32 0 | no more blocks |
//! | u64 count, chain, root, head | the hashes of [`Seal`], 32 bytes each |
//! | u8 0, or 1, key, signature | Ed25519 over the head: 32 bytes of public key, 64 of signature |
//! | 32 bytes | BLAKE3 of everything before |
//!
//! The last hash finds any damage to the file; the others bind the records, whatever they were stored in.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

#[cfg(feature = "sign")]
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use super::chain::{Chain, Hash, Seal};
use super::header::Header;
use super::record::Record;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"GDTRACE1";

/// Bytes of records that are compressed together.
const BLOCK: usize = 1 << 18;

/// Beyond this a block is damage, not data: a record has at most a text and 256 candidates for each head.
const LARGEST_BLOCK: usize = 1 << 26;

const LEVEL: i32 = 1;

/// Writes a trace, record by record.
pub struct Writer<'a> {
    path: PathBuf,
    out: &'a mut dyn Write,
    whole: blake3::Hasher,
    chain: Chain,
    block: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// Starts a trace that goes to `out`; `path` is for messages.
    ///
    /// # Errors
    /// What writing reports.
    pub fn new(path: &Path, out: &'a mut dyn Write, header: &Header) -> Result<Self> {
        let text = serde_json::to_vec(header)
            .map_err(|e| Error::Invalid(format!("the header does not fit JSON: {e}")))?;
        let chain = Chain::new(&text);
        let mut writer =
            Self { path: path.into(), out, whole: blake3::Hasher::new(), chain, block: Vec::new() };
        writer.put(MAGIC)?;
        writer.put(&length(text.len())?)?;
        writer.put(&text)?;
        Ok(writer)
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// A record too large for its fields, or what writing reports.
    pub fn push(&mut self, record: &Record) -> Result<()> {
        let at = self.block.len();
        self.block.extend([0; 4]);
        record.encode(&mut self.block)?;
        let bytes = &self.block[at + 4..];
        self.chain.push(bytes);
        let size = length(bytes.len())?;
        self.block[at..at + 4].copy_from_slice(&size);
        if self.block.len() >= BLOCK { self.flush() } else { Ok(()) }
    }

    /// Writes the hashes that seal the trace, without a signature.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn finish(mut self) -> Result<Seal> {
        self.flush()?;
        let seal = self.chain.seal();
        self.end(&seal, &[0])?;
        Ok(seal)
    }

    /// Writes the hashes that seal the trace, with the Ed25519 signature of its head by `key`.
    ///
    /// # Errors
    /// Names the file that cannot be written.
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

    /// Writes the end of the file: count and hashes, the signature's kind and bytes, and the hash of the file.
    fn end(&mut self, seal: &Seal, signature: &[u8]) -> Result<()> {
        let mut end = length(0)?.to_vec();
        end.extend(seal.count.to_le_bytes());
        for part in [seal.chain, seal.root, seal.head] {
            end.extend(part);
        }
        end.extend(signature);
        self.put(&end)?;
        let whole = *self.whole.finalize().as_bytes();
        self.put(&whole)
    }

    fn flush(&mut self) -> Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let raw = std::mem::take(&mut self.block);
        let stored = zstd::bulk::compress(&raw, LEVEL).map_err(|e| Error::write(&self.path, e))?;
        self.put(&length(raw.len())?)?;
        self.put(&length(stored.len())?)?;
        self.put(&stored)?;
        self.block = raw;
        self.block.clear();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.whole.update(bytes);
        self.out.write_all(bytes).map_err(|e| Error::write(&self.path, e))
    }
}

fn length(n: usize) -> Result<[u8; 4]> {
    let n = u32::try_from(n).map_err(|_| Error::Invalid(format!("a part of {n} bytes in a trace")))?;
    Ok(n.to_le_bytes())
}

/// A signature.
#[derive(Debug, Clone, Copy)]
pub struct Signed {
    /// Who signed: an Ed25519 public key.
    pub key: Hash,
    /// The Ed25519 signature of the head.
    pub signature: [u8; 64],
}

/// A trace as its file has it: sound, but not yet verified.
#[derive(Debug)]
pub struct Trace {
    /// Where it lies.
    pub path: PathBuf,
    /// Its header.
    pub header: Header,
    /// The hashes that the file states.
    pub stated: Seal,
    /// Its signature, if it has one.
    pub signed: Option<Signed>,
    /// The header's bytes.
    header_bytes: Vec<u8>,
    /// The records, each a u32 length and its bytes.
    pub bytes: Vec<u8>,
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    /// A file that cannot be read, is no trace, or is damaged: the place and the reason.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_bytes(path, &std::fs::read(path).map_err(|e| Error::read(path, "trace", e))?)
    }

    /// The trace that these bytes are; `path` is for messages.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub fn from_bytes(path: &Path, file: &[u8]) -> Result<Self> {
        if !file.starts_with(MAGIC) {
            let reason = format!("it does not start with {:?}", String::from_utf8_lossy(MAGIC));
            return Err(Error::Foreign { path: path.into(), kind: "trace", reason });
        }
        let damaged = |reason: String| Error::Damaged { path: path.into(), reason };
        let Some((body, whole)) = file.split_last_chunk::<32>() else {
            return Err(damaged(format!("{} bytes", file.len())));
        };
        if blake3::hash(body).as_bytes() != whole {
            return Err(damaged("the hash of the file does not fit its content".into()));
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
            if raw > LARGEST_BLOCK {
                return Err(format!("a block of {raw} bytes"));
            }
            let size = word(at)?;
            let before = bytes.len();
            let reader = zstd::stream::read::Decoder::new(take(at, size)?).map_err(|e| e.to_string())?;
            // One byte more than announced shows that there is more.
            let read = reader.take(raw as u64 + 1).read_to_end(&mut bytes);
            read.map_err(|e| format!("a block does not decompress: {e}"))?;
            if bytes.len() - before != raw {
                return Err(format!("a block of other than the {raw} bytes announced"));
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
            return Err(format!("{} bytes behind the end", at.len()));
        }
        let stated = Seal { count, chain, root, head };
        Ok(Self { path: path.into(), header, stated, signed, header_bytes, bytes })
    }

    /// The bytes of every record.
    ///
    /// # Errors
    /// A length beyond the end.
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

    /// The hashes of what the file holds.
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

    /// Whether the trace is signed, and the signature is that of its key over `head`.
    #[cfg(feature = "sign")]
    pub fn signature_fits(&self, head: &Hash) -> bool {
        self.signed.is_some_and(|Signed { key, signature }| {
            let key = VerifyingKey::from_bytes(&key);
            key.is_ok_and(|key| key.verify_strict(head, &Signature::from_bytes(&signature)).is_ok())
        })
    }
}

fn take<'a>(rest: &mut &'a [u8], n: usize) -> std::result::Result<&'a [u8], String> {
    let left = rest.len();
    let (head, tail) =
        rest.split_at_checked(n).ok_or_else(|| format!("{n} bytes are announced, {left} are left"))?;
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
