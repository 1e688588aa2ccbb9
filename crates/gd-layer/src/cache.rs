//! The state of one layer between decoding steps.
//!
//! A cache holds a batch of sequences, each with its own number of positions. Positions beyond the end of a shorter
//! sequence are padding, which the mask hides from every query.

use candle_core::{DType, Result, Tensor};
use gd_kernels::{AppendBuffer, AverageState, DecodeUse, Precision, Score, SequenceCache, rounded_for_cache};

use crate::derived::{DerivedCache, DerivedOptions, KeyPrior};

/// The dimension of the positions in keys, values `[B, Hk, M, D]` and prior `[B, Hk, M]`.
const POSITIONS: usize = 2;

/// The smallest capacity of a cache, in positions; the initial capacity is a multiple of it.
const MIN_CAPACITY: usize = 256;

/// Keys, values, key prior, the last inputs of the convolution and of induction heads, the running averages and the state
/// of the mechanism of one layer. A selecting layer adds data that it derives from the keys for decoding: on the CPU the
/// keys as 8-bit integers (D + 16 bytes each), on a GPU their biases. The tensors carry no gradient. Clones share their
/// memory until one of them is appended to.
///
/// On the CPU, a layer that computes in f32 can cache keys and values in f16 or bf16 ([`LayerCache::with_dtype`]). They are
/// rounded when they are appended, and every query, those of the same pass included, reads the rounded ones; so does the
/// derived data. All else stays in the dtype of the layer. Softmax attention and selection read the rounded keys and values
/// in place; other mechanisms widen them in each pass.
///
/// # Examples
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
    /// Cached positions of every sequence.
    lengths: Vec<usize>,
    /// Keys `[B, Hk, M, D]`; none in a layer whose heads do not read.
    keys: Option<AppendBuffer>,
    /// Values `[B, Hk, M, D]`.
    values: Option<AppendBuffer>,
    /// Learned prior `[B, Hk, M]`.
    prior: Option<AppendBuffer>,
    /// None before the first pass of a selecting layer, and in a softmax layer.
    derived: Option<DerivedCache>,
    options: Options,
    /// Last inputs of the causal convolution `[B, W-1, C]`.
    pub(crate) conv: Option<Tensor>,
    /// Last input of the key projection of induction heads `[B, 1, C]`.
    pub(crate) last_input: Option<Tensor>,
    /// Running averages of the Beacon's memory.
    pub(crate) average: Option<AverageState>,
    /// What a mechanism passes on from pass to pass: one number per cached position `[B, M]`, or tensors `[B, ..]` of constant
    /// size in place of keys and values.
    pub(crate) state: Vec<Tensor>,
}

/// How a cache is configured.
#[derive(Debug, Clone, Copy, Default)]
struct Options {
    /// The dtype of keys and values; none for that of the layer.
    dtype: Option<DType>,
    /// Precision of decoding; none for the default of the device.
    precision: Option<Precision>,
    /// Positions for which memory is allocated at first.
    capacity: usize,
}

/// Appends `next` to the buffer in `slot`, a new one for at least `capacity` positions if there is none; returns all
/// positions.
fn append(slot: &mut Option<AppendBuffer>, next: &Tensor, capacity: usize) -> Result<Tensor> {
    let buffer = match slot {
        Some(buffer) => buffer,
        none => {
            let mut dims = next.dims().to_vec();
            dims[POSITIONS] = dims[POSITIONS].max(capacity).next_multiple_of(MIN_CAPACITY);
            none.insert(AppendBuffer::new(&dims, next.dtype(), next.device())?)
        }
    };
    buffer.append(next)?;
    Ok(buffer.get()?)
}

/// The states of all caches. Those with one number per position get zeros for the positions that shorter ones do not have.
fn stack_states(caches: &[&LayerCache]) -> Result<Vec<Tensor>> {
    let states: Vec<&Vec<Tensor>> =
        caches.iter().map(|cache| &cache.state).filter(|s| !s.is_empty()).collect();
    let Some(first) = states.first() else { return Ok(Vec::new()) };
    let stack = |i: usize| {
        let all: Vec<&Tensor> = states.iter().filter_map(|state| state.get(i)).collect();
        if first[i].rank() != 2 {
            return Tensor::cat(&all, 0);
        }
        let lengths = all.iter().map(|state| state.dim(1)).collect::<Result<Vec<_>>>()?;
        let longest = lengths.into_iter().max().unwrap_or(0);
        Tensor::cat(&all.iter().map(|state| fit_state(state, longest)).collect::<Result<Vec<_>>>()?, 0)
    };
    (0..first.len()).map(stack).collect()
}

