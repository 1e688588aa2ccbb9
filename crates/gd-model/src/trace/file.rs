//! The file format of traces. Integers are little-endian.
//!
//! | bytes | content |
//! |---|---|
//! | `GDTRACE3` | magic number |
//! | u32 n, n bytes | the header as JSON |
//! | blocks of u32 raw, u32 stored, stored bytes | `raw` bytes of records, each a u32 length and its bytes; as a zstd frame, or unchanged if `stored` equals `raw` |
//! | u32 0 | end of the blocks |
//! | 5 bytes | the [`Ending`] |
//! | u64 count, chain, root, head | the hashes of [`Seal`], 32 bytes each |
//! | u8 0, or u8 2 and a signature | no signature, or that of a [`Statement`](super::Statement): 32 bytes public key, u64 time, u8 n and n bytes version of the program, 64 bytes signature |
//! | 32 bytes | BLAKE3 of all preceding bytes |
//!
//! The last hash detects damage to the file. The hashes of [`Seal`] depend on the header, the records and the ending only, not
//! on their compression.
//!
//! Version 2 (`GDTRACE2`) is still read. Its records do not name the runner-up of a head with a single candidate, and have no
//! weights of softmax layers. Version 1 (`GDTRACE1`) is still read, too. It also has no ending, its signature (u8 1, key, signature) covers the head alone, and all
//! of its blocks are zstd frames.
//!
//! A reader holds one block at a time. So that a small file cannot cost much memory or time, a block of more than 2 MiB must
//! be unchanged, and all blocks together have at most 32 times the size of the file and 1 MiB. The writer stores a block
//! unchanged that would be compressed to less than a sixteenth, so it never reaches these limits.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

#[cfg(feature = "sign")]
use ed25519_dalek::SigningKey;

use super::chain::{Chain, Seal};
use super::ending::Ending;
use super::header::{Header, VERSION};
use super::record::Record;
use super::signature::{Signed, read_signature};
use crate::error::{Error, Result};
use crate::io::files::read_file;

/// The magic number without the version.
const MAGIC: &[u8; 7] = b"GDTRACE";

/// The size from which on a block of records is compressed and written.
const BLOCK_BYTES: usize = 1 << 18;

/// The maximal size of a block; larger ones are refused as damaged. A block exceeds [`BLOCK_BYTES`] by less than one record,
/// which has at most 255 candidates per head.
const MAX_BLOCK_BYTES: usize = 1 << 26;

/// The maximal size of a compressed block before compression.
const MAX_COMPRESSED_BLOCK_BYTES: usize = 1 << 21;

/// The maximal ratio of the sizes of all blocks before compression and of the file, and what is allowed in addition.
const MAX_RATIO: usize = 32;
const ADDITIONAL_BYTES: usize = 1 << 20;

