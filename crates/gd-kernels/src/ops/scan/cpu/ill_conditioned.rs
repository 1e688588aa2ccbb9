//! Rows whose scores are ill-conditioned: their candidates are found again, from energies in f64.
//!
//! The score `<q, k> - |k|^2 / 2` is a small difference of large numbers if queries and keys have a large common offset,
//! and its rounding error grows with the square of the offset. The dot product likewise loses the differences between
//! keys that have a large common offset. The rule looks at one row and the keys that are visible to it, so that its
//! result does not depend on the batch, on other queries, on the instruction set, or on how the keys are stored.

use std::ops::Range;

use num_traits::{Float, Zero};

use crate::backend::cpu::element::{Element, Real, sum1, sum2};
use crate::backend::cpu::quantize::KEYS;
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::top_k::TopK;
use crate::options::Score;

/// A vector is near another if its squared norm exceeds their squared distance by this factor: 8 of the 24 bits of the
/// products of a score then cancel.
const NEAR_FACTOR: f64 = 256.0;

/// Squared norms below 2^120 keep all terms of a score within the range of f32; for f64 the same share of its range.
const MAX_SQUARE_SHARE: f64 = 1.0 / 256.0;

#[cfg(feature = "gpu")]
const _: () = {
    use crate::backend::gpu::params;
    assert!(NEAR_FACTOR == params::NEAR_FACTOR as f64);
};

impl<'a, T: Element> Block<'a, T> {
    /// Whether rounding or overflow of the scores may decide which keys are the candidates of a row. `keys` are those that
    /// the scores found, the best first.
    #[inline(always)]
    pub(super) fn ill_conditioned(&mut self, row: usize, visible: &Range<usize>, keys: &[u32]) -> bool {
        if keys.len() >= visible.len() {
            return false;
        }
        // A key without a finite score was not found.
        if keys.len() < self.problem.candidates && keys.len() < self.admitted(visible) {
            return true;
        }
        let Some(&top_key) = keys.first() else { return false };
        let (q, k) = (self.x.q.row(self.b, self.h, self.rows.start + row), self.key(top_key as usize));
        let (square, distance) = (square(q), squared_distance(q, k));
        if is_large::<T::Acc>(square) || is_large::<T::Acc>(distance) {
            return true;
        }
        self.problem.score == Score::Energy && is_near(square, distance) || self.keys_have_offset(visible)
    }

    /// Whether the visible keys have a common offset that is large beside their differences: whether two of three are near
    /// each other, which an outlier does not change.
    #[inline(always)]
    fn keys_have_offset(&mut self, visible: &Range<usize>) -> bool {
        // The keys are those of a range of a power of two, so that most rows of a block share them.
        let (first, size) = (visible.start, 1 << visible.len().ilog2());
        if let Some((range, answer)) = self.common_offset
            && range == [first, size]
        {
            return answer;
        }
        let keys = [size / 4, size / 2, size / 4 * 3].map(|at| self.key(first + at));
        let mut answer = false;
        for (x, y) in [(0, 1), (1, 2), (0, 2)] {
            let distance = squared_distance(keys[x], keys[y]);
            // Equal keys have equal scores, to the bit.
            answer |= distance > T::Acc::zero() && is_near(square(keys[x]), distance);
        }
        self.common_offset = Some(([first, size], answer));
        answer
    }

