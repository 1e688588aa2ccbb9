//! The scan at certified precision: products of 8-bit integers find the keys that can be candidates, and scores in full
//! precision decide among them.
//!
//! Write `q = q^ + r_q` and `k = k^ + r_k` with the quantised q^ and k^. Then `<q, k> - <q^, k^> = <q, r_k> + <r_q, k^>`,
//! which is at most `|q| e_k + e_q |k^|` with `e` the norms of the errors. The bound also covers the rounding of the
//! native score, a chain of D fused multiply-adds, and of the bound itself: `(D + 16) u (2 |q| |k| + |b|)` exceeds both.
//! A key may be a candidate if its upper bound reaches the K-th greatest lower bound. Those keys are scored with the
//! operations and in the order of the dense scan, so that the result has the same bits. A block is scanned densely if
//! one of its queries has too many such keys or cannot be quantised.

use std::ops::Range;

use num_traits::Float;
use pulp::{Simd, WithSimd};

#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::amx::int8::Tiled;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::quantize::{KEYS, STEP, quantize};
use crate::cache::int8_keys::cpu::{Int8Panels, PanelBounds};
use crate::mask;
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::bounded_lists::{BoundedLists, capacity};
use crate::ops::scan::cpu::int8::{Int8Path, Panel, PanelTask, Queries, ROWS, collect};

/// Greatest bias for which adding it to a score cannot overflow f32.
const MAX_BIAS: f32 = 1e37;

/// A block, the 8-bit keys, and the range of keys to search.
pub(crate) struct Certified<'b, 'a, 'f, T: Element> {
    pub(crate) block: &'b Block<'a, T>,
    pub(crate) int8: &'f Int8Panels,
    pub(crate) path: Int8Path,
    pub(crate) keys: Range<usize>,
}

impl<T: Element> WithSimd for Certified<'_, '_, '_, T> {
    /// The keys that can be candidates; none if there are too many or a query cannot be quantised.
    type Output = Option<BoundedLists>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Option<BoundedLists> {
        let visible = self.block.visible();
        let (queries, relative_error) = self.queries(&visible)?;
        self.gather((&queries, relative_error), &visible)
    }
}

