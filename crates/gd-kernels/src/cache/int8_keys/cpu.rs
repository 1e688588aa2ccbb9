//! Keys as 8-bit integers in the order in which the certified scan reads them.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::vectorize;
use crate::backend::cpu::quantize::{KEYS, STEP, quantize};
use crate::backend::cpu::view::View;
use crate::backend::support::MAX_HEAD_DIM;
use crate::cache::append_buffer::{Place, ends};
use crate::options::Score;

/// The keys of all heads `[pieces, Hk]`, which may grow; a piece is a batch entry or a page.
#[derive(Debug, Clone)]
pub(crate) struct Filter {
    /// Shared between clones until one of them is written to.
    heads: Arc<Vec<Head>>,
    /// Keys of every piece.
    lengths: Vec<usize>,
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
    /// No keys yet, for pieces of `kv_heads` heads of dimension `d`.
    pub(crate) fn new(pieces: usize, kv_heads: usize, d: usize, score: Score) -> Self {
        let heads = Arc::new(vec![Head::default(); pieces * kv_heads]);
        Self { heads, lengths: vec![0; pieces], size: d.next_multiple_of(STEP) * KEYS, score }
    }

    /// The keys k `[B, Hk, M, D]`.
    pub(crate) fn of<T: Element>(k: View<'_, T>, score: Score) -> Self {
        let [batch, kv_heads, _, d] = k.dims;
        let mut new = Self::new(batch, kv_heads, d, score);
        new.write(k, &ends(&new.lengths));
        new
    }

    /// Keys of every piece.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
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

    /// Heads of a piece.
    fn kv_heads(&self) -> usize {
        self.heads.len() / self.lengths.len().max(1)
    }

    /// Writes k `[R, Hk, m, D]` to its places, which fit and name no piece twice.
    pub(crate) fn write<T: Element>(&mut self, k: View<'_, T>, at: &[Place]) {
        let [_, kv_heads, more, _] = k.dims;
        let (size, score) = (self.size, self.score);
        for &[piece, first] in at {
            self.lengths[piece] = self.lengths[piece].max(first + more);
        }
        // Every head has room for the longest: scans walk all of them alike.
        let panels = self.lengths.iter().max().map_or(0, |longest| longest.div_ceil(KEYS));
        let mut entry_of = vec![None; self.lengths.len()];
        for (entry, &[piece, first]) in at.iter().enumerate() {
            entry_of[piece] = Some((entry, first));
        }
        let mut tasks = Vec::new();
        for (head, each) in Arc::make_mut(&mut self.heads).iter_mut().enumerate() {
            each.make_room(panels, size);
            let Some((entry, first)) = entry_of[head / kv_heads] else { continue };
            let touched = first / KEYS..(first + more).div_ceil(KEYS);
            let values = each.values[touched.start * size..touched.end * size].chunks_mut(size);
            let each = values.zip(&mut each.known[touched.clone()]);
            tasks.extend(each.zip(touched).map(|(panel, p)| (entry, head % kv_heads, first, p, panel)));
        }
        tasks.into_par_iter().with_min_len(4).for_each(|(entry, h, first, p, (values, known))| {
            vectorize(
                #[inline(always)]
                || {
                    let keys = (p * KEYS).max(first)..((p + 1) * KEYS).min(first + more);
                    for j in keys.clone() {
                        known.enter(j % KEYS, k.row(entry, h, j - first), values);
                    }
                    let row = |j: usize| &k.row(entry, h, j - first)[..k.dims[3]];
                    known.weigh(keys, score, row);
                },
            );
        });
    }

    /// Some of the pieces, which are there, in any order.
    pub(crate) fn select(&self, pieces: &[usize]) -> Self {
        let kv_heads = self.kv_heads();
        let heads = pieces.iter().flat_map(|piece| &self.heads[piece * kv_heads..][..kv_heads]).cloned();
        let lengths = pieces.iter().map(|&piece| self.lengths[piece]).collect();
        Self { heads: Arc::new(heads.collect()), lengths, ..*self }
    }

    /// The pieces of several for the same heads, dimension and score.
    pub(crate) fn stack(all: &[&Self]) -> Option<Self> {
        let first = all.first()?;
        let lengths: Vec<usize> = all.iter().flat_map(|one| one.lengths.iter().copied()).collect();
        let panels = lengths.iter().max().map_or(0, |longest| longest.div_ceil(KEYS));
        let mut heads: Vec<Head> = all.iter().flat_map(|one| one.heads.iter().cloned()).collect();
        heads.iter_mut().for_each(|head| head.make_room(panels, first.size));
        Some(Self { heads: Arc::new(heads), lengths, ..**first })
    }

    /// The pages of a table together, as sequences: all keys of every page, which are a multiple of a panel's.
    pub(crate) fn gathered(&self, table: &[Vec<u32>], page: usize) -> Self {
        let (kv_heads, panels) = (self.kv_heads(), page / KEYS);
        let together = |(row, h): (&Vec<u32>, usize)| {
            let mut new = Head::default();
            for &id in row {
                let head = &self.heads[id as usize * kv_heads + h];
                new.values.extend_from_slice(&head.values[..panels * self.size]);
                new.known.extend_from_slice(&head.known[..panels]);
            }
            new
        };
        let heads = table.iter().flat_map(|row| (0..kv_heads).map(move |h| (row, h))).map(together);
        let lengths = table.iter().map(|row| row.len() * page).collect();
        Self { heads: Arc::new(heads.collect()), lengths, ..*self }
    }
}

impl Head {
    /// Adds panels without keys, up to `panels` of `size` bytes.
    fn make_room(&mut self, panels: usize, size: usize) {
        if self.known.len() < panels {
            self.values.resize(panels * size, 128);
            self.known.resize(panels, Known::NONE);
        }
    }
}

impl Known {
    /// No keys.
    const NONE: Self =
        Self { scale: [0.0; KEYS], error: [0.0; KEYS], norm: [0.0; KEYS], bias: [f32::NEG_INFINITY; KEYS] };

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
