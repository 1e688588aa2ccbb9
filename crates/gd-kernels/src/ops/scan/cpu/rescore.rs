//! From keys that can be candidates to the candidates.

use num_traits::{Float, Zero};
use pulp::{Simd, WithSimd};

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::quantize::KEYS;
use crate::cache::int8_keys::cpu::{Filter, native_bias};
use crate::ops::scan::cpu::Block;
use crate::ops::scan::cpu::bounded_lists::{Lists, reached_by};
use crate::ops::scan::cpu::top_k::Best;
use crate::options::Score;

/// What is left of a block, and the work that was done.
pub(crate) struct Left<B> {
    /// The block, if it is left to the native scan.
    pub(crate) block: Option<B>,
    /// Pairs that were scored in full precision, or are left to be.
    pub(crate) scored: u64,
    /// Pairs that the mask allows.
    pub(crate) visible: u64,
}

/// A block, what was collected for it from several stretches of keys (none if it must be left to the
/// native scan), and where the keys' biases are known.
pub(crate) struct Settle<'a, 'f, T: Element> {
    pub(crate) block: Block<'a, T>,
    pub(crate) lists: Option<Vec<&'f Lists>>,
    pub(crate) filter: Option<&'f Filter>,
}

impl<'a, T: Element> WithSimd for Settle<'a, '_, T> {
    type Output = Left<Block<'a, T>>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) -> Self::Output {
        let visible = self.block.visible().iter().map(|r| r.len() as u64).sum();
        match self.lists.take() {
            Some(lists) => Left { scored: self.settle(&lists), visible, block: None },
            None => Left { block: Some(self.block), scored: visible, visible },
        }
    }
}

impl<T: Element> Settle<'_, '_, T> {
    /// Writes the candidates of the block; returns the number of exact scores.
    #[inline(always)]
    fn settle(&mut self, lists: &[&Lists]) -> u64 {
        let visible = self.block.visible();
        let k = self.block.problem.candidates;
        let (mut pairs, mut lower) = (Vec::with_capacity(4 * k * visible.len()), Vec::new());
        for (row, range) in visible.iter().enumerate() {
            lower.clear();
            lists.iter().for_each(|l| lower.extend_from_slice(l.lower(row)));
            let threshold = reached_by(&lower, k, f32::MIN);
            for list in lists {
                let upper = list.keys(row).iter().zip(list.upper(row));
                pairs.extend(upper.filter(|(_, u)| **u >= threshold).map(|(&j, _)| (row as u32, j)));
                let seen = list.unbounded.iter().filter(|&&j| range.contains(&(j as usize)));
                pairs.extend(seen.map(|&j| (row as u32, j)));
            }
        }
        let scores = self.exact(&pairs);
        let mut best = Best::new(1, k, KEYS, self.block.backwards());
        let (mut found, mut keys, mut at) = (Vec::new(), Vec::new(), 0);
        for (row, visible) in visible.iter().enumerate() {
            best.clear();
            while let Some(&(_, j)) = pairs.get(at).filter(|s| s.0 as usize == row) {
                // The native scan takes no score that is not finite.
                if scores[at] > T::Acc::neg_infinity() {
                    best.insert(0, scores[at], j);
                }
                at += 1;
            }
            best.keys(0, &mut keys);
            self.block.finish(row, visible, &keys, &mut found);
        }
        pairs.len() as u64
    }

    /// The native bias of key `j`, without its prior.
    #[inline(always)]
    fn bias(&self, j: usize, k: &[T]) -> T::Acc {
        match (self.filter, self.block.problem.score) {
            (Some(filter), _) => {
                let known = filter.panel(self.block.kv_head(), j / KEYS).1;
                T::Acc::of(f64::from(known.bias[j % KEYS]))
            }
            (None, Score::Dot) => T::Acc::zero(),
            (None, Score::Energy) => native_bias([k])[0],
        }
    }

    /// The scores of (row, key) pairs as the native scan computes them.
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

    /// C scores side by side: each is a chain in which one step waits for the one before.
    #[inline(always)]
    fn chains<const C: usize>(&self, pairs: &[(u32, u32); C]) -> [T::Acc; C] {
        /// Steps between two looks at the rows' lengths.
        const PIECE: usize = 8;
        let (block, d) = (&self.block, self.block.problem.head_dim);
        let mut rows: [(&[T], &[T]); C] = [(&[], &[]); C];
        let mut acc = [T::Acc::zero(); C];
        for c in 0..C {
            let (i, j) = (pairs[c].0 as usize, pairs[c].1 as usize);
            let k = block.x.k.row(block.b, block.h / block.problem.group(), j);
            rows[c] = (&block.x.q.row(block.b, block.h, block.rows.start + i)[..d], &k[..d]);
            let mut bias = [self.bias(j, k)];
            block.add_prior(&mut bias, j);
            acc[c] = bias[0];
        }
        let step = |acc: &mut T::Acc, q: T, k: T| *acc = q.up().mul_add(k.up(), *acc);
        let pieces = rows.map(|(q, k)| (q.as_chunks::<PIECE>().0, k.as_chunks::<PIECE>().0));
        for p in 0..d / PIECE {
            let piece: [(&[T; PIECE], &[T; PIECE]); C] = pieces.map(|(q, k)| (&q[p], &k[p]));
            for x in 0..PIECE {
                for c in 0..C {
                    step(&mut acc[c], piece[c].0[x], piece[c].1[x]);
                }
            }
        }
        for x in d / PIECE * PIECE..d {
            for c in 0..C {
                step(&mut acc[c], rows[c].0[x], rows[c].1[x]);
            }
        }
        acc
    }
}
