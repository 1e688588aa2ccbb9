//! Proofs that a trace contains a record, which can be checked without the other records.
//!
//! The head of a trace is a hash of its header, chain, root, count and ending. The root is that of a Merkle tree over the
//! records, so that a record, the siblings on its path to the root, and the other parts of the head give the head again. A
//! proof is JSON; hashes and the bytes of the record are hexadecimal.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::chain::{Hash, head_of, leaf, path, root_of};
use super::check::check;
use super::ending::Ending;
use super::file::Trace;
use super::header::{Header, VERSION};
use super::record::Record;
use super::signature::{Signed, Statement, check_signature};
use crate::error::{Error, Result};
use crate::io::files::read_file;

/// The name and version of the format.
const FORMAT: (&str, u32) = ("gd-trace-proof", 1);

/// The maximal size of a proof: that of a record and a header.
const MAX_BYTES: usize = 1 << 26;

/// The proof that a trace contains a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    format: String,
    version: u32,
    /// The text of the header.
    header: String,
    /// The bytes of the record.
    record: String,
    /// Its position.
    index: u64,
    /// The number of records of the trace.
    count: u64,
    /// The siblings on the path from the record to the root, lowest first.
    path: Vec<String>,
    chain: String,
    ending: Ending,
    head: String,
    signature: Option<ProofSignature>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProofSignature {
    key: String,
    seconds: u64,
    version: String,
    signature: String,
}

/// What a valid proof proves.
#[derive(Debug, Clone)]
pub struct Proven {
    /// The header of the trace.
    pub header: Header,
    /// The record.
    pub record: Record,
    /// The number of records of the trace.
    pub count: u64,
    /// Why the text ends.
    pub ending: Ending,
    /// The head of the trace.
    pub head: Hash,
    /// The signature of the head, if there is one.
    pub signed: Option<Signed>,
}

impl Proof {
    /// Proves that `trace` has the record of this position. The trace is not verified.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a position that it does not have; [`Error::Invalid`] for a trace of version 1, whose head
    /// does not prove its header; [`Error::Damaged`].
    pub fn new(trace: &Trace, position: u64) -> Result<Self> {
        let Some(ending) = trace.ending else {
            return Err(Error::Invalid(format!(
                "{}: the head of a trace of version 1 covers the header only together with all records; record it again to \
                 prove single records",
                trace.path.display()
            )));
        };
        let (mut leaves, mut record) = (Vec::new(), None);
        for bytes in trace.records() {
            let bytes = bytes?;
            let at = leaves.len() as u64;
            leaves.push(leaf(&bytes));
            if at == position {
                record = Some(bytes);
            }
        }
        let Some(record) = record else {
            let allowed = format!("a position below {}", leaves.len());
            return Err(Error::OutOfRange { name: "prove".into(), value: position.to_string(), allowed });
        };
        let hex = |hash: &Hash| encode(hash);
        let signature = |signed: &Signed| {
            let Statement { seconds, version } = signed.statement.clone()?;
            let (key, signature) = (hex(&signed.key), encode(&signed.signature));
            Some(ProofSignature { key, seconds, version, signature })
        };
        Ok(Self {
            format: FORMAT.0.into(),
            version: FORMAT.1,
            header: String::from_utf8_lossy(trace.header_bytes()).into_owned(),
            record: encode(&record),
            index: position,
            count: leaves.len() as u64,
            path: path(leaves, position as usize).iter().map(hex).collect(),
            chain: hex(&trace.stated.chain),
            ending,
            head: hex(&trace.stated.head),
            signature: trace.signed.as_ref().and_then(signature),
        })
    }

    /// Reads a proof.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] if it is no proof.
    pub fn read(file: &Path) -> Result<Self> {
        Self::from_bytes(file, &read_file(file, "proof")?)
    }

    /// Decodes a proof. `file` is used in error messages only.
    ///
    /// # Errors
    /// As [`Proof::read`].
    pub fn from_bytes(file: &Path, bytes: &[u8]) -> Result<Self> {
        let foreign = |reason| Error::Foreign { path: file.into(), kind: "proof", reason };
        if bytes.len() > MAX_BYTES {
            return Err(foreign(format!("{} bytes; the maximum is {MAX_BYTES}", bytes.len())));
        }
        let proof: Self = serde_json::from_slice(bytes).map_err(|e| foreign(e.to_string()))?;
        match (proof.format.as_str(), proof.version) == FORMAT {
            true => Ok(proof),
            false => Err(foreign(format!("{} {} is not supported", proof.format, proof.version))),
        }
    }

    /// Checks that the trace with the proof's head contains the record, the signature of the head, and that the record is
    /// consistent with itself. If `expected_head` is given, the head must be equal to it; if `signer` is given, it must be
    /// signed by this Ed25519 public key. Without either, the proof shows only that some trace contains the record.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn check(
        &self,
        expected_head: Option<Hash>,
        signer: Option<Hash>,
    ) -> std::result::Result<Proven, String> {
        let header: Header = serde_json::from_str(&self.header).map_err(|e| format!("the header: {e}"))?;
        // Version 1 has no proofs.
        header.check(header.version.clamp(2, VERSION))?;
        let bytes = decode(&self.record).ok_or("the record is not hexadecimal")?;
        let path = self.path.iter().map(|hash| decode_array(hash)).collect::<Option<Vec<Hash>>>();
        let path = path.ok_or("the path holds a hash that is not 64 hexadecimal digits")?;
        let chain = decode_array(&self.chain).ok_or("the chain is not 64 hexadecimal digits")?;
        let stated: Hash = decode_array(&self.head).ok_or("the head is not 64 hexadecimal digits")?;
        let root = root_of(leaf(&bytes), self.index, self.count, &path).ok_or_else(|| {
            format!("{} hashes are no path of record {} of {}", path.len(), self.index, self.count)
        })?;
        let head = head_of(self.header.as_bytes(), &chain, &root, self.count, self.ending);
        if head != stated {
            return Err(format!("its head is {}, but the record leads to {}", self.head, encode(&head)));
        }
        if let Some(expected) = expected_head.filter(|expected| *expected != head) {
            return Err(format!("its head is {}, not the expected {}", self.head, encode(&expected)));
        }
        let signed = self.signed()?;
        check_signature(signed.as_ref(), &head, signer)?;
        let index = usize::try_from(self.index).map_err(|e| e.to_string())?;
        let record = Record::decode(&bytes, &header)?;
        check(&record, index, &header)?;
        self.ending.check(&header, usize::try_from(self.count).map_err(|e| e.to_string())?)?;
        Ok(Proven { header, record, count: self.count, ending: self.ending, head, signed })
    }

    fn signed(&self) -> std::result::Result<Option<Signed>, String> {
        let Some(ProofSignature { key, seconds, version, signature }) = &self.signature else {
            return Ok(None);
        };
        let (key, signature) = (decode_array(key), decode_array(signature));
        let (key, signature) = key.zip(signature).ok_or("the signature or its key is not hexadecimal")?;
        if version.len() > usize::from(u8::MAX) {
            return Err(format!("a version of {} bytes", version.len()));
        }
        let statement = Some(Statement { seconds: *seconds, version: version.clone() });
        Ok(Some(Signed { key, signature, statement }))
    }
}

/// Bytes as hexadecimal digits.
fn encode(bytes: &[u8]) -> String {
    let digit = |d: u8| char::from_digit(u32::from(d), 16).unwrap_or('0');
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect()
}

/// The bytes of lower-case hexadecimal digits.
fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

fn decode_array<const N: usize>(text: &str) -> Option<[u8; N]> {
    decode(text)?.try_into().ok()
}
