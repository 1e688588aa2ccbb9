//! Keys as 8-bit integers in the order in which the certified scan reads them.

use std::ops::Range;

use rayon::prelude::*;

use super::integer::{KEYS, STEP};
use super::quantize::quantize;
use super::view::View;
use crate::element::{Element, Real};
use crate::fused::vectorize;
use crate::options::Score;
use crate::plan::MAX_HEAD_DIM;

/// The keys of all heads `[B, Hk]`, which may grow.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    heads: Vec<Head>,
    len: usize,
    /// Bytes of a panel.
    size: usize,
    score: Score,
}

/// One head: panels `[P, D / 4, KEYS, 4]` of keys `Q + 128`, and what is known of each key.
#[derive(Debug, Clone, Default)]
struct Head {
    values: Vec<u8>,
    known: Vec<Known>,
}

/// What a panel knows of its keys.
#[derive(Debug, Clone)]
pub(crate) struct Known {
    pub(crate) scale: [f32; KEYS],
    pub(crate) error: [f32; KEYS],
    pub(crate) norm: [f32; KEYS],
    /// The native bias, without a prior; -inf beyond the last key.
    pub(crate) bias: [f32; KEYS],
}

impl Filter {
    /// No keys yet, for `heads` heads of dimension `d`.
    pub(crate) fn new(heads: usize, d: usize, score: Score) -> Self {
        Self { heads: vec![Head::default(); heads], len: 0, size: d.next_multiple_of(STEP) * KEYS, score }
    }

    /// Keys held, the same number in every head.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The score whose biases it holds.
    pub(crate) fn score(&self) -> Score {
        self.score
    }

    /// The bytes and the knowledge of panel `p` of a flat head `b * Hk + h`.
    #[inline(always)]
    pub(crate) fn panel(&self, head: usize, p: usize) -> (&[u8], &Known) {
        let head = &self.heads[head];
        (&head.values[p * self.size..(p + 1) * self.size], &head.known[p])
    }

    /// Appends k `[B, Hk, M, D]`.
    pub(crate) fn append<T: Element>(&mut self, k: View<'_, T>) {
        let [_, kv_heads, more, _] = k.dims;
        let (old, size, score) = (self.len, self.size, self.score);
        let panels = (old + more).div_ceil(KEYS);
        let empty = Known {
            scale: [0.0; KEYS],
            error: [0.0; KEYS],
            norm: [0.0; KEYS],
            bias: [f32::NEG_INFINITY; KEYS],
        };
        let mut tasks = Vec::new();
        for (at, head) in self.heads.iter_mut().enumerate() {
            head.values.resize(panels * size, 128);
            head.known.resize(panels, empty.clone());
            let touched = old / KEYS;
            let each = head.values[touched * size..].chunks_mut(size).zip(&mut head.known[touched..]);
            tasks.extend(each.enumerate().map(|(p, panel)| (at, touched + p, panel)));
        }
        tasks.into_par_iter().with_min_len(4).for_each(|(at, p, (values, known))| {
            let (b, h) = (at / kv_heads, at % kv_heads);
            vectorize(
                #[inline(always)]
                || {
                    let keys = (p * KEYS).max(old)..((p + 1) * KEYS).min(old + more);
                    for j in keys.clone() {
                        known.enter(j % KEYS, k.row(b, h, j - old), values);
                    }
                    let row = |j: usize| &k.row(b, h, j - old)[..k.dims[3]];
                    known.weigh(keys, score, row);
                },
            );
        });
        self.len += more;
    }
}

impl Known {
    /// Quantises a key into place `w`.
    #[inline(always)]
    fn enter<T: Element>(&mut self, w: usize, row: &[T], values: &mut [u8]) {
        let mut room = [0i8; MAX_HEAD_DIM];
        let quantized = &mut room[..row.len()];
        let s = quantize(row, quantized);
        (self.scale[w], self.error[w], self.norm[w]) = (s.scale, s.error, s.norm);
        for (slots, q) in values.chunks_exact_mut(KEYS * STEP).zip(quantized.chunks(STEP)) {
            let slots = &mut slots[w * STEP..][..q.len()];
            slots.iter_mut().zip(q).for_each(|(s, &q)| *s = q.cast_unsigned() ^ 128);
        }
    }

    /// Enters the biases of some keys of this panel.
    #[inline(always)]
    fn weigh<'k, T: Element>(&mut self, keys: Range<usize>, score: Score, row: impl Fn(usize) -> &'k [T]) {
        /// Chains side by side: in each, one step waits for the one before.
        const SIDE: usize = 8;
        let mut j = keys.start;
        while j < keys.end {
            let count = SIDE.min(keys.end - j);
            // What a short last round has too many repeats its last key.
            let biases = match score {
                Score::Energy => {
                    native_bias(std::array::from_fn::<_, SIDE, _>(|c| row(j + c.min(count - 1))))
                }
                Score::Dot => [T::Acc::of(0.0); SIDE],
            };
            for (c, bias) in biases[..count].iter().enumerate() {
                self.bias[(j + c) % KEYS] = bias.wide() as f32;
            }
            j += count;
        }
    }
}

/// `-|k|^2 / 2` of C keys as the native scan adds it up: one chain of fused multiply-adds each, in the
/// order of D.
#[inline(always)]
pub(crate) fn native_bias<T: Element, const C: usize>(keys: [&[T]; C]) -> [T::Acc; C] {
    let mut square = [T::Acc::of(0.0); C];
    // One step of every key, and then the next.
    #[allow(clippy::needless_range_loop)]
    for x in 0..keys[0].len() {
        for c in 0..C {
            let k = keys[c][x].up();
            square[c] = num_traits::Float::mul_add(k, k, square[c]);
        }
    }
    square.map(|s| s * T::Acc::of(-0.5))
}
