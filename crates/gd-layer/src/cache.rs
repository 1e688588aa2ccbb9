//! The state of one layer between decoding steps.
//!
//! A cache holds a batch of sequences, each with its own number of positions: what stands behind the end of
//! a shorter one is for no query to see.

use candle_core::{Result, Tensor};
use gd_kernels::AverageState;

/// Positions by which a growing cache is extended.
const BLOCK: usize = 256;

/// The dimension of the positions in keys, values `[B, Hk, M, D]` and prior `[B, Hk, M]`.
const POSITIONS: usize = 2;

/// A tensor that grows in its positions without copying what it holds at every step.
#[derive(Debug, Clone)]
struct Growing {
    buffer: Tensor,
    /// Positions of each sequence.
    lengths: Vec<usize>,
}

impl Growing {
    /// Room for sequences like `like`, of which nothing is held yet.
    fn new(like: &Tensor, lengths: Vec<usize>, capacity: usize) -> Result<Self> {
        let mut shape = like.dims().to_vec();
        shape[0] = lengths.len();
        shape[POSITIONS] = capacity.next_multiple_of(BLOCK);
        Ok(Self { buffer: Tensor::zeros(shape, like.dtype(), like.device())?, lengths })
    }

    /// Positions of the longest sequence.
    fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    fn append(&mut self, next: &Tensor) -> Result<()> {
        let next = next.detach().contiguous()?;
        let more = next.dims()[POSITIONS];
        let capacity = self.buffer.dims()[POSITIONS];
        if self.longest() + more > capacity {
            let room = (self.longest() + more).max(capacity * 2);
            let grown = Self::new(&self.buffer, self.lengths.clone(), room)?;
            grown.buffer.slice_set(&self.get()?.contiguous()?, POSITIONS, 0)?;
            *self = grown;
        }
        match self.lengths.iter().all(|length| *length == self.lengths[0]) {
            true => self.buffer.slice_set(&next, POSITIONS, self.lengths[0])?,
            false => {
                for (b, length) in self.lengths.iter().enumerate() {
                    self.buffer.narrow(0, b, 1)?.slice_set(&next.narrow(0, b, 1)?, POSITIONS, *length)?;
                }
            }
        }
        self.lengths.iter_mut().for_each(|length| *length += more);
        Ok(())
    }

    fn get(&self) -> Result<Tensor> {
        self.buffer.narrow(POSITIONS, 0, self.longest())
    }

    fn stack(all: &[&Self]) -> Result<Option<Self>> {
        let Some(first) = all.first() else { return Ok(None) };
        let lengths = all.iter().flat_map(|one| one.lengths.iter().copied()).collect();
        let longest = all.iter().map(|one| one.longest()).max().unwrap_or(0);
        let stacked = Self::new(&first.buffer, lengths, longest)?;
        let mut row = 0;
        for one in all {
            let rows = one.lengths.len();
            stacked.buffer.narrow(0, row, rows)?.slice_set(&one.get()?.contiguous()?, POSITIONS, 0)?;
            row += rows;
        }
        Ok(Some(stacked))
    }

    fn select(&self, rows: &Tensor, lengths: Vec<usize>) -> Result<Self> {
        Ok(Self { buffer: self.buffer.index_select(rows, 0)?, lengths })
    }
}

/// Keys, values, key prior, the convolution's last inputs and the running averages of one layer.
/// Nothing in it carries a gradient.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    keys: Option<Growing>,
    values: Option<Growing>,
    prior: Option<Growing>,
    /// Last inputs of the causal convolution `[B, W-1, C]`.
    pub(crate) conv: Option<Tensor>,
    /// Running averages of the Beacon's memory.
    pub(crate) average: Option<AverageState>,
}

fn push(slot: &mut Option<Growing>, next: &Tensor) -> Result<Tensor> {
    let mut grown = match slot.take() {
        Some(grown) => grown,
        None => Growing::new(next, vec![0; next.dim(0)?], next.dims()[POSITIONS])?,
    };
    grown.append(next)?;
    slot.insert(grown).get()
}

impl LayerCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions held, of the longest sequence.
    pub fn len(&self) -> usize {
        self.keys.as_ref().map_or(0, Growing::longest)
    }

    /// Positions held of every sequence; nothing for an empty cache.
    pub fn lengths(&self) -> &[usize] {
        self.keys.as_ref().map_or(&[], |keys| &keys.lengths)
    }

    /// The sequences of caches of the same layer as one batch. An empty cache has none.
    ///
    /// # Errors
    /// Caches of different layers.
    pub fn stack(caches: &[&Self]) -> Result<Self> {
        if let [one] = caches {
            return Ok((*one).clone());
        }
        let grown = |part: fn(&Self) -> Option<&Growing>| {
            Growing::stack(&caches.iter().filter_map(|cache| part(cache)).collect::<Vec<_>>())
        };
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
            conv: cat(|cache| cache.conv.as_ref())?,
            average: mean.zip(log_weight).map(|(mean, log_weight)| AverageState { mean, log_weight }),
        })
    }

    /// Some of the sequences, by their places in the batch.
    ///
    /// # Errors
    /// A place beyond the batch.
    pub fn select(&self, places: &[usize]) -> Result<Self> {
        let Some(keys) = &self.keys else { return Ok(Self::new()) };
        if let Some(place) = places.iter().find(|place| **place >= keys.lengths.len()) {
            candle_core::bail!("sequence {place} of a cache of {}", keys.lengths.len());
        }
        let lengths: Vec<usize> = places.iter().map(|&place| keys.lengths[place]).collect();
        let rows: Vec<u32> = places.iter().map(|&place| place as u32).collect();
        let rows = Tensor::new(rows, keys.buffer.device())?;
        let grown = |part: &Option<Growing>| {
            part.as_ref().map(|part| part.select(&rows, lengths.clone())).transpose()
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
}
