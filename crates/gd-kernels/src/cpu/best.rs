//! The K best (score, key) pairs of one query, kept in order.

use crate::element::Real;

/// Up to K pairs per row, best first; equal scores keep the order in which they were offered.
pub(crate) struct Best<A> {
    score: Vec<A>,
    key: Vec<u32>,
    len: Vec<usize>,
    capacity: usize,
}

impl<A: Real> Best<A> {
    /// Empty lists for `rows` queries.
    pub(crate) fn new(rows: usize, capacity: usize) -> Self {
        Self {
            score: vec![A::neg_infinity(); rows * capacity],
            key: vec![0; rows * capacity],
            len: vec![0; rows],
            capacity,
        }
    }

    /// A score must exceed this to enter the row's list.
    #[inline(always)]
    pub(crate) fn threshold(&self, row: usize) -> A {
        // Unfilled slots hold -inf, so an unfilled list takes every finite score.
        self.score[(row + 1) * self.capacity - 1]
    }

    /// Enters a finite score that exceeds the threshold.
    #[inline(always)]
    pub(crate) fn insert(&mut self, row: usize, score: A, key: usize) {
        if !score.is_finite() {
            return;
        }
        let base = row * self.capacity;
        let n = self.len[row];
        let mut at = if n < self.capacity { n } else { n - 1 };
        self.len[row] = (n + 1).min(self.capacity);
        while at > 0 && self.score[base + at - 1] < score {
            self.score[base + at] = self.score[base + at - 1];
            self.key[base + at] = self.key[base + at - 1];
            at -= 1;
        }
        self.score[base + at] = score;
        self.key[base + at] = key as u32;
    }

    /// The keys of a row, best first.
    pub(crate) fn keys(&self, row: usize) -> &[u32] {
        &self.key[row * self.capacity..row * self.capacity + self.len[row]]
    }
}
