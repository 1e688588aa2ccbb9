//! The blocked scan: QK^T fused with norm, prior, mask and running best-K.
//!
//! One task holds a block of query rows of one head and walks the packed panels of its key-value
//! head; scores live in a tile of R x W on the stack of that task, never in an N x M buffer. Keys
//! are ranked by `<q, k> - |k|^2 / 2 + b / (2 beta)`; the energies of the K that remain are then
//! computed from differences, which stay accurate where query and key nearly coincide.

use std::ops::Range;

use num_traits::{Float, Zero};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::best::Best;
use super::pack::Packed;
use super::view::View;
use crate::element::{Element, Real};
use crate::mask::Mask;
use crate::options::{Score, TieBreak};
use crate::plan::{Plan, Problem};

/// Key prior b `[B|1, Hq|Hk, M]`, in the accumulator type.
pub(crate) struct Prior<A> {
    pub(crate) data: Vec<A>,
    pub(crate) dims: [usize; 3],
}

impl<A: Real> Prior<A> {
    /// The row of batch entry `b` and query head `h`, of `q_heads`.
    #[inline(always)]
    pub(crate) fn row(&self, b: usize, h: usize, q_heads: usize) -> &[A] {
        let at = self.offset(b, h, q_heads);
        &self.data[at..at + self.dims[2]]
    }

    /// Where that row starts.
    #[inline(always)]
    pub(crate) fn offset(&self, b: usize, h: usize, q_heads: usize) -> usize {
        let [batch, heads, keys] = self.dims;
        ((b % batch) * heads + h / (q_heads / heads)) * keys
    }
}

/// Keys that stay candidates whatever their energy: `[B|1, Hq|Hk|1, N|1, P]`, negative pads.
pub(crate) struct Protected {
    pub(crate) data: Vec<i32>,
    pub(crate) dims: [usize; 4],
}

impl Protected {
    fn row(&self, b: usize, h: usize, i: usize, q_heads: usize) -> &[i32] {
        let [batch, heads, queries, slots] = self.dims;
        let row = ((b % batch) * heads + h / (q_heads / heads)) * queries + i % queries;
        &self.data[row * slots..(row + 1) * slots]
    }
}

/// The inputs of a scan; q and k `[B, H, rows, D]`.
pub(crate) struct Inputs<'a, T: Element> {
    pub(crate) q: View<'a, T>,
    pub(crate) k: View<'a, T>,
    pub(crate) beta: &'a [T::Acc],
    pub(crate) prior: Option<&'a Prior<T::Acc>>,
    pub(crate) protected: Option<&'a Protected>,
    pub(crate) mask: &'a Mask,
}

/// Candidates `[B, Hq, N, slots]`: key or -1, energy or +inf, and whether the key is protected.
pub(crate) struct Outputs<A> {
    pub(crate) slots: usize,
    pub(crate) index: Vec<i32>,
    pub(crate) energy: Vec<A>,
    pub(crate) protected: Vec<u8>,
}

/// Runs a planned scan.
pub(crate) fn run<T: Element>(problem: &Problem, plan: &Plan, x: &Inputs<'_, T>) -> Outputs<T::Acc> {
    let packed = Packed::new(x.k, plan.panel_keys, problem.score);
    let slots = problem.candidates + x.protected.map_or(0, |p| p.dims[3]);
    let rows = problem.batch * problem.q_heads * problem.queries;
    let mut index = vec![-1i32; rows * slots];
    let mut energy = vec![T::Acc::infinity(); rows * slots];
    let mut protected = vec![0u8; if x.protected.is_some() { rows * slots } else { 0 }];
    let n = problem.queries;
    let mut tasks = Vec::new();
    let mut flags = protected.chunks_mut((n * slots).max(1));
    for (head, (index, energy)) in index.chunks_mut(n * slots).zip(energy.chunks_mut(n * slots)).enumerate() {
        let mut flags = flags.next().unwrap_or_default().chunks_mut(plan.block_rows * slots);
        let blocks =
            index.chunks_mut(plan.block_rows * slots).zip(energy.chunks_mut(plan.block_rows * slots));
        for (block, (index, energy)) in blocks.enumerate() {
            let first = block * plan.block_rows;
            let rows = first..n.min(first + plan.block_rows);
            let (b, h) = (head / problem.q_heads, head % problem.q_heads);
            let flags = flags.next().unwrap_or_default();
            tasks.push(Block { problem, x, packed: &packed, b, h, rows, slots, index, energy, flags });
        }
    }
    // Under a causal mask the last blocks see the most keys: start with them.
    tasks.reverse();
    let Some(arch) = plan.isa.arch() else { unreachable!("a plan names an available instruction set") };
    tasks.into_par_iter().for_each(|task| arch.dispatch(task));
    Outputs { slots, index, energy, protected }
}