/// A state `[B, M]` with zeros up to `positions`, or without those beyond, which are padding.
pub(crate) fn fit_state(state: &Tensor, positions: usize) -> Result<Tensor> {
    match positions.checked_sub(state.dim(1)?) {
        Some(more) => state.pad_with_zeros(1, 0, more),
        None => state.narrow(1, 0, positions),
    }
}

impl LayerCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the precision of decoding, instead of the default of the device. The results are the same.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.options.precision = Some(precision);
        self
    }

    /// Sets the dtype in which an empty cache stores keys and values, instead of that of the layer: on the CPU f16 or bf16
    /// for a layer in f32. A pass that appends a finite number beyond the range of the dtype (f16: 65504) is an error.
    #[must_use]
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.options.dtype = Some(dtype);
        self
    }

    /// Sets the number of positions for which an empty cache allocates memory at first. A cache with more positions grows,
    /// at least to the double, which copies it.
    #[must_use]
    pub fn with_capacity(mut self, positions: usize) -> Self {
        self.options.capacity = positions;
        self
    }

    /// The number of cached positions of the longest sequence.
    pub fn len(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// The number of cached positions of every sequence; empty for an empty cache.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// One cache with the sequences of all `caches`, which belong to the same layer, in order. An empty cache has no
    /// sequences.
    ///
    /// # Errors
    /// Caches of different layers.
    pub fn stack(caches: &[&Self]) -> Result<Self> {
        if let [one] = caches {
            return Ok((*one).clone());
        }
        let buffers = |part: fn(&Self) -> Option<&AppendBuffer>| -> Result<Option<AppendBuffer>> {
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
            lengths: caches.iter().flat_map(|cache| cache.lengths.iter().copied()).collect(),
            keys: buffers(|cache| cache.keys.as_ref())?,
            values: buffers(|cache| cache.values.as_ref())?,
            prior: buffers(|cache| cache.prior.as_ref())?,
            derived: derived
                .filter(|derived| !derived.is_empty())
                .map(|derived| DerivedCache::stack(&derived))
                .transpose()?,
            options: Options {
                dtype: caches.iter().find_map(|cache| cache.options.dtype),
                precision: caches.iter().find_map(|cache| cache.options.precision),
                capacity: caches.iter().map(|cache| cache.options.capacity).max().unwrap_or(0),
            },
            conv: cat(|cache| cache.conv.as_ref())?,
            last_input: cat(|cache| cache.last_input.as_ref())?,
            average: mean.zip(log_weight).map(|(mean, log_weight)| AverageState { mean, log_weight }),
            state: stack_states(caches)?,
        })
    }

    /// A cache of some of the sequences, by their indices in the batch.
    ///
    /// # Errors
    /// An index beyond the batch.
    pub fn select(&self, sequences: &[usize]) -> Result<Self> {
        // candle has no empty tensors on a GPU.
        let of_batch = self.conv.iter().chain(&self.last_input).chain(&self.state);
        let device = self.keys.as_ref().map(|keys| keys.buffer().device());
        let device = device.or_else(|| self.average.as_ref().map(|average| average.mean.device()));
        let device = device.or_else(|| of_batch.map(Tensor::device).next());
        let Some(device) = device.filter(|_| !sequences.is_empty()) else {
            return Ok(Self { options: self.options, ..Self::new() });
        };
        if let Some(sequence) = sequences.iter().find(|sequence| **sequence >= self.lengths.len()) {
            candle_core::bail!("sequence {sequence} of a cache of {}", self.lengths.len());
        }
        let rows: Vec<u32> = sequences.iter().map(|&sequence| sequence as u32).collect();
        let rows = Tensor::new(rows, device)?;
        let buffers = |part: &Option<AppendBuffer>| -> Result<Option<AppendBuffer>> {
            Ok(part.as_ref().map(|part| part.select(sequences)).transpose()?)
        };
        let average = |state: &AverageState| -> Result<AverageState> {
            Ok(AverageState {
                mean: state.mean.index_select(&rows, 0)?,
                log_weight: state.log_weight.index_select(&rows, 0)?,
            })
        };
        Ok(Self {
            lengths: sequences.iter().map(|&sequence| self.lengths[sequence]).collect(),
            keys: buffers(&self.keys)?,
            values: buffers(&self.values)?,
            prior: buffers(&self.prior)?,
            derived: self.derived.as_ref().map(|derived| derived.select(sequences)).transpose()?,
            options: self.options,
            conv: self.conv.as_ref().map(|conv| conv.index_select(&rows, 0)).transpose()?,
            last_input: self.last_input.as_ref().map(|x| x.index_select(&rows, 0)).transpose()?,
            average: self.average.as_ref().map(average).transpose()?,
            state: self.state.iter().map(|state| state.index_select(&rows, 0)).collect::<Result<_>>()?,
        })
    }

    /// Whether all of the cache belongs to single positions, so that it can be shortened. The last inputs of a convolution
    /// and of induction heads, running averages and the states of mechanisms belong to all positions together.
    pub fn is_positional(&self) -> bool {
        self.conv.is_none() && self.last_input.is_none() && self.average.is_none() && self.state.is_empty()
    }

    /// A cache of the first `positions` positions of every sequence, in memory of its own.
    ///
    /// # Errors
    /// More positions than a sequence has, or a cache that is not [positional](LayerCache::is_positional).
    pub fn shortened(&self, positions: usize) -> Result<Self> {
        if let Some(length) = self.lengths().iter().find(|length| **length < positions) {
            candle_core::bail!("{positions} positions of a sequence of {length}");
        }
        if !self.is_positional() {
            candle_core::bail!(
                "a cache with a state of all its positions cannot be shortened to {positions}"
            );
        }
        let options = Options { capacity: 0, ..self.options };
        let empty = Self { options, ..Self::new() };
        if positions == 0 {
            return Ok(empty);
        }
        let first = |part: &Option<AppendBuffer>| -> Result<Option<AppendBuffer>> {
            let Some(part) = part else { return Ok(None) };
            let mut shortened = None;
            let stored = part.buffer().narrow(POSITIONS, 0, positions)?;
            append(&mut shortened, &stored, positions)?;
            Ok(shortened)
        };
        // The next pass derives its data again.
        Ok(Self {
            lengths: vec![positions; self.lengths.len()],
            keys: first(&self.keys)?,
            values: first(&self.values)?,
            prior: first(&self.prior)?,
            ..empty
        })
    }

    /// Whether there are no cached positions.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts n more positions of each of the b sequences.
    pub(crate) fn advance(&mut self, b: usize, n: usize) {
        self.lengths.resize(b, 0);
        self.lengths.iter_mut().for_each(|length| *length += n);
    }

    /// Appends k, v `[B, Hk, N, D]` and prior `[B, Hk, N]`; returns those of all cached positions, keys and values in the
    /// dtype of the cache.
    pub(crate) fn extend(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        prior: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        // Before anything is appended, so that a number beyond the range of the dtype leaves the cache as it was.
        let stored = |t: &Tensor| rounded_for_cache(t, self.options.dtype.unwrap_or(t.dtype()));
        let (k, v) = (stored(k)?, stored(v)?);
        let capacity = self.options.capacity;
        let prior = prior.map(|p| append(&mut self.prior, p, capacity)).transpose()?;
        self.advance(k.dim(0)?, k.dim(2)?);
        Ok((append(&mut self.keys, &k, capacity)?, append(&mut self.values, &v, capacity)?, prior))
    }

    /// The derived data of a selecting layer, updated to all cached positions: data for decoding with this score, if
    /// `reads` is given, and the prior that `prior` computes.
    pub(crate) fn update_derived(
        &mut self,
        score: Score,
        reads: Option<DecodeUse>,
        prior: Option<&KeyPrior>,
    ) -> Result<Option<&DerivedCache>> {
        let Some(keys) = &self.keys else { return Ok(None) };
        let options = DerivedOptions { score, reads, precision: self.options.precision, prior };
        let derived = self.derived.get_or_insert_default();
        derived.update(keys, self.prior.as_ref(), &options)?;
        Ok(Some(derived))
    }
}
