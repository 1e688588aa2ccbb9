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
use super::integer::{Code, Hits, KEYS, Panel, Queries, ROWS, STEP, hits};
use super::pack::pack_panel;
use super::quantize::quantize;
use super::scan::Block;
use super::view::View;
use crate::element::{Element, Real};
use crate::fused::vectorize;
use crate::plan::{Isa, Plan, Problem};

/// Survivors that a row may have before it is left to the native scan: enough for 32 candidates.
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
                        for (x, &q) in row.iter().enumerate() {
                            values[x / STEP * KEYS * STEP + w * STEP + x % STEP] = q.cast_unsigned() ^ 128;
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
        let mut survivors = self.survivors(&queries, coarseness, visible)?;
        let block = &self.block;
        let (problem, backwards) = (block.problem, block.backwards());
        let mut best = Best::new(1, problem.candidates, KEYS, backwards);
        let (mut found, mut scores, mut scored) = (Vec::new(), Vec::new(), 0);
        let mut q = vec![T::Acc::zero(); problem.head_dim];
        for (row, visible) in visible.iter().enumerate() {
            let keys = &mut survivors[row];
            keys.sort_unstable();
            if backwards {
                keys.reverse();
            }
            let source = self.block.x.q.row(self.block.b, self.block.h, self.block.rows.start + row);
            q.iter_mut().zip(source).for_each(|(q, x)| *q = x.up());
            self.exact(&q, keys, &mut scores);
            scored += keys.len() as u64;
            best.clear();
            for (&score, &j) in scores.iter().zip(keys.iter()) {
                if score > best.threshold(0) {
                    best.insert(0, score, j);
                }
            }
            self.block.finish(row, visible, best.keys(0), &mut found);
        }
        Some(scored)
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

    /// For every row the keys that can be candidates; none if there are too many.
    #[inline(always)]
    fn survivors(
        &self,
        queries: &Queries,
        coarseness: f32,
        visible: &[Range<usize>],
    ) -> Option<Vec<Vec<u32>>> {
        let (block, filter) = (&self.block, self.filter);
        let rounding = (block.problem.head_dim + 16) as f32 * (0.5 * f32::EPSILON);
        let count = queries.start.len();
        let mut lower = Best::new(count, block.problem.candidates, KEYS, block.backwards());
        // The least finite threshold: -inf is the bound of a banned key.
        let mut threshold = vec![f32::MIN; count];
        let mut found = Hits { keys: vec![0; count], upper: vec![[0.0; KEYS]; count] };
        let mut kept: Vec<Vec<(u32, f32)>> = vec![Vec::with_capacity(CAPACITY); visible.len()];
        // Keys whose score has no bound: every row that sees one scores it.
        let mut unbounded = Vec::new();
        let reach = Block::<T>::reach(visible);
        for p in block.panels(&reach, KEYS) {
            let (at, first) = (block.kv_head() * filter.per_head + p, p * KEYS);
            let mut bias = filter.bias[at];
            let keys = KEYS.min(block.problem.keys - first);
            block.add_prior(&mut bias[..keys], first);
            let (mut upper, mut error, mut slack) = ([0f32; KEYS], [0f32; KEYS], [0f32; KEYS]);
            for w in 0..KEYS {
                let (b, norm) = (bias[w].wide() as f32, filter.norm[at][w]);
                slack[w] = rounding * b.abs();
                upper[w] = b + slack[w];
                error[w] = filter.error[at][w] + (coarseness + 2.0 * rounding) * norm;
            }
            for w in 0..keys {
                if error[w] == f32::INFINITY || upper[w].abs() > GREATEST_BIAS {
                    // A key of infinite bias is banned; others are scored by every row.
                    if bias[w].is_finite() {
                        unbounded.push((first + w) as u32);
                    }
                    (upper[w], error[w], slack[w]) = (f32::NEG_INFINITY, 0.0, 0.0);
                }
            }
            let mut active = 0;
            for (g, rows) in visible.chunks(ROWS).enumerate() {
                let sees = rows.iter().any(|r| r.start < first + KEYS && r.end > first);
                active |= u32::from(sees) << g;
            }
            let panel =
                Panel { values: filter.values(at), scale: &filter.scale[at], bias: &upper, error: &error };
            hits(filter.code, queries, active, &panel, &threshold, &mut found);
            for (row, range) in visible.iter().enumerate() {
                if active >> (row / ROWS) & 1 == 0 || found.keys[row] == 0 {
                    continue;
                }
                let mut bits = found.keys[row] & open(range, first);
                while bits != 0 {
                    let w = if block.backwards() { 31 - bits.leading_zeros() } else { bits.trailing_zeros() };
                    bits ^= 1 << w;
                    let w = w as usize;
                    let bound = found.upper[row][w];
                    if bound < threshold[row] {
                        continue;
                    }
                    kept[row].push(((first + w) as u32, bound));
                    let low = bound - 2.0 * queries.norm[row].mul_add(error[w], slack[w]);
                    if low > lower.threshold(row) {
                        lower.insert(row, low, 0);
                        threshold[row] = lower.threshold(row).max(f32::MIN);
                    }
                    if kept[row].len() == CAPACITY {
                        kept[row].retain(|&(_, bound)| bound >= threshold[row]);
                        if kept[row].len() > CAPACITY / 4 * 3 {
                            return None;
                        }
                    }
                }
            }
        }
        let mut out = Vec::with_capacity(visible.len());
        for (row, (kept, range)) in kept.iter().zip(visible).enumerate() {
            let mut keys: Vec<u32> =
                kept.iter().filter(|(_, bound)| *bound >= threshold[row]).map(|(j, _)| *j).collect();
            keys.extend(unbounded.iter().filter(|&&j| range.contains(&(j as usize))));
            if keys.len() > CAPACITY {
                return None;
            }
            out.push(keys);
        }
        Some(out)
    }

    /// Scores of a query and keys as the native scan computes them.
    #[inline(always)]
    fn exact(&self, q: &[T::Acc], keys: &[u32], scores: &mut Vec<T::Acc>) {
        /// Chains that run side by side.
        const SIDE: usize = 8;
        let (block, filter) = (&self.block, self.filter);
        let head = block.kv_head() * filter.per_head;
        scores.clear();
        for keys in keys.chunks(SIDE) {
            let mut acc = [T::Acc::zero(); SIDE];
            let mut rows: [&[T]; SIDE] = [&[]; SIDE];
            for (s, row) in rows.iter_mut().enumerate() {
                let j = keys[s.min(keys.len() - 1)] as usize;
                *row = &block.x.k.row(block.b, block.h / block.problem.group(), j)[..q.len()];
                let mut bias = [filter.bias[head + j / KEYS][j % KEYS]];
                block.add_prior(&mut bias, j);
                acc[s] = bias[0];
            }
            for (x, &q) in q.iter().enumerate() {
                for s in 0..SIDE {
                    acc[s] = q.mul_add(rows[s][x].up(), acc[s]);
                }
            }
            scores.extend(&acc[..keys.len()]);
        }
    }
}

/// The keys of a panel that begins at `first` that lie in `range`, as bits.
fn open(range: &Range<usize>, first: usize) -> u32 {
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
        assert_eq!(open(&(0..100), 32), u32::MAX);
        assert_eq!(open(&(33..35), 32), 0b110);
        assert_eq!(open(&(0..33), 32), 1);
        assert_eq!(open(&(63..64), 32), 1 << 31);
        assert_eq!(open(&(0..32), 32), 0);
        assert_eq!(open(&(64..70), 32), 0);
    }
}
