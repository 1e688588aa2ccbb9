//! Provenance: a trace records for every token, layer and head the position that was read, or that the head abstained. It is
//! protected by a hash chain and can be verified by a replay with the model.
//!
//! The hash chain proves that no record was changed, removed or added since its head was stored or signed. It cannot
//! prevent the owner of a file from writing a new trace with another head. This is detected by a head that was stored
//! elsewhere, by a signature, or by the replay. [`Proof`] shows that a trace contains a record without its other records.
//!
//! The following example records what every head of every layer reads for each token of a prompt.
//!
//! ```
//! use candle_core::{DType, Device};
//! use gd_model::config::Recipe;
//! use gd_model::io::tokenizer::Tokenizer;
//! use gd_model::model::Transformer;
//! use gd_model::model::params::Params;
//! use gd_model::model::pretrained::Loaded;
//! use gd_model::trace::{Header, record};
//!
//! let device = Device::Cpu;
//! let params = Params::new(0, DType::F32, &device);
//! let model = Transformer::new(&Recipe::load("tiny")?.model, params.frozen())?;
//! let loaded = Loaded::new(model, params, Tokenizer::bytes()?);
//!
//! let prompt = loaded.tokenizer.encode("Call me")?;
//! let header = Header::new(&loaded, "untrained", &prompt, None, &[], &device)?;
//! let mut records = Vec::new();
//! record(&loaded, &header, &prompt, &device, |record| {
//!     records.push(record);
//!     Ok(())
//! })?;
//! // Two heads of each of the four layers select.
//! assert_eq!((records.len(), records[0].rows.len()), (7, 4 * 2));
//! // The first token sees only itself.
//! assert!(records[0].rows.iter().all(|row| row.selected == 0));
//! # Ok::<(), gd_model::Error>(())
//! ```

mod chain;
mod check;
mod effect;
mod ending;
pub mod export;
mod file;
mod header;
mod intervention;
mod proof;
mod record;
mod recorder;
mod replay;
mod run;
mod signature;
mod sweep;

pub use chain::{Chain, Hash, Seal, hex};
pub use check::check;
pub use effect::{Change, Effect, Pick, effect};
pub use ending::Ending;
pub use file::{Trace, Writer};
pub use header::{FORMAT, Generation, Header, Layer, Model, ThresholdByLength, VERSION};
pub use intervention::{Act, Intervention, Query};
pub use proof::{Proof, Proven};
pub use record::{Blend, Record, Row, Slot};
pub use recorder::{Reads, Recorder};
pub use replay::Outcome;
pub use run::{record, replay};
pub use signature::{Signed, Statement};
pub use sweep::{HeadEffect, Sweep, SweepAct, sweep};

use crate::error::Result;

/// A verified trace.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The hashes of the trace.
    pub seal: Seal,
    /// The number of selections, one for each position, selecting layer and head.
    pub selections: u64,
    /// The number of selections in which the head abstained.
    pub abstained: u64,
}

/// Verifies a trace without the model: the order of the records, chain, root, head, signature, that each selection has the
/// least energy of its candidates with the recorded margin, and that the text can end as it does. If `expected_head` is
/// given, the head must be equal to it; if `signer` is given, the trace must be signed by this Ed25519 public key. Holds one
/// block of records in memory at a time.
///
/// # Errors
/// [`crate::Error::Damaged`] with the first check that fails.
pub fn verify(trace: &Trace, expected_head: Option<Hash>, signer: Option<Hash>) -> Result<Verified> {
    let damaged = |reason: String| Err(trace.damaged(reason));
    let (mut chain, mut selections, mut abstained) = (Chain::new(trace.header_bytes()), 0, 0);
    let mut inconsistent = None;
    for (position, bytes) in trace.records().enumerate() {
        let bytes = bytes?;
        chain.push(&bytes);
        // A wrong hash is reported first, because it explains everything else.
        if inconsistent.is_some() {
            continue;
        }
        let record = Record::decode(&bytes, &trace.header)
            .map_err(|e| format!("record {position}: {e}"))
            .and_then(|record| check(&record, position, &trace.header).map(|()| record));
        match record {
            Ok(record) => {
                selections += record.rows.len() as u64;
                abstained += record.rows.iter().filter(|row| row.selected < 0).count() as u64;
            }
            Err(reason) => inconsistent = Some(reason),
        }
    }
    let seal = chain.seal(trace.ending);
    check_hashes(&trace.stated, &seal, expected_head)
        .and_then(|()| signature::check_signature(trace.signed.as_ref(), &seal.head, signer))
        .and_then(|()| inconsistent.map_or(Ok(()), Err))
        .and_then(|()| check_length(trace, seal.count as usize))
        .or_else(damaged)?;
    Ok(Verified { seal, selections, abstained })
}

/// Compares the hashes that a file states with those of its records.
fn check_hashes(stated: &Seal, seal: &Seal, expected_head: Option<Hash>) -> std::result::Result<(), String> {
    for (name, stated, computed) in [
        ("chain", stated.chain, seal.chain),
        ("root", stated.root, seal.root),
        ("head", stated.head, seal.head),
    ] {
        if stated != computed {
            return Err(format!("its {name} is {}, the records give {}", hex(&stated), hex(&computed)));
        }
    }
    if stated.count != seal.count {
        return Err(format!("its count is {}, but it has {} records", stated.count, seal.count));
    }
    match expected_head.filter(|expected| *expected != seal.head) {
        Some(expected) => {
            Err(format!("its head is {}, not the expected {}", hex(&seal.head), hex(&expected)))
        }
        None => Ok(()),
    }
}

/// Checks that the number of records fits the header and the ending.
fn check_length(trace: &Trace, records: usize) -> std::result::Result<(), String> {
    let prompt = trace.header.prompt_tokens;
    if records < prompt {
        return Err(format!("{records} records for a prompt of {prompt} tokens"));
    }
    if records > prompt && trace.header.sampling.is_none() {
        return Err(format!("{} records are of generated tokens, but it has no sampling", records - prompt));
    }
    trace.ending.map_or(Ok(()), |ending| ending.check(&trace.header, records))
}
