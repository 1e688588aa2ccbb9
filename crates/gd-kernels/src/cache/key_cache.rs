//! What a cache keeps beside its keys for decoding at one precision.

use candle_core::Tensor;

use crate::cache::append_buffer::WritePosition;
use crate::cache::int8_keys::Int8Keys;
use crate::cache::key_bias::KeyBias;
use crate::error::{Error, Result};
use crate::ops::scan::Scan;
use crate::options::{Precision, Score};

/// What decoding reads beside the keys `[B, Hk, M, D]` of a cache, or instead of them: computed once for every key,
/// when it comes.
#[derive(Debug, Clone)]
pub enum KeyCache {
    /// The keys as 8-bit integers, at certified precision.
    Quantized(Int8Keys),
    /// Their biases, at native precision on a GPU.
    Bias(KeyBias),
}

impl KeyCache {
    /// None yet, for batch entries (or pages), heads, head_dim, dtype and device as those of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// Native precision on the CPU, where nothing is to be kept; a tensor of another rank, dtype or device.
    pub fn like(k: &Tensor, score: Score, precision: Precision) -> Result<Self> {
        match precision {
            Precision::Certified => Int8Keys::like(k, score).map(Self::Quantized),
            Precision::Native => KeyBias::like(k, score).map(Self::Bias),
        }
    }

    /// The same with the keys k.
    ///
    /// # Errors
    /// As [`KeyCache::like`].
    pub fn new(k: &Tensor, score: Score, precision: Precision) -> Result<Self> {
        match precision {
            Precision::Certified => Int8Keys::new(k, score).map(Self::Quantized),
            Precision::Native => KeyBias::new(k, score).map(Self::Bias),
        }
    }

    /// Writes k `[R, Hk, m, D]`, its entry r over the keys of batch entry (or page) `at[r][0]` from key `at[r][1]` on,
    /// or behind them.
    ///
    /// # Errors
    /// As [`Int8Keys::write`].
    pub fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        match self {
            Self::Quantized(keys) => keys.write(k, at),
            Self::Bias(bias) => bias.write(k, at),
        }
    }

    /// Keys of every batch entry.
    pub fn lengths(&self) -> &[usize] {
        match self {
            Self::Quantized(keys) => keys.lengths(),
            Self::Bias(bias) => bias.lengths(),
        }
    }

    /// Some of the batch entries, in any order.
    ///
    /// # Errors
    /// One that is not there.
    pub fn select(&self, entries: &[usize]) -> Result<Self> {
        match self {
            Self::Quantized(keys) => keys.select(entries).map(Self::Quantized),
            Self::Bias(bias) => bias.select(entries).map(Self::Bias),
        }
    }

    /// The batch entries of several, in their order.
    ///
    /// # Errors
    /// None to stack, or what is not of one cache.
    pub fn stack(all: &[&Self]) -> Result<Self> {
        let (mut quantized, mut biases) = (Vec::new(), Vec::new());
        for one in all {
            match one {
                Self::Quantized(keys) => quantized.push(keys),
                Self::Bias(bias) => biases.push(bias),
            }
        }
        match (quantized.as_slice(), biases.as_slice()) {
            (keys, []) => Int8Keys::stack(keys).map(Self::Quantized),
            ([], bias) => KeyBias::stack(bias).map(Self::Bias),
            (keys, bias) => Err(Error::Invalid(format!(
                "{} caches of 8-bit keys and {} of key biases are not of one precision",
                keys.len(),
                bias.len()
            ))),
        }
    }

    /// The scan that reads what is kept, at its precision.
    pub fn scan<'a>(&'a self, scan: Scan<'a>) -> Scan<'a> {
        match self {
            Self::Quantized(keys) => {
                Scan { precision: Precision::Certified, quantized: Some(keys), key_bias: None, ..scan }
            }
            Self::Bias(bias) => {
                Scan { precision: Precision::Native, quantized: None, key_bias: Some(bias), ..scan }
            }
        }
    }
}
