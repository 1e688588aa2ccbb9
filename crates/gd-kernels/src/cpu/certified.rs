//! The scan at certified precision: 8-bit integers find the keys that can be candidates, exact
//! scores decide among them.
//!
//! With `q = q^ + r_q`, `k = k^ + r_k` (hats quantised), `<q, k> - <q^, k^> = <q, r_k> + <r_q, k^>`,
//! which is at most `|q| e_k + e_q |k^|`. To this comes what rounding may do to the native score, a
//! chain of D fused multiply-adds, and to the bound itself: `(D + 16) u (2 |q| |k| + |b|)` is more
//! than both. A key stays if its upper bound reaches the K-th greatest lower bound; all that stay
//! are scored as the native scan scores them, in the same order. A block of queries of which one has
//! too many such keys, or cannot be quantised, is left to the native scan.

use std::ops::Range;

use num_traits::{Float, Zero};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::best::Best;
use super::integer::{Code, KEYS, Lists, Panel, Queries, ROWS, STEP, collect, reached_by};
use super::pack::pack_panel;
use super::quantize::quantize;
use super::scan::Block;
use super::view::View;
use crate::element::{Element, Real};
use crate::fused::vectorize;
use crate::plan::{Isa, Plan, Problem};

/// Keys that a row may keep before it is left to the native scan: enough for 32 candidates.
const CAPACITY: usize = 96;

/// Beyond this a bias is no longer added to a score within f32.
const GREATEST_BIAS: f32 = 1e37;

/// The keys of a problem as integers: panels `[B, Hk, P, D / 4, KEYS, 4]`, and per key `[B, Hk, P,
/// KEYS]` its scale, error, norm and native bias.
pub(crate) struct Filter<A> {
    values: Vec<u8>,
    scale: Vec<[f32; KEYS]>,
    error: Vec<[f32; KEYS]>,
    norm: Vec<[f32; KEYS]>,
    bias: Vec<[A; KEYS]>,
    /// Bytes of a panel.
    size: usize,
    per_head: usize,
    code: Code,
}

impl<A: Real> Filter<A> {
    /// Quantises k `[B, Hk, M, D]`.
    pub(crate) fn new<T: Element<Acc = A>>(problem: &Problem, plan: &Plan, k: View<'_, T>) -> Self {
        let [batch, heads, keys, d] = k.dims;
        let per_head = keys.div_ceil(KEYS);
        let (size, panels) = (d.next_multiple_of(STEP) * KEYS, batch * heads * per_head);
        let mut new = Self {
            values: vec![128; panels * size],
            scale: vec![[0.0; KEYS]; panels],
            error: vec![[0.0; KEYS]; panels],
            norm: vec![[0.0; KEYS]; panels],
            // Keys beyond the last are banned.
            bias: vec![[A::neg_infinity(); KEYS]; panels],
            size,
            per_head,
            code: match plan.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Vnni => Code::Vnni,
                _ => Code::Plain,
            },
        };
        let rows = new.values.par_chunks_mut(size).zip(&mut new.scale).zip(&mut new.error);
        let rows = rows.zip(&mut new.norm).zip(&mut new.bias).enumerate();
        rows.for_each(|(at, ((((values, scale), error), norm), bias))| {
            let (head, p) = (at / per_head, at % per_head);
            let (b, h) = (head / heads, head % heads);
            let range = p * KEYS..keys.min((p + 1) * KEYS);
            vectorize(
                #[inline(always)]
                || {
                    let mut panel = vec![A::zero(); d * KEYS];
                    let mut base = [A::zero(); KEYS];
                    pack_panel(k, [b, h], range.clone(), problem.score, &mut panel, &mut base);
                    bias[..range.len()].copy_from_slice(&base[..range.len()]);
                    let mut row = vec![0i8; d];
                    for (w, j) in range.enumerate() {
                        let s = quantize(k.row(b, h, j), &mut row);
                        (scale[w], error[w], norm[w]) = (s.scale, s.error, s.norm);
                        for (slots, row) in values.chunks_exact_mut(KEYS * STEP).zip(row.chunks(STEP)) {
                            let slots = &mut slots[w * STEP..][..row.len()];
                            slots.iter_mut().zip(row).for_each(|(s, &q)| *s = q.cast_unsigned() ^ 128);
                        }
                    }
                },
            );
        });
        new
    }

    fn values(&self, panel: usize) -> &[u8] {
        &self.values[panel * self.size..(panel + 1) * self.size]
    }
}

