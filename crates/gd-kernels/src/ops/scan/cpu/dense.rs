//! The scan at native precision: QK^T in registers, fused with norm, prior, mask and the running top K.

use std::ops::Range;

use num_traits::Zero;
use pulp::{Simd, WithSimd};

use crate::backend::cpu::element::Element;
use crate::mask;
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::pack::PackedKeys;
use crate::ops::scan::cpu::tile;
use crate::ops::scan::cpu::top_k::{ScoreSink, Top1, TopK};

/// A block of queries and the packed keys that it is scanned against.
pub(crate) struct Dense<'a, T: Element> {
    pub(crate) block: Block<'a, T>,
    pub(crate) packed: &'a PackedKeys<T::Acc>,
}

impl<T: Element> WithSimd for Dense<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // R rows of accumulators, two registers of keys each, and registers for the operands.
        if S::REGISTER_COUNT >= 32 { self.scan::<S, 8>(simd) } else { self.scan::<S, 4>(simd) }
    }
}

impl<T: Element> Dense<'_, T> {
    #[inline(always)]
    fn scan<S: Simd, const R: usize>(mut self, simd: S) {
        let visible = self.block.visible();
        let (width, k) = (self.packed.width(), self.block.problem.candidates);
        // Rows are padded to whole groups of R.
        let count = visible.len().next_multiple_of(R);
        let backwards = self.block.backwards();
        let (mut candidates, mut keys) = (Vec::new(), Vec::new());
        if k == 1 {
            let mut top1 = Top1::new(count, width);
            self.walk::<S, _, R>(simd, &visible, &mut top1);
            if !top1.overflowed() {
                for (row, visible) in visible.iter().enumerate() {
                    let key = top1.key(row, backwards);
                    self.block.write_candidates(row, visible, key.as_slice(), &mut candidates);
                }
                return;
            }
        }
        let mut top_k = TopK::new(count, k, width, backwards);
        self.walk::<S, _, R>(simd, &visible, &mut top_k);
        for (row, visible) in visible.iter().enumerate() {
            top_k.keys(row, &mut keys);
            self.block.write_candidates(row, visible, &keys, &mut candidates);
        }
    }

    /// Passes every score of the block to `sink`.
    #[inline(always)]
    fn walk<S: Simd, K: ScoreSink<T::Acc>, const R: usize>(
        &self,
        simd: S,
        visible: &[Range<usize>],
        sink: &mut K,
    ) {
        let block = &self.block;
        let (d, width) = (block.problem.head_dim, self.packed.width());
        let reach = mask::reach(visible);
        if reach.is_empty() {
            return;
        }
        // Groups of R rows as [D][R]; rows beyond the block are zero, and their scores are not used.
        let mut q = vec![T::Acc::zero(); visible.len().next_multiple_of(R) * d];
        for (row, i) in block.rows.clone().enumerate() {
            let group = &mut q[row / R * R * d..];
            for (slot, &x) in group[row % R..].iter_mut().step_by(R).zip(block.x.q.row(block.b, block.h, i)) {
                *slot = x;
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
                    false => tile::masked::<T::Acc, S, R>(simd, scores, visible, first),
                };
                sink.add(simd, group * R, &scores, p);
            }
        }
    }
}
