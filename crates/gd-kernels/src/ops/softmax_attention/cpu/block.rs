//! A block of query rows, and its scores with a block of keys.

use std::ops::Range;

use super::Problem;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::matrix::{Matrix, multiply};
use crate::backend::cpu::view::View;

/// Query rows of a block.
pub(super) const BLOCK_ROWS: usize = 64;
/// Keys of a block. The scores of a block, 64 x 256 numbers, fit the L2 cache together with the keys and values.
pub(super) const BLOCK_KEYS: usize = 256;

/// Rows of one head as accumulators, without the last element of a row beyond `len`.
pub(super) fn gather<T: Element>(
    view: View<'_, T>,
    len: usize,
    rows: impl Iterator<Item = (usize, usize, usize)>,
    out: &mut Vec<T::Acc>,
) {
    out.clear();
    for (a, b, c) in rows {
        out.extend(view.row(a, b, c)[..len].iter().map(|x| x.up()));
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
    pub(super) fn new(batch: usize, kv_head: usize, first: usize, count: usize) -> Self {
        Self { batch, kv_head, first, count }
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

/// The keys from the first to the last that one of the rows sees.
pub(super) fn union(visible: &[Range<usize>]) -> Range<usize> {
    let ranges = || visible.iter().filter(|range| !range.is_empty());
    let start = ranges().map(|range| range.start).min().unwrap_or(0);
    start..ranges().map(|range| range.end).max().unwrap_or(start)
}

/// The part of `range` in `keys`, counted from the start of `keys`.
pub(super) fn within(range: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(keys.start, keys.end);
    let end = range.end.clamp(start, keys.end);
    start - keys.start..end - keys.start
}

/// A block of keys and values of one head as accumulators.
pub(super) struct KeyBlock<A> {
    pub(super) keys: Range<usize>,
    k: Vec<A>,
    v: Vec<A>,
    prior: Vec<A>,
    head_dim: usize,
    value_dim: usize,
}

impl<A: Real + 'static> KeyBlock<A> {
    pub(super) fn new(problem: &Problem) -> Self {
        let (head_dim, value_dim) = (problem.sizes.head_dim, problem.sizes.value_dim);
        Self { keys: 0..0, k: Vec::new(), v: Vec::new(), prior: Vec::new(), head_dim, value_dim }
    }

    /// Reads the keys of a head.
    pub(super) fn load<T: Element<Acc = A>>(
        &mut self,
        problem: &Problem,
        k: View<'_, T>,
        v: View<'_, T>,
        (batch, head): (usize, usize),
        keys: Range<usize>,
    ) {
        let rows = || keys.clone().map(|j| (batch, head, j));
        gather(k, self.head_dim, rows(), &mut self.k);
        gather(v, self.value_dim, rows(), &mut self.v);
        self.prior.clear();
        if problem.sizes.has_prior {
            self.prior.extend(rows().map(|(a, b, c)| k.row(a, b, c)[self.head_dim].up()));
        }
        self.keys = keys;
    }

    pub(super) fn k(&self) -> Matrix<'_, A> {
        Matrix::new(&self.k, self.keys.len(), self.head_dim, self.head_dim)
    }

    pub(super) fn v(&self) -> Matrix<'_, A> {
        Matrix::new(&self.v, self.keys.len(), self.value_dim, self.value_dim)
    }

    /// The scores of `rows` queries, `[rows, keys]`; those of keys that a query does not see are undefined.
    pub(super) fn scores(
        &self,
        problem: &Problem,
        q: &[A],
        rows: usize,
        visible: &[Range<usize>],
        out: &mut [A],
    ) {
        let q = Matrix::new(q, rows, self.head_dim, self.head_dim);
        multiply(out, self.keys.len(), false, A::of(problem.scale), q, self.k().t());
        if self.prior.is_empty() {
            return;
        }
        for (row, visible) in out.chunks_exact_mut(self.keys.len()).zip(visible) {
            let own = within(visible, &self.keys);
            row[own.clone()].iter_mut().zip(&self.prior[own]).for_each(|(s, &p)| *s += p);
        }
    }
}
