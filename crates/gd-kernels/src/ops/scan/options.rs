//! The options of a scan.

use candle_core::{Device, Tensor};

use crate::backend::Backend;
use crate::backend::dispatch::on_cpu;
use crate::cache::CachedKeys;
use crate::mask::Mask;
use crate::options::{Precision, Score, TieBreak};

/// The options of [`scan`](crate::scan), [`scan_select`](crate::scan_select) and [`decode`](crate::decode).
///
/// [`Scan::new`] sets the defaults; the `with_` methods and the public fields change them.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{Mask, Scan, TieBreak};
///
/// # fn main() -> gd_kernels::Result<()> {
/// let beta = Tensor::full(0.5f32, 4, &Device::Cpu)?;
/// let mask = Mask::causal(0);
/// let options = Scan::new(&beta, &mask, 8).with_tie(TieBreak::Last);
/// assert_eq!(options.candidates, 8);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct Scan<'a> {
    /// Inverse bandwidth of every query head, `[Hq]`, finite and > 0.
    pub beta: &'a Tensor,
    /// Key prior b, `[B|1, Hq|Hk, M]`; a prior of -inf excludes a key.
    pub prior: Option<&'a Tensor>,
    /// Which keys each query may read.
    pub mask: &'a Mask,
    /// K, the number of keys of lowest energy to return: one of [`CANDIDATES`](crate::CANDIDATES). It may exceed the
    /// number of keys.
    pub candidates: usize,
    /// How keys are scored.
    pub score: Score,
    /// Which of several keys with the same energy comes first.
    pub tie: TieBreak,
    /// Protected keys, which are candidates whatever their energy if the mask makes them visible: i32
    /// `[B|1, Hq|Hk|1, N|1, P]`, negative in unused slots. They add P slots to the K of the result.
    pub protected: Option<&'a Tensor>,
    /// Return an error for NaN and infinities in rows that take part, for energies that overflow, and for dot products that
    /// may overflow. Without it, a key with NaN or infinities is never a candidate, overflowed energies are counted
    /// ([`Candidates::overflowed`](crate::Candidates::overflowed)), and keys whose dot product with a query of a norm below
    /// 2^60 overflows are not found. On a GPU the values of beta, prior and protected keys are checked in this mode only,
    /// because that waits for the device.
    pub checked: bool,
    /// How the candidates are found; the result is the same.
    pub precision: Precision,
    /// Data derived from the keys k, or from the pages of a paged cache. A certified scan reads 8-bit keys instead of
    /// quantising k; on the CPU, 8-bit keys make every scan certified. Key biases are read by decoding on a GPU.
    pub cached: Option<CachedKeys<'a>>,
    /// Where to run.
    pub backend: Backend,
}

impl<'a> Scan<'a> {
    /// A scan for `candidates` keys per query, by energy, without prior and protected keys, ties to the first key,
    /// unchecked, at native precision.
    pub fn new(beta: &'a Tensor, mask: &'a Mask, candidates: usize) -> Self {
        Self {
            beta,
            prior: None,
            mask,
            candidates,
            score: Score::default(),
            tie: TieBreak::default(),
            protected: None,
            checked: false,
            precision: Precision::default(),
            cached: None,
            backend: Backend::default(),
        }
    }

    /// Sets the key prior `[B|1, Hq|Hk, M]`.
    #[must_use]
    pub fn with_prior(self, prior: &'a Tensor) -> Self {
        Self { prior: Some(prior), ..self }
    }

    /// Sets how keys are scored.
    #[must_use]
    pub fn with_score(self, score: Score) -> Self {
        Self { score, ..self }
    }

    /// Sets which of several keys with the same energy comes first.
    #[must_use]
    pub fn with_tie(self, tie: TieBreak) -> Self {
        Self { tie, ..self }
    }

    /// Sets the protected keys, i32 `[B|1, Hq|Hk|1, N|1, P]`.
    #[must_use]
    pub fn with_protected(self, protected: &'a Tensor) -> Self {
        Self { protected: Some(protected), ..self }
    }

    /// Sets how the candidates are found.
    #[must_use]
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Offers data derived from the keys: a [`KeyCache`](crate::KeyCache), [`Int8Keys`](crate::Int8Keys) or
    /// [`KeyBias`](crate::KeyBias).
    #[must_use]
    pub fn with_cached(self, cached: impl Into<CachedKeys<'a>>) -> Self {
        Self { cached: Some(cached.into()), ..self }
    }

    /// Returns errors for NaN and infinities in rows that take part, and for energies and dot products that overflow.
    #[must_use]
    pub fn checked(self) -> Self {
        Self { checked: true, ..self }
    }

    /// Sets where to run.
    #[must_use]
    pub fn with_backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// The precision at which a scan of tensors on `device` runs.
    pub(crate) fn precision_on(&self, device: &Device) -> Precision {
        match self.cached {
            Some(CachedKeys::Int8(_)) if on_cpu(device) => Precision::Certified,
            _ => self.precision,
        }
    }
}
