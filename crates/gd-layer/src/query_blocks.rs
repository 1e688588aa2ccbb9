//! A mechanism in blocks of queries, so that no matrix of all queries by all keys is stored.
//!
//! The queries of a mechanism are independent of each other: a block of them reads the keys from the first to the last one
//! that it sees, and is computed without a graph. The backward pass computes each block again, with a graph. Memory is that of
//! one block, and keys that no query of a block sees cost nothing.

use std::ops::Range;

use candle_core::{Device, Result, Tensor, Var};
use gd_kernels::{Mask, with_backward};

use crate::mechanisms::{AttentionMechanism, Inputs};

/// Queries of a block.
const BLOCK_QUERIES: usize = 64;

/// The visible keys of every query.
#[derive(Debug, Clone)]
pub(crate) struct Visible {
    /// One range per query, for every batch entry or once for all, `[B|1][N]`.
    ranges: Vec<Range<usize>>,
    queries: usize,
    keys: usize,
}

impl Visible {
    /// The keys that `mask` leaves visible, for B batch entries of N queries and M keys.
    pub(crate) fn new(mask: &Mask, [b, n, m]: [usize; 3]) -> Result<Self> {
        mask.validate(b, m)?;
        let entries = if mask.differs() { b } else { 1 };
        let ranges = (0..entries * n).map(|row| mask.visible(row / n, row % n, m)).collect();
        Ok(Self { ranges, queries: n, keys: m })
    }

    /// As a tensor for all queries and keys, u8 `[B|1, 1, N, M]`, 1 where a key is visible.
    pub(crate) fn all(&self, device: &Device) -> Result<Tensor> {
        self.tensor(0..self.queries, 0..self.keys, device)
    }

    /// As a tensor for some queries and keys. Only the first and the last visible key of each query are copied to the
    /// device.
    fn tensor(&self, queries: Range<usize>, keys: Range<usize>, device: &Device) -> Result<Tensor> {
        let ranges = || self.ranges.chunks(self.queries).flat_map(|entry| &entry[queries.clone()]);
        let column = |f: fn(&Range<usize>) -> u32| {
            let column: Vec<u32> = ranges().map(f).collect();
            Tensor::from_vec(column, (self.ranges.len() / self.queries, 1, queries.len(), 1), device)
        };
        let at = Tensor::arange(keys.start as u32, keys.end as u32, device)?.reshape((1, 1, 1, ()))?;
        at.broadcast_ge(&column(|range| range.start as u32)?)?
            * at.broadcast_lt(&column(|range| range.end as u32)?)?
    }

    /// The keys from the first to the last that these queries see; the first key if they see none.
    fn keys_of(&self, queries: Range<usize>) -> Range<usize> {
        let ranges = self.ranges.chunks(self.queries).flat_map(|entry| &entry[queries.clone()]);
        let nonempty = ranges.filter(|range| !range.is_empty()).cloned();
        nonempty.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..1)
    }
}

/// The output `out` `[B, H, N, Dv]` of a mechanism whose queries are independent, without the mask among its inputs.
pub(crate) fn attend(mechanism: &AttentionMechanism, inputs: &Inputs, visible: Visible) -> Result<Tensor> {
    let (inputs, narrow) = inputs.widened()?;
    let blocks = Blocks::new(mechanism.clone(), inputs.clone(), visible);
    let tensors: Vec<&Tensor> = blocks.names.iter().filter_map(|name| inputs.optional(name)).collect();
    let detached: Vec<Tensor> = tensors.iter().map(|t| t.detach()).collect();
    let mut out = blocks.forward(&detached)?;
    if tensors.iter().any(|t| t.track_op()) {
        out = with_backward(mechanism.name(), &tensors, &out, move |tensors, grad| {
            blocks.backward(tensors, grad)
        })?;
    }
    narrow.map_or(Ok(out.clone()), |dtype| out.to_dtype(dtype))
}

/// A mechanism, and what it reads besides the tensors that get gradients.
struct Blocks {
    mechanism: AttentionMechanism,
    inputs: Inputs,
    /// The inputs that get gradients.
    names: Vec<&'static str>,
    visible: Visible,
}

