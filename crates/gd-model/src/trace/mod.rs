//! Provenance: of every token, layer and head the one position that was read, or that nothing was; recorded while
//! the model runs, bound by hashes, and checked by running it again.
//!
//! A chain of hashes proves that records belong together and that none was changed, left out or added since its
//! head was kept or signed. It does not stop whoever owns the file from writing all of it anew with another head:
//! what shows that is a head kept elsewhere, a signature, or a replay with the model.
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
//! // What every head of every layer reads for each token of a prompt.
//! let prompt = loaded.tokenizer.encode("Call me")?;
//! let header = Header::new(&loaded, "untrained", &prompt, None, &[], &device)?;
//! let mut records = Vec::new();
//! record(&loaded, &header, &prompt, None, &device, |record| {
//!     records.push(record);
//!     Ok(())
//! })?;
//! assert_eq!((records.len(), records[0].rows.len()), (7, 4 * 8));
//! // The first token sees itself alone.
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

/// What [`verify`] has found to hold.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The hashes.
    pub seal: Seal,
    /// The records.
    pub records: Vec<Record>,
}

/// Checks a trace without its model: order, chain, root, head, signature, and of every selection that it is the
/// least of its candidates by the margin that is stated. `kept` is the head that it is to have, `signer` the key
/// that is to have signed it.
///
/// # Errors
/// The first thing that does not hold.
pub fn verify(trace: &Trace, kept: Option<Hash>, signer: Option<Hash>) -> Result<Verified> {
    let damaged = |reason: String| Err(Error::Damaged { path: trace.path.clone(), reason });
    let seal = trace.seal()?;
    let (stated, whole) = (trace.stated, seal);
    for (name, stated, found) in [
        ("chain", stated.chain, whole.chain),
        ("root", stated.root, whole.root),
        ("head", stated.head, whole.head),
    ] {
        if stated != found {
            return damaged(format!("its {name} is {}, the records give {}", hex(&stated), hex(&found)));
        }
    }
    if stated.count != whole.count {
        return damaged(format!("{} records are announced, {} are there", stated.count, whole.count));
    }
    if let Some(kept) = kept.filter(|kept| *kept != seal.head) {
        return damaged(format!("its head is {}, not the kept {}", hex(&seal.head), hex(&kept)));
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
        let fits = Record::decode(bytes?, &trace.header)
            .map_err(|e| format!("record {position}: {e}"))
            .and_then(|record| check(&record, position, &trace.header).map(|()| record));
        match fits {
            Ok(record) => records.push(record),
            Err(reason) => return damaged(reason),
        }
    }
    if records.len() < trace.header.prompt_tokens {
        return damaged(format!(
            "{} records of a prompt of {} tokens",
            records.len(),
            trace.header.prompt_tokens
        ));
    }
    Ok(Verified { seal, records })
}

/// Checks the signature of a signed trace over its head.
#[cfg(feature = "sign")]
fn check_signature(trace: &Trace, head: &Hash) -> Result<()> {
    if trace.signature_fits(head) {
        return Ok(());
    }
    let reason = "the signature does not fit its key and the head".into();
    Err(Error::Damaged { path: trace.path.clone(), reason })
}

/// Without the feature `sign` no signature can be checked, so a signed trace is refused.
#[cfg(not(feature = "sign"))]
fn check_signature(trace: &Trace, _: &Hash) -> Result<()> {
    Err(Error::Invalid(format!(
        "{}: the trace is signed, and this build cannot check signatures (gd-model's feature `sign`)",
        trace.path.display()
    )))
}