/// What is left of a block, and the work that was done.
pub(crate) struct Left<B> {
    /// The block, if it is left to the native scan.
    pub(crate) block: Option<B>,
    /// Pairs that were scored in full precision, or are left to be.
    pub(crate) scored: u64,
    /// Pairs that the mask allows.
    pub(crate) visible: u64,
}

/// A block and the keys that it walks.
pub(crate) struct Certified<'a, 'f, T: Element> {
    pub(crate) block: Block<'a, T>,
    pub(crate) filter: &'f Filter<T::Acc>,
}

impl<'a, T: Element> WithSimd for Certified<'a, '_, T> {
    type Output = Left<Block<'a, T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> Self::Output {
        let ranges = self.block.visible();
        let visible = ranges.iter().map(|r| r.len() as u64).sum();
        match self.scan(&ranges) {
            Some(scored) => Left { block: None, scored, visible },
            None => Left { block: Some(self.block), scored: visible, visible },
        }
    }
}

impl<T: Element> Certified<'_, '_, T> {
    /// Finds and writes the candidates of the block, and returns the number of exact scores; none if
    /// a row needs the native scan.
    #[inline(always)]
    fn scan(&mut self, visible: &[Range<usize>]) -> Option<u64> {
        let (queries, coarseness) = self.queries(visible)?;
        let survivors = self.survivors(&queries, coarseness, visible)?;
        let scores = self.exact(&survivors);
        let problem = self.block.problem;
        let mut best = Best::new(1, problem.candidates, KEYS, self.block.backwards());
        let (mut found, mut keys, mut at) = (Vec::new(), Vec::new(), 0);
        for (row, visible) in visible.iter().enumerate() {
            best.clear();
            while let Some(&(_, j)) = survivors.get(at).filter(|s| s.0 as usize == row) {
                // The native scan takes no score that is not finite.
                if scores[at] > T::Acc::neg_infinity() {
                    best.insert(0, scores[at], j);
                }
                at += 1;
            }
            best.keys(0, &mut keys);
            self.block.finish(row, visible, &keys, &mut found);
        }
        Some(survivors.len() as u64)
    }

    /// The block's queries as integers, and the greatest ratio of error to norm among them; none if
    /// one of them cannot be quantised.
    #[inline(always)]
    fn queries(&self, visible: &[Range<usize>]) -> Option<(Queries, f32)> {
        let (block, d) = (&self.block, self.block.problem.head_dim);
        let steps = d.div_ceil(STEP);
        let count = visible.len().next_multiple_of(ROWS);
        let mut out = Queries {
            values: vec![0; count * steps * STEP],
            start: vec![0; count],
            scale: vec![0.0; count],
            norm: vec![0.0; count],
        };
        let (mut row, mut coarseness) = (vec![0i8; d], 0f32);
        for (r, i) in block.rows.clone().enumerate() {
            let s = quantize(block.x.q.row(block.b, block.h, i), &mut row);
            if s.error == f32::INFINITY && !visible[r].is_empty() {
                return None;
            }
            if s.norm > 0.0 && s.error < f32::INFINITY {
                coarseness = coarseness.max(s.error / s.norm * (1.0 + 1e-6));
            }
            let group = &mut out.values[r / ROWS * ROWS * steps * STEP..];
            for (values, row) in group.chunks_exact_mut(ROWS * STEP).zip(row.chunks(STEP)) {
                values[r % ROWS * STEP..][..row.len()].copy_from_slice(row);
            }
            out.start[r] = -128 * row.iter().map(|&q| i32::from(q)).sum::<i32>();
            (out.scale[r], out.norm[r]) = (s.scale, if s.error < f32::INFINITY { s.norm } else { 0.0 });
        }
        Some((out, coarseness))
    }