/// The dimension of the queries, and that of the keys, in an input of a mechanism.
fn dimensions(name: &str) -> (Option<usize>, Option<usize>) {
    match name {
        "q" | "gates" => (Some(2), None),
        "x" | "query_positions" => (Some(1), None),
        "k" | "v" => (None, Some(2)),
        "key_positions" => (None, Some(1)),
        _ => (None, None),
    }
}

impl Blocks {
    fn new(mechanism: AttentionMechanism, inputs: Inputs, visible: Visible) -> Self {
        let info = mechanism.info();
        let names = info.inputs.iter().chain(info.learned).map(|(name, _)| *name);
        let names = names.filter(|name| inputs.optional(name).is_some()).collect();
        Self { mechanism, inputs, names, visible }
    }

    /// Queries and keys of every block.
    fn ranges(&self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let n = self.visible.queries;
        (0..n).step_by(BLOCK_QUERIES).map(move |start| {
            let queries = start..n.min(start + BLOCK_QUERIES);
            (queries.clone(), self.visible.keys_of(queries))
        })
    }

    /// The part of an input that a block reads.
    fn part(name: &str, t: &Tensor, queries: &Range<usize>, keys: &Range<usize>) -> Result<Tensor> {
        let (of_queries, of_keys) = dimensions(name);
        let narrowed = [(of_queries, queries), (of_keys, keys)].into_iter();
        let mut narrowed = narrowed.filter_map(|(dim, range)| Some((dim?, range)));
        narrowed.try_fold(t.clone(), |t, (dim, range)| t.narrow(dim, range.start, range.len()))
    }

    /// The output of a block whose tensors with gradients are `parts`.
    fn block(&self, parts: &[Tensor], queries: &Range<usize>, keys: &Range<usize>) -> Result<Tensor> {
        let mut inputs = Inputs::new();
        for (name, t) in self.inputs.iter().filter(|(name, _)| !self.names.contains(name)) {
            inputs.insert(name, Self::part(name, t, queries, keys)?);
        }
        for (name, t) in self.names.iter().zip(parts) {
            inputs.insert(name, t.clone());
        }
        let device = inputs.get("q")?.device().clone();
        inputs.insert("mask", self.visible.tensor(queries.clone(), keys.clone(), &device)?);
        self.mechanism.attend(&inputs)?.get("out").cloned()
    }

    fn forward(&self, tensors: &[Tensor]) -> Result<Tensor> {
        let rows = self.ranges().map(|(queries, keys)| {
            let parts = self.names.iter().zip(tensors).map(|(name, t)| Self::part(name, t, &queries, &keys));
            self.block(&parts.collect::<Result<Vec<_>>>()?, &queries, &keys)
        });
        Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)
    }

    /// The gradients of `sum(out * grad)`.
    fn backward(&self, tensors: &[Tensor], grad: &Tensor) -> Result<Vec<Tensor>> {
        let mut sums = tensors.iter().map(Tensor::zeros_like).collect::<Result<Vec<_>>>()?;
        for (queries, keys) in self.ranges() {
            let leaf = |(name, t): (&&str, &Tensor)| Var::from_tensor(&Self::part(name, t, &queries, &keys)?);
            let leaves = self.names.iter().zip(tensors).map(leaf).collect::<Result<Vec<_>>>()?;
            let parts: Vec<Tensor> = leaves.iter().map(|leaf| leaf.as_tensor().clone()).collect();
            let out = self.block(&parts, &queries, &keys)?;
            let grads = (out * grad.narrow(2, queries.start, queries.len())?)?.sum_all()?.backward()?;
            for ((name, leaf), sum) in self.names.iter().zip(&leaves).zip(&mut sums) {
                let Some(part) = grads.get(leaf) else { continue };
                let (of_queries, of_keys) = dimensions(name);
                let padded = match (of_queries, of_keys) {
                    (Some(dim), _) => pad(part, dim, &queries, sum.dim(dim)?)?,
                    (_, Some(dim)) => pad(part, dim, &keys, sum.dim(dim)?)?,
                    (None, None) => part.clone(),
                };
                *sum = (&*sum + padded)?.detach();
            }
        }
        Ok(sums)
    }
}

/// `part` at its place in a dimension of `size`, with zeros elsewhere.
fn pad(part: &Tensor, dim: usize, place: &Range<usize>, size: usize) -> Result<Tensor> {
    part.pad_with_zeros(dim, place.start, size - place.end)
}
