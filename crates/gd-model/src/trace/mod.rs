//! Provenance: a trace records for every token, layer and head the position that was read, or that the head abstained. It is
//! protected by a hash chain and can be verified by a replay with the model.
//!
//! The hash chain proves that no record was changed, removed or added since its head was stored or signed. It cannot
//! prevent the owner of a file from writing a new trace with another head. This is detected by a head that was stored
//! elsewhere, by a signature, or by the replay.
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
//! record(&loaded, &header, &prompt, None, &device, |record| {
//!     records.push(record);
//!     Ok(())
//! })?;
//! assert_eq!((records.len(), records[0].rows.len()), (7, 4 * 8));
//! // The first token sees only itself.
//! assert!(records[0].rows.iter().all(|row| row.selected == 0));
//! # Ok::<(), gd_model::Error>(())
//! ```

mod chain;
mod check;
mod effect;
mod file;
mod header;
mod intervention;
mod record;
mod recorder;
mod replay;
mod run;

pub use chain::{Chain, Hash, Seal, hex};
pub use check::check;
pub use effect::{Change, Effect, Pick, effect};
pub use file::{Signed, Trace, Writer};
pub use header::{FORMAT, Header, Layer, Model};
pub use intervention::{Act, Intervention, Query};
pub use record::{Record, Row, Slot};
pub use recorder::Recorder;
pub use replay::Outcome;
pub use run::{Continuation, record, replay};

use crate::error::{Error, Result};

/// A verified trace.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The hashes of the trace.
    pub seal: Seal,
    /// The records.
    pub records: Vec<Record>,
}

/// Verifies a trace without the model: the order of the records, chain, root, head, signature, and that each selection has
/// the least energy of its candidates with the recorded margin. If `expected_head` is given, the head must be equal to it;
/// if `signer` is given, the trace must be signed by this Ed25519 public key.
///
/// # Errors
/// [`Error::Damaged`] with the first check that fails.
pub fn verify(trace: &Trace, expected_head: Option<Hash>, signer: Option<Hash>) -> Result<Verified> {
    let damaged = |reason: String| Err(Error::Damaged { path: trace.path.clone(), reason });
    let seal = trace.seal()?;
    let stated = trace.stated;
    for (name, stated, computed) in [
        ("chain", stated.chain, seal.chain),
        ("root", stated.root, seal.root),
        ("head", stated.head, seal.head),
    ] {
        if stated != computed {
            return damaged(format!("its {name} is {}, the records give {}", hex(&stated), hex(&computed)));
        }
    }
    if stated.count != seal.count {
        return damaged(format!("its count is {}, but it has {} records", stated.count, seal.count));
    }
    if let Some(expected) = expected_head.filter(|expected| *expected != seal.head) {
        return damaged(format!("its head is {}, not the expected {}", hex(&seal.head), hex(&expected)));
    }
    if trace.signed.is_some() {
        check_signature(trace, &seal.head)?;
    }
    match (signer, trace.signed.map(|signed| signed.key)) {
        (Some(_), None) => return damaged("it is not signed".into()),
        (Some(signer), Some(key)) if signer != key => {
            return damaged(format!("it is signed by {}, not by {}", hex(&key), hex(&signer)));
        }
        _ => {}
    }
    let mut records = Vec::new();
    for (position, bytes) in trace.records().enumerate() {
        let record = Record::decode(bytes?, &trace.header)
            .map_err(|e| format!("record {position}: {e}"))
            .and_then(|record| check(&record, position, &trace.header).map(|()| record));
        match record {
            Ok(record) => records.push(record),
            Err(reason) => return damaged(reason),
        }
    }
    if records.len() < trace.header.prompt_tokens {
        return damaged(format!(
            "{} records for a prompt of {} tokens",
            records.len(),
            trace.header.prompt_tokens
        ));
    }
    Ok(Verified { seal, records })
}

/// Checks the signature of a signed trace over its head.
#[cfg(feature = "sign")]
fn check_signature(trace: &Trace, head: &Hash) -> Result<()> {
    if trace.signature_is_valid(head) {
        return Ok(());
    }
    let reason = "the signature of the head by its key is not valid".into();
    Err(Error::Damaged { path: trace.path.clone(), reason })
}

/// Refuses a signed trace: without the feature `sign`, its signature cannot be checked.
#[cfg(not(feature = "sign"))]
fn check_signature(trace: &Trace, _: &Hash) -> Result<()> {
    Err(Error::Invalid(format!(
        "{}: the trace is signed, and this build cannot check signatures (gd-model's feature `sign`)",
        trace.path.display()
    )))
}
