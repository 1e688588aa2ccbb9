//! Scores the keys that may be candidates in full precision, and selects the candidates among them.

use num_traits::{Float, Zero};
use pulp::{Simd, WithSimd};

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::quantize::KEYS;
use crate::cache::int8_keys::cpu::{Int8Panels, native_bias};
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::bounded_lists::{BoundedLists, reached_by};
use crate::ops::scan::cpu::top_k::TopK;
use crate::options::Score;

/// The result of rescoring a block.
pub(crate) struct Rescoring<B> {
    /// The block, if its candidates were not found and it must be scanned densely.
    pub(crate) unresolved: Option<B>,
    /// Pairs that were scored in full precision, or will be by the dense scan.
    pub(crate) scored: u64,
    /// Pairs that the mask makes visible.
    pub(crate) visible: u64,
}

/// A block and the lists that were collected for it from several chunks of keys. Without lists the block must be scanned
/// densely.
pub(crate) struct Rescore<'a, 'f, T: Element> {
    pub(crate) block: Block<'a, T>,
    pub(crate) bounded: Option<Vec<&'f BoundedLists>>,
    /// The 8-bit keys, which store the biases of the keys.
    pub(crate) int8: Option<&'f Int8Panels>,
}

impl<'a, T: Element> WithSimd for Rescore<'a, '_, T> {
    type Output = Rescoring<Block<'a, T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> Self::Output {
        let visible = self.block.visible().iter().map(|r| r.len() as u64).sum();
        match self.bounded.take() {
            Some(bounded) => Rescoring { scored: self.rescore(&bounded), visible, unresolved: None },
            None => Rescoring { unresolved: Some(self.block), scored: visible, visible },
        }
    }
}

impl<T: Element> Rescore<'_, '_, T> {
    /// Writes the candidates of the block; returns how many pairs were scored in full precision.
    #[inline(always)]
    fn rescore(&mut self, bounded: &[&BoundedLists]) -> u64 {
        let visible = self.block.visible();
        let k = self.block.problem.candidates;
        let (mut pairs, mut lower) = (Vec::with_capacity(4 * k * visible.len()), Vec::new());
        for (row, range) in visible.iter().enumerate() {
            lower.clear();
            bounded.iter().for_each(|l| lower.extend_from_slice(l.lower(row)));
            let threshold = reached_by(&lower, k, f32::MIN);
            for list in bounded {
                let upper = list.keys(row).iter().zip(list.upper(row));
                pairs.extend(upper.filter(|(_, u)| **u >= threshold).map(|(&j, _)| (row as u32, j)));
                let unbounded = list.unbounded.iter().filter(|&&j| range.contains(&(j as usize)));
                pairs.extend(unbounded.map(|&j| (row as u32, j)));
            }
        }
        let scores = self.exact(&pairs);
        let mut top_k = TopK::new(1, k, KEYS, self.block.backwards());
        let (mut candidates, mut keys, mut at) = (Vec::new(), Vec::new(), 0);
        for (row, visible) in visible.iter().enumerate() {
            top_k.clear();
            while let Some(&(_, j)) = pairs.get(at).filter(|s| s.0 as usize == row) {
                // The dense scan ignores scores that are not finite.
                if scores[at] > T::Acc::neg_infinity() {
                    top_k.insert(0, scores[at], j);
                }
                at += 1;
            }
            top_k.keys(0, &mut keys);
            self.block.write_candidates(row, visible, &keys, &mut candidates);
        }
        pairs.len() as u64
    }

    /// The bias of key `j` as the dense scan computes it, without the prior.
    #[inline(always)]
    fn bias(&self, j: usize, k: &[T]) -> T::Acc {
        match (self.int8, self.block.problem.score) {
            (Some(int8), _) => {
                let bounds = int8.panel(self.block.kv_head(), j / KEYS).1;
                T::Acc::of(f64::from(bounds.bias[j % KEYS]))
            }
            (None, Score::Dot) => T::Acc::zero(),
            (None, Score::Energy) => native_bias([k])[0],
        }
    }

    /// The scores of (row, key) pairs with the bits of the dense scan.
    #[inline(always)]
    fn exact(&self, pairs: &[(u32, u32)]) -> Vec<T::Acc> {
        let mut scores = Vec::with_capacity(pairs.len());
        let (eights, rest) = pairs.as_chunks::<8>();
        for pairs in eights {
            scores.extend(self.chains(pairs));
        }
        for pair in rest {
            scores.extend(self.chains(&[*pair]));
        }
        scores
    }

    /// C scores. Each is a chain of dependent operations; computing several together hides their latency.
    #[inline(always)]
    fn chains<const C: usize>(&self, pairs: &[(u32, u32); C]) -> [T::Acc; C] {
        /// Elements that are processed without a bounds check.
        const UNROLL: usize = 8;
        let (block, d) = (&self.block, self.block.problem.head_dim);
        let mut rows: [(&[T::Acc], &[T]); C] = [(&[], &[]); C];
        let mut acc = [T::Acc::zero(); C];
        for c in 0..C {
            let (i, j) = (pairs[c].0 as usize, pairs[c].1 as usize);
            let k = block.x.k.row(block.b, block.h / block.problem.group(), j);
            rows[c] = (&block.x.q.row(block.b, block.h, block.rows.start + i)[..d], &k[..d]);
            let mut bias = [self.bias(j, k)];
            block.add_prior(&mut bias, j);
            acc[c] = bias[0];
        }
        let step = |acc: &mut T::Acc, q: T::Acc, k: T| *acc = q.mul_add(k.up(), *acc);
        let chunks = rows.map(|(q, k)| (q.as_chunks::<UNROLL>().0, k.as_chunks::<UNROLL>().0));
        for p in 0..d / UNROLL {
            let chunk: [(&[T::Acc; UNROLL], &[T; UNROLL]); C] = chunks.map(|(q, k)| (&q[p], &k[p]));
            for x in 0..UNROLL {
                for c in 0..C {
                    step(&mut acc[c], chunk[c].0[x], chunk[c].1[x]);
                }
            }
        }
        for x in d / UNROLL * UNROLL..d {
            for c in 0..C {
                step(&mut acc[c], rows[c].0[x], rows[c].1[x]);
            }
        }
        acc
    }
}
