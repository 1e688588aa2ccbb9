//! Data derived from cached keys that makes decoding faster.

use candle_core::{DType, Tensor};

use crate::backend::dispatch::on_cpu;
use crate::cache::int8_keys::Int8Keys;
use crate::cache::key_bias::KeyBias;
use crate::cache::position::WritePosition;
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};
use crate::options::{Precision, Score};

/// Data derived from the keys `[B, Hk, M, D]` of a KV cache, computed once for every key, that decoding reads instead of
/// the keys or beside them.
#[derive(Debug, Clone)]
pub enum KeyCache {
    /// The keys as 8-bit integers, for certified precision.
    Int8(Int8Keys),
    /// The biases of the keys, for native precision on a GPU.
    Bias(KeyBias),
}

/// What decoding asks of every query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeUse {
    /// The winner and its value row, as [`decode`](crate::decode) returns them.
    Winner,
    /// Several candidates, as [`scan`](crate::scan) returns them.
    Candidates,
}

impl KeyCache {
    /// An empty cache of the kind that suits decoding over keys like k `[B, Hk, M, D]` on their device, or none where
    /// decoding is fastest without one. `precision` overrides the choice of the precision; the results are the same.
    ///
    /// On the CPU this is 8-bit keys, which are faster than reading the keys themselves from 256 keys on, except for
    /// f64. On a GPU it is the key biases, used where only the winner is needed; 8-bit keys on CUDA if
    /// `precision` asks for them.
    ///
    /// # Errors
    /// As [`KeyCache::like`].
    pub fn for_decoding(
        k: &Tensor,
        score: Score,
        precision: Option<Precision>,
        reads: DecodeUse,
    ) -> Result<Option<Self>> {
        let precision = match on_cpu(k.device()) {
            true => {
                let default = if k.dtype() == DType::F64 { Precision::Native } else { Precision::Certified };
                Some(precision.unwrap_or(default)).filter(|p| *p == Precision::Certified)
            }
            false => (reads == DecodeUse::Winner).then(|| precision.unwrap_or(Precision::Native)),
        };
        precision.map(|precision| Self::like(k, score, precision)).transpose()
    }

    /// An empty cache for decoding at this precision, with the batch (or pages), heads, head dimension, dtype and device
    /// of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// A tensor of another rank or dtype, or a device without kernels.
    pub fn like(k: &Tensor, score: Score, precision: Precision) -> Result<Self> {
        match precision {
            Precision::Certified => Int8Keys::like(k, score).map(Self::Int8),
            Precision::Native => KeyBias::like(k, score).map(Self::Bias),
        }
    }

    /// The same with the keys k.
    ///
    /// # Errors
    /// As [`KeyCache::like`]; native precision on the CPU, where no data is derived from the keys.
    pub fn new(k: &Tensor, score: Score, precision: Precision) -> Result<Self> {
        match precision {
            Precision::Certified => Int8Keys::new(k, score).map(Self::Int8),
            Precision::Native => KeyBias::new(k, score).map(Self::Bias),
        }
    }

    /// The precision of decoding that reads this cache.
    pub fn precision(&self) -> Precision {
        match self {
            Self::Int8(_) => Precision::Certified,
            Self::Bias(_) => Precision::Native,
        }
    }
}

impl SequenceCache for KeyCache {
    fn lengths(&self) -> &[usize] {
        match self {
            Self::Int8(keys) => keys.lengths(),
            Self::Bias(bias) => bias.lengths(),
        }
    }

    fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        match self {
            Self::Int8(keys) => keys.write(k, at),
            Self::Bias(bias) => bias.write(k, at),
        }
    }

    fn select(&self, sequences: &[usize]) -> Result<Self> {
        match self {
            Self::Int8(keys) => keys.select(sequences).map(Self::Int8),
            Self::Bias(bias) => bias.select(sequences).map(Self::Bias),
        }
    }

    fn stack(caches: &[&Self]) -> Result<Self> {
        let (mut int8, mut bias) = (Vec::new(), Vec::new());
        for cache in caches {
            match cache {
                Self::Int8(keys) => int8.push(keys),
                Self::Bias(one) => bias.push(one),
            }
        }
        match (int8.as_slice(), bias.as_slice()) {
            (int8, []) => Int8Keys::stack(int8).map(Self::Int8),
            ([], bias) => KeyBias::stack(bias).map(Self::Bias),
            (int8, bias) => Err(Error::Invalid(format!(
                "{} caches of 8-bit keys and {} of key biases cannot be stacked",
                int8.len(),
                bias.len()
            ))),
        }
    }
}

/// A reference to data derived from cached keys, for [`Scan`](crate::Scan).
#[derive(Debug, Clone, Copy)]
pub enum CachedKeys<'a> {
    /// The keys as 8-bit integers.
    Int8(&'a Int8Keys),
    /// The biases of the keys.
    Bias(&'a KeyBias),
}

impl<'a> From<&'a KeyCache> for CachedKeys<'a> {
    fn from(cache: &'a KeyCache) -> Self {
        match cache {
            KeyCache::Int8(keys) => Self::Int8(keys),
            KeyCache::Bias(bias) => Self::Bias(bias),
        }
    }
}

impl<'a> From<&'a Int8Keys> for CachedKeys<'a> {
    fn from(keys: &'a Int8Keys) -> Self {
        Self::Int8(keys)
    }
}

impl<'a> From<&'a KeyBias> for CachedKeys<'a> {
    fn from(bias: &'a KeyBias) -> Self {
        Self::Bias(bias)
    }
}
