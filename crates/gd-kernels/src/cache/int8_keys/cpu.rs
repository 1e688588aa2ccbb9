//! 8-bit keys on the CPU, in the order in which the certified scan reads them.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::cpu::cache_line::AlignedVec;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::{par_items, vectorize};
use crate::backend::cpu::quantize::{KEYS, STEP, quantize};
use crate::backend::cpu::view::View;
use crate::backend::support::MAX_HEAD_DIM;
use crate::cache::position::{WritePosition, ends};
use crate::options::Score;

/// Panels that a task of [`Int8Panels::write`] handles.
const PANELS_PER_TASK: usize = 4;

/// The quantised keys of all heads `[sequences, Hk]`; they may grow.
#[derive(Debug, Clone)]
pub(crate) struct Int8Panels {
    /// Shared between clones until one of them is written to.
    heads: Arc<Vec<HeadPanels>>,
    /// Keys of every sequence.
    lengths: Vec<usize>,
    panel_bytes: usize,
    score: Score,
}

/// The panels of one head: keys `Q + 128` as `[P, D / 4, KEYS, 4]`, and the bounds of each panel.
#[derive(Debug, Clone, Default)]
struct HeadPanels {
    values: AlignedVec<u8>,
    bounds: Vec<PanelBounds>,
}

/// Scale, error bounds and bias of the keys of one panel.
#[derive(Debug, Clone)]
pub(crate) struct PanelBounds {
    /// A key is about `scale * Q`.
    pub(crate) scale: [f32; KEYS],
    /// Upper bound of the norm of the quantisation error.
    pub(crate) error: [f32; KEYS],
    /// Upper bound of the norms of the key and of its quantised form.
    pub(crate) norm: [f32; KEYS],
    /// The bias of the native scan without a prior; -inf behind the last key.
    pub(crate) bias: [f32; KEYS],
}

impl Int8Panels {
    /// No keys yet, for sequences of `kv_heads` heads of dimension `d`.
    pub(crate) fn new(sequences: usize, kv_heads: usize, d: usize, score: Score) -> Self {
        let heads = Arc::new(vec![HeadPanels::default(); sequences * kv_heads]);
        Self { heads, lengths: vec![0; sequences], panel_bytes: d.next_multiple_of(STEP) * KEYS, score }
    }

    /// Quantises k `[B, Hk, M, D]`.
    pub(crate) fn of<T: Element>(k: View<'_, T>, score: Score) -> Self {
        let [batch, kv_heads, _, d] = k.dims;
        let mut new = Self::new(batch, kv_heads, d, score);
        new.write(k, &ends(&new.lengths));
        new
    }

    /// Keys of every sequence.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Values and bounds of panel `p` of the flat head `sequence * Hk + h`.
    #[inline(always)]
    pub(crate) fn panel(&self, head: usize, p: usize) -> (&[u8], &PanelBounds) {
        let head = &self.heads[head];
        (&head.values[p * self.panel_bytes..(p + 1) * self.panel_bytes], &head.bounds[p])
    }

    /// Heads of a sequence.
    fn kv_heads(&self) -> usize {
        self.heads.len() / self.lengths.len().max(1)
    }

    /// Writes k `[R, Hk, m, D]` at these positions, which have been checked.
    pub(crate) fn write<T: Element>(&mut self, k: View<'_, T>, at: &[WritePosition]) {
        let [_, kv_heads, more, _] = k.dims;
        let (panel_bytes, score) = (self.panel_bytes, self.score);
        for &[sequence, first] in at {
            self.lengths[sequence] = self.lengths[sequence].max(first + more);
        }
        // Every head gets as many panels as the longest needs: a scan walks all heads alike.
        let panels = self.lengths.iter().max().map_or(0, |longest| longest.div_ceil(KEYS));
        let mut entry_of = vec![None; self.lengths.len()];
        for (entry, &[sequence, first]) in at.iter().enumerate() {
            entry_of[sequence] = Some((entry, first));
        }
        let mut tasks = Vec::new();
        for (head, each) in Arc::make_mut(&mut self.heads).iter_mut().enumerate() {
            each.grow(panels, panel_bytes);
            let Some((entry, first)) = entry_of[head / kv_heads] else { continue };
            let touched = first / KEYS..(first + more).div_ceil(KEYS);
            let values = each.values[touched.start * panel_bytes..touched.end * panel_bytes]
                .chunks_mut(panel_bytes)
                .zip(&mut each.bounds[touched.clone()]);
            tasks.extend(values.zip(touched).map(|(panel, p)| (entry, head % kv_heads, first, p, panel)));
        }
        let mut jobs = Vec::new();
        while !tasks.is_empty() {
            jobs.push(tasks.split_off(tasks.len().saturating_sub(PANELS_PER_TASK)));
        }
        par_items(jobs, &|_, job| {
            for (entry, h, first, p, (values, bounds)) in job {
                vectorize(
                    #[inline(always)]
                    || {
                        let keys = (p * KEYS).max(first)..((p + 1) * KEYS).min(first + more);
                        for j in keys.clone() {
                            bounds.set_key(j % KEYS, k.row(entry, h, j - first), values);
                        }
                        let row = |j: usize| &k.row(entry, h, j - first)[..k.dims[3]];
                        bounds.set_biases(keys, score, row);
                    },
                );
            }
        });
    }