/// A block of query rows of one head, and where its candidates go.
struct Block<'a, T: Element> {
    problem: &'a Problem,
    x: &'a Inputs<'a, T>,
    packed: &'a Packed<T::Acc>,
    b: usize,
    h: usize,
    rows: Range<usize>,
    slots: usize,
    index: &'a mut [i32],
    energy: &'a mut [T::Acc],
    flags: &'a mut [u8],
}

impl<T: Element> WithSimd for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Two registers of keys by R rows of accumulators, and room for the operands.
        if S::REGISTER_COUNT >= 32 { self.scan::<S, 8>(simd) } else { self.scan::<S, 4>(simd) }
    }
}

impl<T: Element> Block<'_, T> {
    #[inline(always)]
    fn scan<S: Simd, const R: usize>(mut self, simd: S) {
        let (d, width, count) = (self.problem.head_dim, self.packed.width(), self.rows.len());
        let head = self.b * self.problem.kv_heads + self.h / self.problem.group();
        let visible: Vec<Range<usize>> =
            self.rows.clone().map(|i| self.x.mask.visible(self.b, i, self.problem.keys)).collect();
        let seen = visible.iter().filter(|r| !r.is_empty());
        let (lo, hi) = seen.fold((usize::MAX, 0), |(lo, hi), r| (lo.min(r.start), hi.max(r.end)));
        let mut best = Best::new(count, self.problem.candidates);
        if lo < hi {
            // Rows beyond the block are zero: their scores are computed and dropped.
            let mut q = vec![T::Acc::zero(); count.next_multiple_of(R) * d];
            for (row, i) in q.chunks_mut(d).zip(self.rows.clone()) {
                row.iter_mut().zip(self.x.q.row(self.b, self.h, i)).for_each(|(a, x)| *a = x.up());
            }
            let prior = self.x.prior.map(|p| p.row(self.b, self.h, self.problem.q_heads));
            let scale = self.prior_scale();
            let mut bias = vec![T::Acc::zero(); width];
            let mut scores = vec![T::Acc::zero(); R * width];
            let last_first = self.problem.tie == TieBreak::Last;
            let panels = lo / width..hi.div_ceil(width);
            for step in 0..panels.len() {
                // Strict comparison keeps the first of equals, so `Last` walks backwards.
                let p = if last_first { panels.end - 1 - step } else { panels.start + step };
                let (keys, base) = self.packed.panel(head, p);
                let first = p * width;
                bias.copy_from_slice(base);
                if let Some(prior) = prior {
                    bias.iter_mut().zip(&prior[first..]).for_each(|(b, x)| *b = x.mul_add(scale, *b));
                }
                for row in (0..count).step_by(R) {
                    let group = row..count.min(row + R);
                    if visible[group.clone()].iter().all(|r| r.end <= first || r.start >= first + width) {
                        continue;
                    }
                    tile::<T::Acc, S, R>(simd, &q[row * d..(row + R) * d], keys, &bias, d, &mut scores);
                    for (r, s) in group.zip(scores.chunks(width)) {
                        let range = visible[r].start.max(first)..visible[r].end.min(first + width);
                        if range.len() == width {
                            offer(&mut best, r, s, first, last_first);
                        } else if !range.is_empty() {
                            let s = &s[range.start - first..range.end - first];
                            offer(&mut best, r, s, range.start, last_first);
                        }
                    }
                }
            }
        }
        let mut found = Vec::with_capacity(self.slots);
        for (row, visible) in visible.iter().enumerate() {
            self.finish(row, visible, best.keys(row), &mut found);
        }
    }

    /// What turns a prior into a score: the ranking score is `-eps / (2 beta)`, plus terms of the
    /// query alone, for the energy, and `-eps / beta` for the dot product.
    #[inline(always)]
    fn prior_scale(&self) -> T::Acc {
        let beta = self.x.beta[self.h];
        match self.problem.score {
            Score::Energy => T::Acc::of(0.5) / beta,
            Score::Dot => beta.recip(),
        }
    }

    /// Writes a row's candidates, the K best and the protected ones, sorted by (energy, index).
    #[inline(always)]
    fn finish(
        &mut self,
        row: usize,
        visible: &Range<usize>,
        keys: &[u32],
        found: &mut Vec<(T::Acc, i32, bool)>,
    ) {
        let i = self.rows.start + row;
        // Loops rather than adaptors: a closure that is not inlined loses the instruction set.
        found.clear();
        for &j in keys {
            found.push((self.candidate_energy(i, j as usize), j as i32, false));
        }
        if let Some(protected) = self.x.protected {
            for &j in protected.row(self.b, self.h, i, self.problem.q_heads) {
                match found.iter_mut().find(|c| c.1 == j) {
                    Some(known) => known.2 = true,
                    None if j >= 0 && visible.contains(&(j as usize)) => {
                        found.push((self.candidate_energy(i, j as usize), j, true));
                    }
                    None => {}
                }
            }
        }
        found.retain(|c| c.0.is_finite());
        found.sort_by(|a, b| {
            let by_index = if self.problem.tie == TieBreak::First { a.1.cmp(&b.1) } else { b.1.cmp(&a.1) };
            a.0.partial_cmp(&b.0).unwrap_or(std::cmp::Ordering::Equal).then(by_index)
        });
        let base = row * self.slots;
        for (slot, &(e, j, flag)) in found.iter().enumerate() {
            (self.energy[base + slot], self.index[base + slot]) = (e, j);
            if flag {
                self.flags[base + slot] = 1;
            }
        }
    }

    #[inline(always)]
    fn candidate_energy(&self, i: usize, j: usize) -> T::Acc {
        let q = self.x.q.row(self.b, self.h, i);
        let k = self.x.k.row(self.b, self.h / self.problem.group(), j);
        let prior = self.x.prior.map_or(T::Acc::zero(), |p| p.row(self.b, self.h, self.problem.q_heads)[j]);
        pair_energy(self.problem.score, self.x.beta[self.h], prior, q, k)
    }
}

