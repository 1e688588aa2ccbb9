//! A block of query rows, and its scores with a block of keys.

use std::ops::Range;

use num_traits::Zero;

use super::Problem;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::matrix::{Left, PAD, Padded, multiply, padded};
use crate::backend::cpu::parallel::par_chunks;
use crate::backend::cpu::view::View;

/// Query rows of a block, a multiple of the rows of a register tile.
pub(super) const BLOCK_ROWS: usize = 96;
/// Keys of a block. The scores of a block, 96 x 256 numbers, fit the L2 cache together with the keys and values.
pub(super) const BLOCK_KEYS: usize = 256;

/// The first `len` elements of rows as accumulators, padded with zeros.
pub(super) fn gather<T: Element>(
    view: View<'_, T>,
    len: usize,
    rows: impl Iterator<Item = (usize, usize, usize)>,
    out: &mut Vec<T::Acc>,
) {
    out.clear();
    for (a, b, c) in rows {
        out.extend(view.row(a, b, c)[..len].iter().map(|x| x.up()));
        out.resize(out.len().next_multiple_of(padded(len)), T::Acc::zero());
    }
}

/// The first `len` elements of the rows of all heads as accumulators, `[B * Hk, M, padded(len)]`.
pub(super) fn rows_of_heads<T: Element>(problem: &Problem, view: View<'_, T>, len: usize) -> Vec<T::Acc> {
    let (sizes, row) = (problem.sizes, padded(len));
    let mut rows = vec![T::Acc::zero(); sizes.batch * sizes.kv_heads * sizes.keys * row];
    par_chunks(&mut rows, sizes.keys * row, &|head, rows| {
        for (j, out) in rows.chunks_exact_mut(row).enumerate() {
            let row = view.row(head / sizes.kv_heads, head % sizes.kv_heads, j);
            out.iter_mut().zip(&row[..len]).for_each(|(out, x)| *out = x.up());
        }
    });
    rows
}

/// The same transposed in blocks of keys, `[B * Hk, blocks, len, BLOCK_KEYS]`.
pub(super) fn columns_of_heads<T: Element>(problem: &Problem, view: View<'_, T>, len: usize) -> Vec<T::Acc> {
    let sizes = problem.sizes;
    let blocks = sizes.keys.div_ceil(BLOCK_KEYS);
    let mut columns = vec![T::Acc::zero(); sizes.batch * sizes.kv_heads * blocks * len * BLOCK_KEYS];
    par_chunks(&mut columns, len * BLOCK_KEYS, &|i, columns| {
        let (head, block) = (i / blocks, i % blocks);
        let keys = block * BLOCK_KEYS..sizes.keys.min((block + 1) * BLOCK_KEYS);
        for (at, j) in keys.enumerate() {
            let row = view.row(head / sizes.kv_heads, head % sizes.kv_heads, j);
            columns[at..].iter_mut().step_by(BLOCK_KEYS).zip(&row[..len]).for_each(|(out, x)| *out = x.up());
        }
    });
    columns
}

/// The prior of all keys `[B * Hk, M]`, the last elements of the rows of k.
pub(super) fn prior_of_rows<T: Element>(problem: &Problem, k: View<'_, T>) -> Vec<T::Acc> {
    let sizes = problem.sizes;
    let heads = (0..sizes.batch * sizes.kv_heads).map(|head| (head / sizes.kv_heads, head % sizes.kv_heads));
    heads.flat_map(|(b, h)| (0..sizes.keys).map(move |j| k.row(b, h, j)[sizes.head_dim].up())).collect()
}

/// Consecutive keys of a head, within a block, and the columns of its scores: those of the keys and up to 15 before, so
/// that they start at a whole register.
#[derive(Clone)]
pub(super) struct KeyRange {
    /// The number of the head, `b * Hk + h`.
    pub(super) head: usize,
    pub(super) keys: Range<usize>,
}

impl KeyRange {
    /// The keys of the columns of the scores.
    pub(super) fn columns(&self) -> Range<usize> {
        self.keys.start / PAD * PAD..self.keys.end
    }

    /// The column of the first key.
    pub(super) fn offset(&self) -> usize {
        self.keys.start % PAD
    }

    /// The prior of the keys of the columns, from that of all keys `[B * Hk, M]`.
    pub(super) fn prior<'a, A>(&self, problem: &Problem, prior: &'a [A]) -> &'a [A] {
        &prior[self.head * problem.sizes.keys..][self.columns()]
    }

    /// These keys in the result of [`rows_of_heads`] with rows of `len` elements.
    pub(super) fn rows<'a, A>(&self, problem: &Problem, rows: &'a [A], len: usize) -> Padded<&'a [A]> {
        let stride = padded(len);
        Padded { data: &rows[(self.head * problem.sizes.keys + self.keys.start) * stride..], stride }
    }

    /// The columns of the scores in the result of [`columns_of_heads`] with `len` rows.
    fn transposed<'a, A>(&self, problem: &Problem, columns: &'a [A], len: usize) -> Padded<&'a [A]> {
        let (blocks, from) = (problem.sizes.keys.div_ceil(BLOCK_KEYS), self.columns().start);
        let block = (self.head * blocks + from / BLOCK_KEYS) * len * BLOCK_KEYS;
        let end = block + len * BLOCK_KEYS;
        Padded { data: &columns[block + from % BLOCK_KEYS..end], stride: BLOCK_KEYS }
    }

    /// The products of `rows` rows of `len` elements with the columns of [`columns_of_heads`], in rows of BLOCK_KEYS.
    pub(super) fn products<A: Real>(
        &self,
        problem: &Problem,
        (left, rows): (&[A], usize),
        (columns, len): (&[A], usize),
        scale: A,
        out: &mut [A],
    ) {
        let left = Left::new(left, rows, len, padded(len));
        let out = Padded { data: out, stride: BLOCK_KEYS };
        multiply(out, self.columns().len(), false, scale, left, self.transposed(problem, columns, len));
    }
}

/// Consecutive query rows that share the keys of a head: row `r` is that of query `r % N` of query head `r / N` of the
/// group.
pub(super) struct QueryRows {
    batch: usize,
    kv_head: usize,
    first: usize,
    count: usize,
}

impl QueryRows {
    /// `count` rows from row `first` on of head `b * Hk + h`.
    pub(super) fn new(problem: &Problem, head: usize, first: usize, count: usize) -> Self {
        let kv_heads = problem.sizes.kv_heads;
        Self { batch: head / kv_heads, kv_head: head % kv_heads, first, count }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The indices of the rows in a tensor `[B, Hq, N, ..]`.
    pub(super) fn indices(&self, problem: &Problem) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (n, group) = (problem.sizes.queries, problem.sizes.q_heads / problem.sizes.kv_heads);
        let (batch, head) = (self.batch, self.kv_head * group);
        (self.first..self.first + self.count).map(move |r| (batch, head + r / n, r % n))
    }

    /// The visible keys of every row.
    pub(super) fn visible(&self, problem: &Problem) -> Vec<Range<usize>> {
        let keys = problem.sizes.keys;
        self.indices(problem).map(|(b, _, i)| problem.mask.visible(b, i, keys)).collect()
    }
}

/// The part of `range` in `keys`, counted from the start of `keys`.
pub(super) fn within(range: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(keys.start, keys.end);
    let end = range.end.clamp(start, keys.end);
    start - keys.start..end - keys.start
}