    /// Some of the sequences, which exist, in any order.
    pub(crate) fn select(&self, sequences: &[usize]) -> Self {
        let kv_heads = self.kv_heads();
        let heads = sequences.iter().flat_map(|s| &self.heads[s * kv_heads..][..kv_heads]).cloned();
        let lengths = sequences.iter().map(|&s| self.lengths[s]).collect();
        Self { heads: Arc::new(heads.collect()), lengths, ..*self }
    }

    /// The sequences of several caches of the same heads, dimension and score; none of no cache.
    pub(crate) fn stack(caches: &[&Self]) -> Option<Self> {
        let first = caches.first()?;
        let lengths: Vec<usize> = caches.iter().flat_map(|cache| cache.lengths.iter().copied()).collect();
        let panels = lengths.iter().max().map_or(0, |longest| longest.div_ceil(KEYS));
        let mut heads: Vec<HeadPanels> =
            caches.iter().flat_map(|cache| cache.heads.iter().cloned()).collect();
        heads.iter_mut().for_each(|head| head.grow(panels, first.panel_bytes));
        Some(Self { heads: Arc::new(heads), lengths, ..**first })
    }

    /// The pages of a block table as sequences: all keys of every page, which are whole panels.
    pub(crate) fn gather_pages(&self, table: &[Vec<u32>], page: usize) -> Self {
        let (kv_heads, panels) = (self.kv_heads(), page / KEYS);
        let gather = |(row, h): (&Vec<u32>, usize)| {
            let mut new = HeadPanels::default();
            for &id in row {
                let head = &self.heads[id as usize * kv_heads + h];
                new.values.extend_from_slice(&head.values[..panels * self.panel_bytes]);
                new.bounds.extend_from_slice(&head.bounds[..panels]);
            }
            new
        };
        let heads = table.iter().flat_map(|row| (0..kv_heads).map(move |h| (row, h))).map(gather);
        let lengths = table.iter().map(|row| row.len() * page).collect();
        Self { heads: Arc::new(heads.collect()), lengths, ..*self }
    }
}

impl HeadPanels {
    /// Adds empty panels up to a count of `panels`.
    fn grow(&mut self, panels: usize, panel_bytes: usize) {
        if self.bounds.len() < panels {
            self.values.resize(panels * panel_bytes, 128);
            self.bounds.resize(panels, PanelBounds::EMPTY);
        }
    }
}

impl PanelBounds {
    /// A panel without keys.
    const EMPTY: Self =
        Self { scale: [0.0; KEYS], error: [0.0; KEYS], norm: [0.0; KEYS], bias: [f32::NEG_INFINITY; KEYS] };

    /// Quantises a key into column `w` of the panel.
    #[inline(always)]
    fn set_key<T: Element>(&mut self, w: usize, row: &[T], values: &mut [u8]) {
        let mut buffer = [0i8; MAX_HEAD_DIM];
        let quantized = &mut buffer[..row.len()];
        let s = quantize(row, quantized);
        (self.scale[w], self.error[w], self.norm[w]) = (s.scale, s.error, s.norm);
        for (slots, q) in values.chunks_exact_mut(KEYS * STEP).zip(quantized.chunks(STEP)) {
            let slots = &mut slots[w * STEP..][..q.len()];
            slots.iter_mut().zip(q).for_each(|(s, &q)| *s = q.cast_unsigned() ^ 128);
        }
    }

    /// Sets the biases of some keys of the panel.
    #[inline(always)]
    fn set_biases<'k, T: Element>(
        &mut self,
        keys: Range<usize>,
        score: Score,
        row: impl Fn(usize) -> &'k [T],
    ) {
        /// Dependent chains of additions that are computed side by side, to hide their latency.
        const CHAINS: usize = 8;
        let mut j = keys.start;
        while j < keys.end {
            let count = CHAINS.min(keys.end - j);
            // A last round of fewer keys repeats its last key.
            let biases = match score {
                Score::Energy => {
                    native_bias(std::array::from_fn::<_, CHAINS, _>(|c| row(j + c.min(count - 1))))
                }
                Score::Dot => [T::Acc::of(0.0); CHAINS],
            };
            for (c, bias) in biases[..count].iter().enumerate() {
                self.bias[(j + c) % KEYS] = bias.wide() as f32;
            }
            j += count;
        }
    }
}

/// `-|k|^2 / 2` of C keys with the bits of the native scan: for each key one chain of fused multiply-adds in the order
/// of D.
#[inline(always)]
pub(crate) fn native_bias<T: Element, const C: usize>(keys: [&[T]; C]) -> [T::Acc; C] {
    let mut square = [T::Acc::of(0.0); C];
    // The loop over keys is inside, so that the chains of different keys overlap.
    #[allow(clippy::needless_range_loop)]
    for x in 0..keys[0].len() {
        for c in 0..C {
            let k = keys[c][x].up();
            square[c] = num_traits::Float::mul_add(k, k, square[c]);
        }
    }
    square.map(|s| s * T::Acc::of(-0.5))
}