    /// The panel from key `first` as the block meets it: the keys' biases and errors rounded up,
    /// and of each what its bias was rounded up by. Keys without a bound go to `unbounded`.
    #[inline(always)]
    fn bounds(&self, first: usize, coarseness: f32, unbounded: &mut Vec<u32>) -> [[f32; KEYS]; 3] {
        let (block, filter, at) = (&self.block, self.filter, self.panel(first));
        let rounding = (block.problem.head_dim + 16) as f32 * (0.5 * f32::EPSILON);
        let mut bias = filter.bias[at];
        let keys = KEYS.min(block.problem.keys - first);
        block.add_prior(&mut bias[..keys], first);
        let [mut upper, mut error, mut slack] = [[0f32; KEYS]; 3];
        let norms = filter.norm[at].iter().zip(&filter.error[at]);
        let mut bounded = true;
        for (w, (norm, e)) in norms.enumerate() {
            let b = bias[w].wide() as f32;
            slack[w] = rounding * b.abs();
            upper[w] = b + slack[w];
            error[w] = e + (coarseness + 2.0 * rounding) * norm;
            bounded &= (upper[w].abs() <= GREATEST_BIAS) & (error[w] < f32::INFINITY);
        }
        if !bounded {
            for w in 0..KEYS {
                if !(upper[w].abs() <= GREATEST_BIAS && error[w] < f32::INFINITY) {
                    // A key of infinite bias is banned; others are scored by every row that sees them.
                    if w < keys && bias[w].is_finite() {
                        unbounded.push((first + w) as u32);
                    }
                    (upper[w], error[w], slack[w]) = (f32::NEG_INFINITY, 0.0, 0.0);
                }
            }
        }
        [upper, error, slack]
    }

    /// The number of the panel from key `first`.
    #[inline(always)]
    fn panel(&self, first: usize) -> usize {
        self.block.kv_head() * self.filter.per_head + first / KEYS
    }