impl<T: Element> Certified<'_, '_, '_, T> {
    /// The queries of the block as integers, and the greatest ratio of error to norm among them; none if a query cannot be
    /// quantised.
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
            tiled: (self.path == Int8Path::Amx).then(|| Tiled::new(count, steps)),
        };
        let (mut row, mut relative_error) = (vec![0i8; d], 0f32);
        for (r, i) in block.rows.clone().enumerate() {
            let s = quantize(block.x.q.row(block.b, block.h, i), &mut row);
            if s.error == f32::INFINITY && !visible[r].is_empty() {
                return None;
            }
            if s.norm > 0.0 && s.error < f32::INFINITY {
                relative_error = relative_error.max(s.error / s.norm * (1.0 + 1e-6));
            }
            out.start[r] = -128 * row.iter().map(|&q| i32::from(q)).sum::<i32>();
            (out.scale[r], out.norm[r]) = (s.scale, if s.error < f32::INFINITY { s.norm } else { 0.0 });
            #[cfg(target_arch = "x86_64")]
            if let Some(tiled) = &mut out.tiled {
                tiled.set_row(r, &row);
                continue;
            }
            let group = &mut out.values[r / ROWS * ROWS * steps * STEP..];
            for (values, row) in group.chunks_exact_mut(ROWS * STEP).zip(row.chunks(STEP)) {
                values[r % ROWS * STEP..][..row.len()].copy_from_slice(row);
            }
        }
        Some((out, relative_error))
    }

    /// For the panel from key `first` on: the biases and errors of its keys, rounded up, and by how much each bias was
    /// rounded up. Keys without a finite bound are appended to `unbounded`.
    #[inline(always)]
    fn bounds(&self, first: usize, relative_error: f32, unbounded: &mut Vec<u32>) -> [[f32; KEYS]; 3] {
        let block = self.block;
        let bounds = self.panel(first).1;
        let rounding = (block.problem.head_dim + 16) as f32 * (0.5 * f32::EPSILON);
        let mut bias = [T::Acc::of(0.0); KEYS];
        for (bias, b) in bias.iter_mut().zip(bounds.bias) {
            *bias = T::Acc::of(f64::from(b));
        }
        let keys = KEYS.min(block.problem.keys - first);
        block.add_prior(&mut bias[..keys], first);
        let [mut upper, mut error, mut slack] = [[0f32; KEYS]; 3];
        let norms = bounds.norm.iter().zip(&bounds.error);
        let mut bounded = true;
        for (w, (norm, e)) in norms.enumerate() {
            let b = bias[w].wide() as f32;
            slack[w] = rounding * b.abs();
            upper[w] = b + slack[w];
            error[w] = e + (relative_error + 2.0 * rounding) * norm;
            bounded &= (upper[w].abs() <= MAX_BIAS) & (error[w] < f32::INFINITY);
        }
        if !bounded {
            for w in 0..KEYS {
                if !(upper[w].abs() <= MAX_BIAS && error[w] < f32::INFINITY) {
                    // An infinite bias excludes a key; others are scored for every row to which they are visible.
                    if w < keys && bias[w].is_finite() {
                        unbounded.push((first + w) as u32);
                    }
                    (upper[w], error[w], slack[w]) = (f32::NEG_INFINITY, 0.0, 0.0);
                }
            }
        }
        [upper, error, slack]
    }

    /// Values and bounds of the panel from key `first` on.
    #[inline(always)]
    fn panel(&self, first: usize) -> (&[u8], &PanelBounds) {
        self.int8.panel(self.block.kv_head(), first / KEYS)
    }

    /// Appends keys of the panel from key `first` on to the lists, for the active groups (bits) and the keys that are
    /// visible to each row (bits). Returns the rows (bits) whose lists are then full.
    #[inline(always)]
    fn collect(
        &self,
        (queries, relative_error): (&Queries, f32),
        first: usize,
        (active, visible): (u32, &[u32]),
        bounded: &mut BoundedLists,
    ) -> u64 {
        let [bias, error, slack] = &self.bounds(first, relative_error, &mut bounded.unbounded);
        let (values, bounds) = self.panel(first);
        let panel = Panel { values, scale: &bounds.scale, bias, error, slack, first: first as u32 };
        collect(self.path, &PanelTask { queries, panel, active, visible }, bounded)
    }

    /// Initial thresholds from a few panels whose keys are visible to every row, if there are enough such panels. Most keys
    /// of the other panels are then below the thresholds.
    #[inline(always)]
    fn thresholds(&self, queries: (&Queries, f32), visible: &[Range<usize>]) -> Option<Vec<f32>> {
        /// Panels to search.
        const PANELS: usize = 4;
        let count = queries.0.start.len();
        let start = visible.iter().map(|r| r.start).fold(self.keys.start, usize::max).div_ceil(KEYS);
        let end = visible.iter().map(|r| r.end).fold(self.keys.end, usize::min) / KEYS;
        if end < start + 2 * PANELS {
            return None;
        }
        let mut bounded = BoundedLists::new(count, PANELS * KEYS, self.block.problem.candidates);
        let (all, visible) = ((1u32 << (count / ROWS)) - 1, vec![u32::MAX; count]);
        for p in start..start + PANELS {
            self.collect(queries, p * KEYS, (all, &visible), &mut bounded);
        }
        for row in 0..count {
            bounded.tighten(row);
        }
        Some(bounded.threshold)
    }

    /// Searches the range of keys.
    #[inline(always)]
    fn gather(&self, queries: (&Queries, f32), visible: &[Range<usize>]) -> Option<BoundedLists> {
        let block = self.block;
        let count = queries.0.start.len();
        let mut bounded =
            BoundedLists::new(count, capacity(block.problem.candidates), block.problem.candidates);
        if let Some(threshold) = self.thresholds(queries, visible) {
            bounded.threshold = threshold;
        }
        let reach = mask::reach(visible);
        let reach = reach.start.max(self.keys.start)..reach.end.min(self.keys.end);
        let mut bits = vec![0; count];
        for p in block.panels(&reach, KEYS) {
            let first = p * KEYS;
            let mut active = 0;
            for (row, (bits, range)) in bits.iter_mut().zip(visible).enumerate() {
                *bits = visible_bits(range, first);
                active |= u32::from(*bits != 0) << (row / ROWS);
            }
            let mut full = self.collect(queries, first, (active, &bits), &mut bounded);
            while full != 0 {
                let row = full.trailing_zeros() as usize;
                full &= full - 1;
                if !bounded.tighten(row) {
                    return None;
                }
            }
        }
        // Thresholds have risen since the first keys were appended.
        for row in 0..visible.len() {
            bounded.tighten(row);
        }
        (bounded.unbounded.len() <= capacity(bounded.candidates)).then_some(bounded)
    }
}

/// The keys in `range` of the panel that starts at key `first`, as bits.
pub(crate) fn visible_bits(range: &Range<usize>, first: usize) -> u32 {
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
        assert_eq!(visible_bits(&(0..100), 32), u32::MAX);
        assert_eq!(visible_bits(&(33..35), 32), 0b110);
        assert_eq!(visible_bits(&(0..33), 32), 1);
        assert_eq!(visible_bits(&(63..64), 32), 1 << 31);
        assert_eq!(visible_bits(&(0..32), 32), 0);
        assert_eq!(visible_bits(&(64..70), 32), 0);
    }
}
