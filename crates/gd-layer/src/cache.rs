//! The state of one layer between decoding steps.
//!
//! A cache holds a batch of sequences, each with its own number of positions: what stands behind the end of
//! a shorter one is for no query to see.

use candle_core::{Result, Tensor};
use gd_kernels::{AppendBuffer, AverageState, DecodeUse, Precision, Score, SequenceCache};

use crate::derived::{DerivedCache, DerivedOptions, KeyPrior};

/// The dimension of the positions in keys, values `[B, Hk, M, D]` and prior `[B, Hk, M]`.
const POSITIONS: usize = 2;

/// The least capacity of a cache, in positions; a greater one is a multiple of it.
const MIN_CAPACITY: usize = 256;

/// Keys, values, key prior, the last inputs of the convolution and the running averages of one layer. A selecting layer
/// adds data that decoding reads instead of the keys: on the CPU the keys as 8-bit integers (D + 16 bytes each), on a GPU
/// their biases. Nothing in it carries a gradient. Clones share their memory until one of them is appended to.
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_kernels::Mask;
/// use gd_layer::{Attention, AttentionConfig, GdAttention, LayerCache, Pass, RopeScaling, Rotary};
///
/// let (device, weights) = (Device::Cpu, VarMap::new());
/// let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
/// let rotary = Arc::new(Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &device)?);
/// let attention = GdAttention::new(&AttentionConfig::new(32, 4, 8), rotary, vb)?;
///
/// // A prompt of 10 positions, then two steps of one position.
/// let mut cache = LayerCache::new();
/// for rows in [10, 1, 1] {
///     let x = Tensor::randn(0f32, 1.0, (1, rows, 32), &device)?;
///     let mask = Mask::causal(cache.len() as i64);
///     attention.attend(&x, &Pass::new(&mask), Some(&mut cache))?;
/// }
/// assert_eq!(cache.lengths(), [12]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    keys: Option<AppendBuffer>,
    values: Option<AppendBuffer>,
    prior: Option<AppendBuffer>,
    /// None before the first pass of a selecting layer.
    derived: Option<DerivedCache>,
    precision: Option<Precision>,
    /// Last inputs of the causal convolution `[B, W-1, C]`.
    pub(crate) conv: Option<Tensor>,
    /// Running averages of the Beacon's memory.
    pub(crate) average: Option<AverageState>,
}

/// Appends `next`; returns all positions.
fn push(slot: &mut Option<AppendBuffer>, next: &Tensor) -> Result<Tensor> {
    let held = match slot {
        Some(held) => held,
        none => {
            let mut dims = next.dims().to_vec();
            dims[POSITIONS] = dims[POSITIONS].next_multiple_of(MIN_CAPACITY);
            none.insert(AppendBuffer::new(&dims, next.dtype(), next.device())?)
        }
    };
    held.append(next)?;
    Ok(held.get()?)
}