/// The ratio from which on a block is written unchanged.
const MAX_WRITTEN_RATIO: usize = 16;

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
    /// Writes the header of a trace to `out`, in version 2 or 3 of the format, as the header says. `path` is used in error
    /// messages only.
    ///
    /// # Errors
    /// [`Error::Unwritable`] with the path and the system's reason; [`Error::Invalid`] for another version.
    pub fn new(path: &Path, out: &'a mut dyn Write, header: &Header) -> Result<Self> {
        if !(2..=VERSION).contains(&header.version) {
            let (version, path) = (header.version, path.display());
            return Err(Error::Invalid(format!("{path}: version {version} of the format is not written")));
        }
        let text = serde_json::to_vec(header)
            .map_err(|e| Error::Invalid(format!("the header cannot be written as JSON: {e}")))?;
        let chain = Chain::new(&text);
        let mut writer =
            Self { path: path.into(), out, file_hash: blake3::Hasher::new(), chain, block: Vec::new() };
        writer.put(MAGIC)?;
        writer.put(&[b'0' + header.version as u8])?;
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
    pub fn finish(mut self, ending: Ending) -> Result<Seal> {
        self.flush()?;
        let seal = self.chain.seal(Some(ending));
        self.end(&seal, ending, &[0])?;
        Ok(seal)
    }

    /// Writes the end of the trace with the signature of its head, this version of the program, and the time `seconds` after
    /// the start of 1970 by `key`. Returns the hashes of the trace.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    #[cfg(feature = "sign")]
    pub fn finish_signed(mut self, ending: Ending, key: &SigningKey, seconds: u64) -> Result<Seal> {
        self.flush()?;
        let seal = self.chain.seal(Some(ending));
        let signed = Signed::new(&seal.head, key, seconds);
        self.end(&seal, ending, &signed.encode())?;
        Ok(seal)
    }

    /// Writes the end of the file: end of the blocks, ending, count and hashes, `signature` with its leading kind, hash of
    /// the file.
    fn end(&mut self, seal: &Seal, ending: Ending, signature: &[u8]) -> Result<()> {
        let mut end = length(0)?.to_vec();
        end.extend(ending.encode());
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
        let frame = zstd::bulk::compress(&raw, COMPRESSION_LEVEL).map_err(|e| Error::write(&self.path, e))?;
        let compresses = frame.len() < raw.len()
            && raw.len() <= frame.len() * MAX_WRITTEN_RATIO
            && raw.len() <= MAX_COMPRESSED_BLOCK_BYTES;
        let stored = if compresses { &frame } else { &raw };
        self.put(&length(raw.len())?)?;
        self.put(&length(stored.len())?)?;
        self.put(stored)?;
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

/// The content of a trace file whose file hash matches. [`verify`](super::verify) checks the records.
#[derive(Debug)]
pub struct Trace {
    /// The path of the file, for error messages.
    pub path: PathBuf,
    /// The header.
    pub header: Header,
    /// Why the text ends; `None` in version 1 of the format.
    pub ending: Option<Ending>,
    /// The hashes that are stored in the file.
    pub stated: Seal,
    /// The signature, if there is one.
    pub signed: Option<Signed>,
    file: Vec<u8>,
    /// The place of the header's bytes, which the chain starts with.
    header_bytes: Range<usize>,
    blocks: Vec<Block>,
}

/// The place of a block of records in the file.
#[derive(Debug)]
struct Block {
    raw: usize,
    stored: Range<usize>,
    compressed: bool,
}

impl Trace {
    /// Reads a trace file.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] for another format; [`Error::Damaged`] with the reason.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_vec(path, read_file(path, "trace")?)
    }

    /// Decodes the bytes of a trace file. `path` is used in error messages only.
    ///
    /// # Errors
    /// As [`Trace::read`].
    pub fn from_bytes(path: &Path, file: &[u8]) -> Result<Self> {
        Self::from_vec(path, file.to_vec())
    }

    fn from_vec(path: &Path, file: Vec<u8>) -> Result<Self> {
        let version = match file.strip_prefix(MAGIC) {
            Some([version @ b'1'..=b'3', ..]) => u32::from(version - b'0'),
            _ => {
                let reason =
                    format!("it does not start with {:?} and 1, 2 or 3", String::from_utf8_lossy(MAGIC));
                return Err(Error::Foreign { path: path.into(), kind: "trace", reason });
            }
        };
        let damaged = |reason: String| Error::Damaged { path: path.into(), reason };
        let Some((body, file_hash)) = file.split_last_chunk::<32>() else {
            return Err(damaged(format!("{} bytes", file.len())));
        };
        if blake3::hash(body).as_bytes() != file_hash {
            return Err(damaged("the hash of the file does not match its content".into()));
        }
        let mut trace = Self::parse(path, body, version).map_err(damaged)?;
        trace.file = file;
        Ok(trace)
    }

    /// Parses all parts except the content of the blocks. `file` stays empty.
    fn parse(path: &Path, body: &[u8], version: u32) -> std::result::Result<Self, String> {
        let mut rest = &body[MAGIC.len() + 1..];
        let at = &mut rest;
        let size = word(at)?;
        let header_bytes = place(body, at, size)?;
        let header: Header =
            serde_json::from_slice(&body[header_bytes.clone()]).map_err(|e| format!("the header: {e}"))?;
        header.check(version)?;
        let (mut blocks, mut all) = (Vec::new(), 0);
        loop {
            let raw = word(at)?;
            if raw == 0 {
                break;
            }
            let size = word(at)?;
            let compressed = version == 1 || size != raw;
            let limit = if compressed { MAX_COMPRESSED_BLOCK_BYTES } else { MAX_BLOCK_BYTES };
            if raw > limit {
                return Err(format!("a block of {raw} bytes; at most {limit} are possible"));
            }
            all += raw;
            if all > body.len() * MAX_RATIO + ADDITIONAL_BYTES {
                return Err(format!(
                    "its records have more than {MAX_RATIO} times the size of the file and {ADDITIONAL_BYTES} bytes"
                ));
            }
            blocks.push(Block { raw, stored: place(body, at, size)?, compressed });
        }
        let ending = if version == 1 { None } else { Some(Ending::decode(array(at)?)?) };
        let count = u64::from_le_bytes(array(at)?);
        let (chain, root, head) = (array(at)?, array(at)?, array(at)?);
        let signed = read_signature(at, version)?;
        if !at.is_empty() {
            return Err(format!("{} bytes after the end", at.len()));
        }
        let stated = Seal { count, chain, root, head };
        let (path, file) = (path.into(), Vec::new());
        Ok(Self { path, header, ending, stated, signed, file, header_bytes, blocks })
    }

    /// The bytes of the header.
    pub(super) fn header_bytes(&self) -> &[u8] {
        &self.file[self.header_bytes.clone()]
    }

    /// The records of a block, each a u32 length and its bytes.
    fn block(&self, block: &Block) -> Result<Vec<u8>> {
        let stored = &self.file[block.stored.clone()];
        if !block.compressed {
            return Ok(stored.to_vec());
        }
        // Into one buffer, so that the frame cannot ask for a window of its own. A longer content is an error.
        let bytes = zstd::bulk::decompress(stored, block.raw)
            .map_err(|e| self.damaged(format!("a block does not decompress: {e}")))?;
        match bytes.len() == block.raw {
            true => Ok(bytes),
            false => Err(self.damaged(format!("a block does not have the stated {} bytes", block.raw))),
        }
    }

    /// The bytes of every record.
    ///
    /// # Errors
    /// [`Error::Damaged`] for a block that does not decompress, and for a record that is empty or longer than the rest of
    /// its block. Nothing follows after an error.
    pub fn records(&self) -> impl Iterator<Item = Result<Vec<u8>>> {
        let (mut blocks, mut block, mut at) = (self.blocks.iter(), Vec::new(), 0);
        std::iter::from_fn(move || {
            if at == block.len() {
                (block, at) = match self.block(blocks.next()?) {
                    Ok(next) => (next, 0),
                    Err(e) => {
                        blocks = [].iter();
                        return Some(Err(e));
                    }
                };
            }
            let mut rest = &block[at..];
            let record = word(&mut rest).and_then(|size| match size {
                0 => Err("a record without content".into()),
                _ => take(&mut rest, size).map(<[u8]>::to_vec),
            });
            Some(match record {
                Ok(record) => {
                    at += 4 + record.len();
                    Ok(record)
                }
                Err(reason) => {
                    (blocks, at) = ([].iter(), block.len());
                    Err(self.damaged(reason))
                }
            })
        })
    }

    /// All records without compression, each a u32 length and its bytes.
    ///
    /// # Errors
    /// As [`Trace::records`].
    pub fn record_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for block in &self.blocks {
            bytes.extend(self.block(block)?);
        }
        Ok(bytes)
    }

    /// All records. [`verify`](super::verify) checks them with less memory.
    ///
    /// # Errors
    /// As [`Trace::records`] and [`Record::decode`].
    pub fn decoded(&self) -> Result<Vec<Record>> {
        let decode = |(position, bytes): (usize, Result<Vec<u8>>)| {
            let record = Record::decode(&bytes?, &self.header);
            record.map_err(|reason| self.damaged(format!("record {position}: {reason}")))
        };
        self.records().enumerate().map(decode).collect()
    }

    pub(super) fn damaged(&self, reason: String) -> Error {
        Error::Damaged { path: self.path.clone(), reason }
    }
}

/// Removes the first `n` bytes.
pub(super) fn take<'a>(rest: &mut &'a [u8], n: usize) -> std::result::Result<&'a [u8], String> {
    let left = rest.len();
    let (head, tail) =
        rest.split_at_checked(n).ok_or_else(|| format!("{n} bytes are stated, {left} are left"))?;
    *rest = tail;
    Ok(head)
}

/// Removes the first `n` bytes of `rest`, the end of `all`, and returns their place in `all`.
fn place(all: &[u8], rest: &mut &[u8], n: usize) -> std::result::Result<Range<usize>, String> {
    let start = all.len() - rest.len();
    take(rest, n)?;
    Ok(start..start + n)
}

pub(super) fn array<const N: usize>(rest: &mut &[u8]) -> std::result::Result<[u8; N], String> {
    let mut out = [0; N];
    out.copy_from_slice(take(rest, N)?);
    Ok(out)
}

fn word(rest: &mut &[u8]) -> std::result::Result<usize, String> {
    array(rest).map(|bytes| u32::from_le_bytes(bytes) as usize)
}