    /// Appends to `lists` what the panel from key `first` adds.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn collect(
        &self,
        queries: &Queries,
        first: usize,
        [bias, error, slack]: [&[f32; KEYS]; 3],
        active: u32,
        open: &[u32],
        threshold: &[f32],
        lists: &mut Lists,
    ) {
        let (filter, at) = (self.filter, self.panel(first));
        let (values, scale) = (filter.values(at), &filter.scale[at]);
        let panel = Panel { values, scale, bias, error, slack, first: first as u32 };
        collect(filter.code, queries, active, &panel, open, threshold, lists);
    }

    /// Thresholds to begin with, from a few panels that every row sees whole: most keys of the others
    /// then never enter a list.
    #[inline(always)]
    fn thresholds(&self, queries: &Queries, coarseness: f32, visible: &[Range<usize>]) -> Vec<f32> {
        /// Panels to look at.
        const PANELS: usize = 4;
        let count = queries.start.len();
        // The least finite number: -inf is the bound of a banned key.
        let mut threshold = vec![f32::MIN; count];
        let start = visible.iter().map(|r| r.start).max().unwrap_or(0).div_ceil(KEYS);
        let end = visible.iter().map(|r| r.end).min().unwrap_or(0) / KEYS;
        if end < start + 2 * PANELS {
            return threshold;
        }
        let mut lists = Lists::new(count, PANELS * KEYS);
        let mut unbounded = Vec::new();
        let (all, open) = ((1u32 << (count / ROWS)) - 1, vec![u32::MAX; count]);
        for p in start..start + PANELS {
            let [bias, error, slack] = self.bounds(p * KEYS, coarseness, &mut unbounded);
            self.collect(queries, p * KEYS, [&bias, &error, &slack], all, &open, &threshold, &mut lists);
        }
        for (row, threshold) in threshold.iter_mut().enumerate() {
            *threshold = reached_by(lists.lower(row), self.block.problem.candidates, f32::MIN);
        }
        threshold
    }

    /// The (row, key) pairs that can be candidates, by row; none if a row has too many.
    #[inline(always)]
    fn survivors(
        &self,
        queries: &Queries,
        coarseness: f32,
        visible: &[Range<usize>],
    ) -> Option<Vec<(u32, u32)>> {
        let (block, k) = (&self.block, self.block.problem.candidates);
        let count = queries.start.len();
        let mut threshold = self.thresholds(queries, coarseness, visible);
        let mut lists = Lists::new(count, CAPACITY);
        let mut unbounded = Vec::new();
        let reach = Block::<T>::reach(visible);
        let mut open = vec![0; count];
        for p in block.panels(&reach, KEYS) {
            let first = p * KEYS;
            let [bias, error, slack] = self.bounds(first, coarseness, &mut unbounded);
            let mut active = 0;
            for (row, (open, range)) in open.iter_mut().zip(visible).enumerate() {
                *open = seen(range, first);
                active |= u32::from(*open != 0) << (row / ROWS);
            }
            self.collect(queries, first, [&bias, &error, &slack], active, &open, &threshold, &mut lists);
            for row in 0..visible.len() {
                if lists.full(row) {
                    threshold[row] = reached_by(lists.lower(row), k, threshold[row]);
                    if lists.retain(row, threshold[row]) > CAPACITY / 4 * 3 {
                        return None;
                    }
                }
            }
        }
        let mut out = Vec::with_capacity(4 * k * visible.len());
        for (row, range) in visible.iter().enumerate() {
            let before = out.len();
            let threshold = reached_by(lists.lower(row), k, threshold[row]);
            lists.retain(row, threshold);
            out.extend(lists.keys(row).iter().map(|&j| (row as u32, j)));
            let seen = unbounded.iter().filter(|&&j| range.contains(&(j as usize)));
            out.extend(seen.map(|&j| (row as u32, j)));
            if out.len() - before > CAPACITY {
                return None;
            }
        }
        Some(out)
    }

    /// The scores of (row, key) pairs as the native scan computes them.
    #[inline(always)]
    fn exact(&self, pairs: &[(u32, u32)]) -> Vec<T::Acc> {
        /// Chains that run side by side, and their steps between two looks at a slice's length.
        const SIDE: usize = 8;
        const STRIDE: usize = 8;
        let (block, filter) = (&self.block, self.filter);
        let head = block.kv_head() * filter.per_head;
        let mut scores = Vec::with_capacity(pairs.len() + SIDE);
        for pairs in pairs.chunks(SIDE) {
            let mut acc = [T::Acc::zero(); SIDE];
            let mut rows: [(&[T], &[T]); SIDE] = [(&[], &[]); SIDE];
            for (s, row) in rows.iter_mut().enumerate() {
                let (i, j) = pairs[s.min(pairs.len() - 1)];
                let j = j as usize;
                let q = block.x.q.row(block.b, block.h, block.rows.start + i as usize);
                *row = (q, block.x.k.row(block.b, block.h / block.problem.group(), j));
                let mut bias = [filter.bias[head + j / KEYS][j % KEYS]];
                block.add_prior(&mut bias, j);
                acc[s] = bias[0];
            }
            let whole = block.problem.head_dim / STRIDE * STRIDE;
            for x in (0..whole).step_by(STRIDE) {
                for (acc, (q, k)) in acc.iter_mut().zip(&rows) {
                    let (Some(q), Some(k)) = (q[x..].first_chunk::<STRIDE>(), k[x..].first_chunk::<STRIDE>())
                    else {
                        unreachable!("rows of D elements")
                    };
                    for t in 0..STRIDE {
                        *acc = q[t].up().mul_add(k[t].up(), *acc);
                    }
                }
            }
            for (acc, (q, k)) in acc.iter_mut().zip(&rows) {
                for (q, k) in q[whole..].iter().zip(&k[whole..]) {
                    *acc = q.up().mul_add(k.up(), *acc);
                }
            }
            scores.extend(&acc[..pairs.len()]);
        }
        scores
    }
}

/// The keys of a panel that begins at `first` that lie in `range`, as bits.
fn seen(range: &Range<usize>, first: usize) -> u32 {
    let below = |end: usize| match end.saturating_sub(first) {
        n if n >= KEYS => u32::MAX,
        n => (1u32 << n) - 1,
    };
    below(range.end) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_a_range_within_a_panel() {
        assert_eq!(seen(&(0..100), 32), u32::MAX);
        assert_eq!(seen(&(33..35), 32), 0b110);
        assert_eq!(seen(&(0..33), 32), 1);
        assert_eq!(seen(&(63..64), 32), 1 << 31);
        assert_eq!(seen(&(0..32), 32), 0);
        assert_eq!(seen(&(64..70), 32), 0);
    }
}