    /// Key `j`.
    #[inline(always)]
    fn key(&self, j: usize) -> &'a [T] {
        self.x.k.row(self.b, self.h / self.problem.group(), j)
    }

    /// The visible keys that no prior excludes.
    fn admitted(&self, visible: &Range<usize>) -> usize {
        match self.prior_row() {
            Some(prior) => prior[visible.clone()].iter().filter(|b| b.wide() > f64::NEG_INFINITY).count(),
            None => visible.len(),
        }
    }

    /// The keys of least energy in f64 among those that are visible to a row, sorted.
    #[inline(always)]
    pub(super) fn rank_in_f64(&self, row: usize, visible: &Range<usize>, keys: &mut Vec<u32>) {
        match self.problem.score {
            Score::Energy => self.rank(
                row,
                visible,
                keys,
                #[inline(always)]
                |sum, q, k| (q - k).mul_add(q - k, sum),
            ),
            Score::Dot => self.rank(
                row,
                visible,
                keys,
                #[inline(always)]
                |sum, q, k| (-q).mul_add(k, sum),
            ),
        }
    }

    #[inline(always)]
    fn rank(
        &self,
        row: usize,
        visible: &Range<usize>,
        keys: &mut Vec<u32>,
        add: impl Fn(f64, f64, f64) -> f64 + Copy,
    ) {
        /// Keys that are processed together, to hide the latency of their sums.
        const TOGETHER: usize = 4;
        let mut q = Vec::with_capacity(self.problem.head_dim);
        for &x in self.x.q.row(self.b, self.h, self.rows.start + row) {
            q.push(x.wide());
        }
        let beta = self.x.beta[self.h].wide();
        let mut top_k = TopK::<f64>::new(1, self.problem.candidates, KEYS, self.backwards());
        let count = visible.len();
        for first in (0..count).step_by(TOGETHER) {
            // A last group of fewer keys repeats its last key. Equal scores are found in the order of the tie rule.
            let mut js = [0; TOGETHER];
            let mut rows: [&[T]; TOGETHER] = [&[]; TOGETHER];
            for c in 0..TOGETHER {
                let step = (first + c).min(count - 1);
                js[c] = if self.backwards() { visible.end - 1 - step } else { visible.start + step };
                rows[c] = self.key(js[c]);
            }
            let forms = forms(&q, rows, add);
            for c in 0..TOGETHER.min(count - first) {
                let prior = self.prior_row().map_or(0.0, |p| p[js[c]].wide());
                let mut score = prior - beta * forms[c];
                if !score.is_finite() {
                    if prior == f64::NEG_INFINITY || !(q.iter().all(|x| x.is_finite()) && finite(rows[c])) {
                        continue;
                    }
                    // Finite numbers in f64 whose energy is outside of its range.
                    score = if score > 0.0 { f64::MAX } else { f64::MIN };
                }
                if top_k.admits(0, score) {
                    top_k.insert(0, score, js[c] as u32);
                }
            }
        }
        top_k.keys(0, keys);
    }
}

/// `|x|^2`.
#[inline(always)]
fn square<T: Element>(x: &[T]) -> T::Acc {
    sum1(
        x,
        #[inline(always)]
        |x| x.up() * x.up(),
    )
}

/// `|x - y|^2`.
#[inline(always)]
fn squared_distance<X: Element, Y: Element<Acc = X::Acc>>(x: &[X], y: &[Y]) -> X::Acc {
    sum2(
        x,
        y,
        #[inline(always)]
        |x, y| {
            let difference = x.up() - y.up();
            difference * difference
        },
    )
}

/// Whether a squared norm or distance may leave terms of a score outside of the range of the accumulator.
#[inline(always)]
fn is_large<A: Real>(square: A) -> bool {
    square.is_nan() || square >= A::of(MAX_SQUARE_SHARE) * A::max_value()
}

/// Whether a query is so long that its keys are ranked in f64 whatever they are.
pub(super) fn has_large_norm<T: Element>(q: &[T]) -> bool {
    is_large(square(q))
}

/// Whether a vector of this squared norm is near another at this squared distance.
#[inline(always)]
fn is_near<A: Real>(square: A, distance: A) -> bool {
    square > A::of(NEAR_FACTOR) * distance
}

/// Whether a row has neither NaN nor infinities.
pub(super) fn finite<T: Element>(row: &[T]) -> bool {
    row.iter().all(|x| x.up().is_finite())
}

/// The sums of `add` over the dimensions of q and each of C keys, in a fixed order.
#[inline(always)]
fn forms<T: Element, const C: usize>(
    q: &[f64],
    keys: [&[T]; C],
    add: impl Fn(f64, f64, f64) -> f64,
) -> [f64; C] {
    const LANES: usize = 8;
    let (body, rest) = q.as_chunks::<LANES>();
    let chunks = keys.map(|k| k.as_chunks::<LANES>().0);
    let mut sums = [[0f64; LANES]; C];
    for (x, q) in body.iter().enumerate() {
        for c in 0..C {
            let k = &chunks[c][x];
            for l in 0..LANES {
                sums[c][l] = add(sums[c][l], q[l], k[l].up().wide());
            }
        }
    }
    let mut out = [0f64; C];
    for c in 0..C {
        let s = &sums[c];
        out[c] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
        for (&q, k) in rest.iter().zip(&keys[c][body.len() * LANES..]) {
            out[c] = add(out[c], q, k.up().wide());
        }
    }
    out
}

/// `sum (q - k)^2`, or `-<q, k>`, in f64.
pub(super) fn form_in_f64<Q: Element, K: Element>(score: Score, q: &[Q], k: &[K]) -> f64 {
    let q: Vec<f64> = q.iter().map(|x| x.up().wide()).collect();
    let [sum] = match score {
        Score::Energy => forms(&q, [k], |sum, q, k| (q - k).mul_add(q - k, sum)),
        Score::Dot => forms(&q, [k], |sum, q, k| (-q).mul_add(k, sum)),
    };
    sum
}