impl LayerCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty cache for decoding at this precision instead of the one that suits the device. The results are the
    /// same.
    pub fn with_precision(precision: Precision) -> Self {
        Self { precision: Some(precision), ..Self::default() }
    }

    /// Positions held, of the longest sequence.
    pub fn len(&self) -> usize {
        self.keys.as_ref().map_or(0, AppendBuffer::longest)
    }

    /// Positions held of every sequence; nothing for an empty cache.
    pub fn lengths(&self) -> &[usize] {
        self.keys.as_ref().map_or(&[], AppendBuffer::lengths)
    }

    /// The sequences of caches of the same layer as one batch. An empty cache has none.
    ///
    /// # Errors
    /// Caches of different layers.
    pub fn stack(caches: &[&Self]) -> Result<Self> {
        if let [one] = caches {
            return Ok((*one).clone());
        }
        let grown = |part: fn(&Self) -> Option<&AppendBuffer>| -> Result<Option<AppendBuffer>> {
            let all: Vec<_> = caches.iter().filter_map(|cache| part(cache)).collect();
            Ok(if all.is_empty() { None } else { Some(AppendBuffer::stack(&all)?) })
        };
        let filled = caches.iter().filter(|cache| !cache.is_empty());
        let derived: Option<Vec<&DerivedCache>> = filled.map(|cache| cache.derived.as_ref()).collect();
        let cat = |part: fn(&Self) -> Option<&Tensor>| -> Result<Option<Tensor>> {
            let rows: Vec<_> = caches.iter().filter_map(|cache| part(cache)).collect();
            if rows.is_empty() { Ok(None) } else { Tensor::cat(&rows, 0).map(Some) }
        };
        let mean = cat(|cache| cache.average.as_ref().map(|a| &a.mean))?;
        let log_weight = cat(|cache| cache.average.as_ref().map(|a| &a.log_weight))?;
        Ok(Self {
            keys: grown(|cache| cache.keys.as_ref())?,
            values: grown(|cache| cache.values.as_ref())?,
            prior: grown(|cache| cache.prior.as_ref())?,
            derived: derived
                .filter(|derived| !derived.is_empty())
                .map(|derived| DerivedCache::stack(&derived))
                .transpose()?,
            precision: caches.iter().find_map(|cache| cache.precision),
            conv: cat(|cache| cache.conv.as_ref())?,
            average: mean.zip(log_weight).map(|(mean, log_weight)| AverageState { mean, log_weight }),
        })
    }

    /// Some of the sequences, by their places in the batch.
    ///
    /// # Errors
    /// A place beyond the batch.
    pub fn select(&self, places: &[usize]) -> Result<Self> {
        // A GPU has no tensors of nothing.
        let Some(keys) = self.keys.as_ref().filter(|_| !places.is_empty()) else {
            return Ok(Self { precision: self.precision, ..Self::new() });
        };
        if let Some(place) = places.iter().find(|place| **place >= keys.lengths().len()) {
            candle_core::bail!("sequence {place} of a cache of {}", keys.lengths().len());
        }
        let rows: Vec<u32> = places.iter().map(|&place| place as u32).collect();
        let rows = Tensor::new(rows, keys.buffer().device())?;
        let grown = |part: &Option<AppendBuffer>| -> Result<Option<AppendBuffer>> {
            Ok(part.as_ref().map(|part| part.select(places)).transpose()?)
        };
        let average = |state: &AverageState| -> Result<AverageState> {
            Ok(AverageState {
                mean: state.mean.index_select(&rows, 0)?,
                log_weight: state.log_weight.index_select(&rows, 0)?,
            })
        };
        Ok(Self {
            keys: grown(&self.keys)?,
            values: grown(&self.values)?,
            prior: grown(&self.prior)?,
            derived: self.derived.as_ref().map(|derived| derived.select(places)).transpose()?,
            precision: self.precision,
            conv: self.conv.as_ref().map(|conv| conv.index_select(&rows, 0)).transpose()?,
            average: self.average.as_ref().map(average).transpose()?,
        })
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends k, v `[B, Hk, N, D]` and prior `[B, Hk, N]`; returns all positions held.
    pub(crate) fn extend(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        prior: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let prior = prior.map(|p| push(&mut self.prior, p)).transpose()?;
        Ok((push(&mut self.keys, k)?, push(&mut self.values, v)?, prior))
    }

    /// The derived data of a selecting layer, updated for all cached positions: data for scans with this score, if decoding
    /// `reads` such data, and the layer's prior.
    pub(crate) fn update_derived(
        &mut self,
        score: Score,
        reads: Option<DecodeUse>,
        prior: Option<&KeyPrior>,
    ) -> Result<Option<&DerivedCache>> {
        let Some(keys) = &self.keys else { return Ok(None) };
        let options = DerivedOptions { score, reads, precision: self.precision, prior };
        let derived = self.derived.get_or_insert_default();
        derived.update(keys, self.prior.as_ref(), &options)?;
        Ok(Some(derived))
    }
}
