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

use num_traits::Float;
use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::amx::Tiled;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::quantize::{KEYS, STEP, quantize};
use crate::cache::int8_keys::cpu::{Filter, Known};
use crate::ops::scan::cpu::Block;
use crate::ops::scan::cpu::bounded_lists::{Lists, capacity};
use crate::ops::scan::cpu::int8::{Code, Meeting, Panel, Queries, ROWS, collect};

/// Beyond this a bias is no longer added to a score within f32.
const GREATEST_BIAS: f32 = 1e37;

/// A block, the quantised keys that it walks, and the stretch of them that is walked.
pub(crate) struct Certified<'b, 'a, 'f, T: Element> {
    pub(crate) block: &'b Block<'a, T>,
    pub(crate) filter: &'f Filter,
    pub(crate) code: Code,
    pub(crate) keys: Range<usize>,
}

impl<T: Element> WithSimd for Certified<'_, '_, '_, T> {
    /// The keys that can be candidates; none if there are too many, or a query cannot be quantised.
    type Output = Option<Lists>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Option<Lists> {
        let visible = self.block.visible();
        let (queries, coarseness) = self.queries(&visible)?;
        self.gather((&queries, coarseness), &visible)
    }
}

impl<T: Element> Certified<'_, '_, '_, T> {
    /// The block's queries as integers, and the greatest ratio of error to norm among them; none if
    /// one of them cannot be quantised.
    #[inline(always)]
    fn queries(&self, visible: &[Range<usize>]) -> Option<(Queries, f32)> {
        let (block, d) = (self.block, self.block.problem.head_dim);
        let steps = d.div_ceil(STEP);
        let count = visible.len().next_multiple_of(ROWS);
        let mut out = Queries {
            values: vec![0; count * steps * STEP],
            start: vec![0; count],
            scale: vec![0.0; count],
            norm: vec![0.0; count],
            used: visible.len().min(ROWS),
            #[cfg(target_arch = "x86_64")]
            tiled: (self.code == Code::Amx).then(|| Tiled::new(count, steps)),
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
            out.start[r] = -128 * row.iter().map(|&q| i32::from(q)).sum::<i32>();
            (out.scale[r], out.norm[r]) = (s.scale, if s.error < f32::INFINITY { s.norm } else { 0.0 });
            #[cfg(target_arch = "x86_64")]
            if let Some(tiled) = &mut out.tiled {
                tiled.enter(r, &row);
                continue;
            }
            let group = &mut out.values[r / ROWS * ROWS * steps * STEP..];
            for (values, row) in group.chunks_exact_mut(ROWS * STEP).zip(row.chunks(STEP)) {
                values[r % ROWS * STEP..][..row.len()].copy_from_slice(row);
            }
        }
        Some((out, coarseness))
    }

    /// The panel from key `first` as the block meets it: the keys' biases and errors rounded up,
    /// and of each what its bias was rounded up by. Keys without a bound go to `unbounded`.
    #[inline(always)]
    fn bounds(&self, first: usize, coarseness: f32, unbounded: &mut Vec<u32>) -> [[f32; KEYS]; 3] {
        let block = self.block;
        let known = self.panel(first).1;
        let rounding = (block.problem.head_dim + 16) as f32 * (0.5 * f32::EPSILON);
        let mut bias = [T::Acc::of(0.0); KEYS];
        for (bias, b) in bias.iter_mut().zip(known.bias) {
            *bias = T::Acc::of(f64::from(b));
        }
        let keys = KEYS.min(block.problem.keys - first);
        block.add_prior(&mut bias[..keys], first);
        let [mut upper, mut error, mut slack] = [[0f32; KEYS]; 3];
        let norms = known.norm.iter().zip(&known.error);
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

    /// The bytes and the knowledge of the panel from key `first`.
    #[inline(always)]
    fn panel(&self, first: usize) -> (&[u8], &Known) {
        self.filter.panel(self.block.kv_head(), first / KEYS)
    }

    /// Appends to `lists` what the panel from key `first` adds for the active groups (bits) and the keys
    /// that are open to each row (bits); returns the rows (bits) whose list is then full.
    #[inline(always)]
    fn collect(
        &self,
        (queries, coarseness): (&Queries, f32),
        first: usize,
        (active, open): (u32, &[u32]),
        lists: &mut Lists,
    ) -> u64 {
        let [bias, error, slack] = &self.bounds(first, coarseness, &mut lists.unbounded);
        let (values, known) = self.panel(first);
        let panel = Panel { values, scale: &known.scale, bias, error, slack, first: first as u32 };
        collect(self.code, &Meeting { queries, panel, active, open }, lists)
    }

    /// Thresholds to begin with, from a few panels that every row sees whole, if there are that many: most
    /// keys of the others then never enter a list.
    #[inline(always)]
    fn thresholds(&self, queries: (&Queries, f32), visible: &[Range<usize>]) -> Option<Vec<f32>> {
        /// Panels to look at.
        const PANELS: usize = 4;
        let count = queries.0.start.len();
        let start = visible.iter().map(|r| r.start).fold(self.keys.start, usize::max).div_ceil(KEYS);
        let end = visible.iter().map(|r| r.end).fold(self.keys.end, usize::min) / KEYS;
        if end < start + 2 * PANELS {
            return None;
        }
        let mut lists = Lists::new(count, PANELS * KEYS, self.block.problem.candidates);
        let (all, open) = ((1u32 << (count / ROWS)) - 1, vec![u32::MAX; count]);
        for p in start..start + PANELS {
            self.collect(queries, p * KEYS, (all, &open), &mut lists);
        }
        for row in 0..count {
            lists.tighten(row);
        }
        Some(lists.threshold)
    }

    /// Walks the stretch.
    #[inline(always)]
    fn gather(&self, queries: (&Queries, f32), visible: &[Range<usize>]) -> Option<Lists> {
        let block = self.block;
        let count = queries.0.start.len();
        let mut lists = Lists::new(count, capacity(block.problem.candidates), block.problem.candidates);
        if let Some(threshold) = self.thresholds(queries, visible) {
            lists.threshold = threshold;
        }
        let reach = Block::<T>::reach(visible);
        let reach = reach.start.max(self.keys.start)..reach.end.min(self.keys.end);
        let mut open = vec![0; count];
        for p in block.panels(&reach, KEYS) {
            let first = p * KEYS;
            let mut active = 0;
            for (row, (open, range)) in open.iter_mut().zip(visible).enumerate() {
                *open = seen(range, first);
                active |= u32::from(*open != 0) << (row / ROWS);
            }
            let mut full = self.collect(queries, first, (active, &open), &mut lists);
            while full != 0 {
                let row = full.trailing_zeros() as usize;
                full &= full - 1;
                if !lists.tighten(row) {
                    return None;
                }
            }
        }
        // Thresholds have risen since the first keys came.
        for row in 0..visible.len() {
            lists.tighten(row);
        }
        (lists.unbounded.len() <= capacity(lists.candidates)).then_some(lists)
    }
}

/// The keys of a panel that begins at `first` that lie in `range`, as bits.
pub(crate) fn seen(range: &Range<usize>, first: usize) -> u32 {
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
