//! The scan at native precision: QK^T in registers, fused with norm, prior, mask and running best-K.

use std::ops::Range;

use num_traits::Zero;
use pulp::{Simd, WithSimd};

use crate::backend::cpu::element::Element;
use crate::ops::scan::cpu::pack::Packed;
use crate::ops::scan::cpu::top_k::{Best, Keep, Lead};
use crate::ops::scan::cpu::{Block, tile};

/// A block and the packed keys that it walks.
pub(crate) struct Native<'a, T: Element> {
    pub(crate) block: Block<'a, T>,
    pub(crate) packed: &'a Packed<T::Acc>,
}

impl<T: Element> WithSimd for Native<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Two registers of keys by R rows of accumulators, and room for the operands.
        if S::REGISTER_COUNT >= 32 { self.scan::<S, 8>(simd) } else { self.scan::<S, 4>(simd) }
    }
}

impl<T: Element> Native<'_, T> {
    #[inline(always)]
    fn scan<S: Simd, const R: usize>(mut self, simd: S) {
        let visible = self.block.visible();
        let (width, k) = (self.packed.width(), self.block.problem.candidates);
        // Lists for whole groups of R rows.
        let count = visible.len().next_multiple_of(R);
        let backwards = self.block.backwards();
        let (mut found, mut keys) = (Vec::new(), Vec::new());
        if k == 1 {
            let mut lead = Lead::new(count, width);
            self.walk::<S, _, R>(simd, &visible, &mut lead);
            if !lead.overflowed() {
                for (row, visible) in visible.iter().enumerate() {
                    self.block.finish(row, visible, lead.key(row, backwards).as_slice(), &mut found);
                }
                return;
            }
        }
        let mut best = Best::new(count, k, width, backwards);
        self.walk::<S, _, R>(simd, &visible, &mut best);
        for (row, visible) in visible.iter().enumerate() {
            best.keys(row, &mut keys);
            self.block.finish(row, visible, &keys, &mut found);
        }
    }

    /// Offers every score of the block.
    #[inline(always)]
    fn walk<S: Simd, K: Keep<T::Acc>, const R: usize>(
        &self,
        simd: S,
        visible: &[Range<usize>],
        keep: &mut K,
    ) {
        let block = &self.block;
        let (d, width) = (block.problem.head_dim, self.packed.width());
        let reach = Block::<T>::reach(visible);
        if reach.is_empty() {
            return;
        }
        // Groups of R rows as [D][R]; rows beyond the block are zero, their scores are dropped.
        let mut q = vec![T::Acc::zero(); visible.len().next_multiple_of(R) * d];
        for (row, i) in block.rows.clone().enumerate() {
            let group = &mut q[row / R * R * d..];
            for (slot, x) in group[row % R..].iter_mut().step_by(R).zip(block.x.q.row(block.b, block.h, i)) {
                *slot = x.up();
            }
        }
        let mut bias = vec![T::Acc::zero(); width];
        for p in block.panels(&reach, width) {
            let (keys, base) = self.packed.panel(block.kv_head(), p);
            let first = p * width;
            bias.copy_from_slice(base);
            block.add_prior(&mut bias, first);
            for (q, (group, visible)) in q.chunks_exact(R * d).zip(visible.chunks(R).enumerate()) {
                if visible.iter().all(|r| r.end <= first || r.start >= first + width) {
                    continue;
                }
                let scores = tile::scores::<T::Acc, S, R>(simd, q, keys, &bias);
                let scores = match visible.iter().all(|r| r.start <= first && r.end >= first + width) {
                    true => scores,
                    false => tile::within::<T::Acc, S, R>(scores, visible, first),
                };
                keep.offer(simd, group * R, &scores, p);
            }
        }
    }
}