/// `beta |q - k|^2 - b`, or `-beta <q, k> - b`.
#[inline(always)]
pub(crate) fn pair_energy<T: Element>(score: Score, beta: T::Acc, prior: T::Acc, q: &[T], k: &[T]) -> T::Acc {
    let mut sum = T::Acc::zero();
    for (q, k) in q.iter().zip(k) {
        let (q, k) = (q.up(), k.up());
        sum = match score {
            Score::Energy => (q - k).mul_add(q - k, sum),
            Score::Dot => (-q).mul_add(k, sum),
        };
    }
    beta * sum - prior
}

/// Scores of R query rows `[R][D]` against one panel `[D][W]`: `bias + <q, k>`, one chain of fused
/// multiply-adds each, in the order of D.
#[inline(always)]
fn tile<A: Real, S: Simd, const R: usize>(
    simd: S,
    q: &[A],
    panel: &[A],
    bias: &[A],
    d: usize,
    scores: &mut [A],
) {
    let b = A::lanes::<S>(bias);
    let mut acc = [[b[0], b[1]]; R];
    let keys = A::lanes::<S>(panel);
    let q: [&[A]; R] = std::array::from_fn(|r| &q[r * d..(r + 1) * d]);
    for (x, k) in keys.chunks_exact(2).enumerate().take(d) {
        for r in 0..R {
            let v = q[r][x].splat(simd);
            acc[r][0] = A::fused(simd, v, k[0], acc[r][0]);
            acc[r][1] = A::fused(simd, v, k[1], acc[r][1]);
        }
    }
    for (out, acc) in A::lanes_mut::<S>(scores).chunks_exact_mut(2).zip(acc) {
        out.copy_from_slice(&acc);
    }
}

/// Most keys of a panel.
const MAX_LANES: usize = 32;

/// Offers the scores of keys `first..first + scores.len()` to a row's list. Most tiles improve
/// nothing, and one vectorised comparison says so.
#[inline(always)]
fn offer<A: Real>(best: &mut Best<A>, row: usize, scores: &[A], first: usize, backwards: bool) {
    let threshold = best.threshold(row);
    let mut improving = 0u32;
    for &s in scores {
        improving += u32::from(s > threshold);
    }
    if improving == 0 {
        return;
    }
    // Gather the hits without branches, since which lanes improve is not predictable.
    let (mut hits, mut count) = ([0u8; MAX_LANES + 1], 0);
    for (w, &s) in scores.iter().enumerate() {
        hits[count] = w as u8;
        count += usize::from(s > threshold);
    }
    for n in 0..count {
        let w = usize::from(hits[if backwards { count - 1 - n } else { n }]);
        if scores[w] > best.threshold(row) {
            best.insert(row, scores[w], first + w);
        }
    }
}
