//! The scan: every visible key of every query is scored, and the best are kept.
//!
//! One task holds a block of query rows of one head and walks the panels of its key-value head;
//! scores live in registers and a tile on the task's stack, never in an N x M buffer. Keys are ranked
//! by `<q, k> - |k|^2 / 2 + b / (2 beta)`; the energies of those that remain are then computed from
//! differences, which stay accurate where query and key nearly coincide.

mod bounded_lists;
mod certified;
pub(crate) mod check;
mod decode;
mod dense;
mod int8;
mod pack;
mod rescore;
mod tile;
mod top_k;

use std::ops::Range;

use num_traits::{Float, Zero};
use rayon::prelude::*;

use crate::backend::cpu::element::{Element, Real, sum2};
use crate::backend::cpu::view::View;
use crate::cache::int8_keys::cpu::Filter;
use crate::mask::Mask;
use crate::ops::scan::cpu::certified::Certified;
use crate::ops::scan::cpu::decode as few;
use crate::ops::scan::cpu::dense::Native;
use crate::ops::scan::cpu::int8::Code;
use crate::ops::scan::cpu::pack::Packed;
use crate::ops::scan::cpu::rescore::Settle;
use crate::ops::scan::plan::{CpuScanPlan, Walk};
use crate::ops::scan::problem::Problem;
use crate::options::{Precision, Score, TieBreak};

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
    /// The keys as integers, if the caller keeps them.
    pub(crate) quantized: Option<&'a Filter>,
}

/// Candidates `[B, Hq, N, slots]`: key or -1, energy or +inf, and whether the key is protected.
pub(crate) struct Outputs<A> {
    pub(crate) slots: usize,
    pub(crate) index: Vec<i32>,
    pub(crate) energy: Vec<A>,
    pub(crate) protected: Vec<u8>,
    /// Share of the visible pairs that were scored in full precision.
    pub(crate) rescored: f64,
}

/// Runs a planned scan.
pub(crate) fn run<T: Element>(problem: &Problem, plan: &CpuScanPlan, x: &Inputs<'_, T>) -> Outputs<T::Acc> {
    let slots = problem.candidates + x.protected.map_or(0, |p| p.dims[3]);
    let rows = problem.batch * problem.q_heads * problem.queries;
    let mut index = vec![-1i32; rows * slots];
    let mut energy = vec![T::Acc::infinity(); rows * slots];
    let mut protected = vec![0u8; if x.protected.is_some() { rows * slots } else { 0 }];
    let n = problem.queries;
    let mut blocks = Vec::new();
    let mut flags = protected.chunks_mut((n * slots).max(1));
    for (head, (index, energy)) in index.chunks_mut(n * slots).zip(energy.chunks_mut(n * slots)).enumerate() {
        let mut flags = flags.next().unwrap_or_default().chunks_mut(plan.block_rows * slots);
        let rows = index.chunks_mut(plan.block_rows * slots).zip(energy.chunks_mut(plan.block_rows * slots));
        for (block, (index, energy)) in rows.enumerate() {
            let first = block * plan.block_rows;
            let rows = first..n.min(first + plan.block_rows);
            let (b, h) = (head / problem.q_heads, head % problem.q_heads);
            let flags = flags.next().unwrap_or_default();
            blocks.push(Block { problem, x, b, h, rows, slots, index, energy, flags });
        }
    }
    if plan.walk == Walk::Blocks {
        // Under a causal mask the last blocks see the most keys: start with them.
        blocks.reverse();
    }
    let Some(arch) = plan.isa.arch() else { unreachable!("a plan names an available instruction set") };
    let mut rescored = 1.0;
    let wanted = plan.precision == Precision::Certified && x.quantized.is_none();
    let own = wanted.then(|| Filter::of(x.k, problem.score));
    let filter = x.quantized.or(own.as_ref()).filter(|_| plan.precision == Precision::Certified);
    let code = Code::of(plan.isa);
    let left = match (plan.walk, filter) {
        (Walk::Decode, filter) => few::run(arch, problem, filter, code, std::mem::take(&mut blocks)),
        (Walk::Blocks, Some(filter)) => {
            let each = std::mem::take(&mut blocks).into_par_iter().with_max_len(1);
            let certify = |block| {
                let lists = arch.dispatch(Certified { block: &block, filter, code, keys: 0..problem.keys });
                let lists = lists.as_ref().map(|lists| vec![lists]);
                arch.dispatch(Settle { block, lists, filter: Some(filter) })
            };
            each.map(certify).collect()
        }
        (Walk::Blocks, None) => Vec::new(),
    };
    if !left.is_empty() {
        let (mut scored, mut visible) = (0, 0);
        for left in left {
            scored += left.scored;
            visible += left.visible;
            blocks.extend(left.block);
        }
        if plan.precision == Precision::Certified && visible > 0 {
            rescored = scored as f64 / visible as f64;
        }
    }
    if !blocks.is_empty() {
        let packed = Packed::new(x.k, plan.panel_keys, problem.score);
        let each = blocks.into_par_iter().with_max_len(1);
        each.for_each(|block| arch.dispatch(Native { block, packed: &packed }));
    }
    Outputs { slots, index, energy, protected, rescored }
}

/// A block of query rows of one head, and where its candidates go.
pub(crate) struct Block<'a, T: Element> {
    pub(crate) problem: &'a Problem,
    pub(crate) x: &'a Inputs<'a, T>,
    pub(crate) b: usize,
    pub(crate) h: usize,
    pub(crate) rows: Range<usize>,
    slots: usize,
    index: &'a mut [i32],
    energy: &'a mut [T::Acc],
    flags: &'a mut [u8],
}

impl<T: Element> Block<'_, T> {
    /// The keys that each row sees.
    pub(crate) fn visible(&self) -> Vec<Range<usize>> {
        self.rows.clone().map(|i| self.x.mask.visible(self.b, i, self.problem.keys)).collect()
    }

    /// The keys that some row sees, as the range from the first to the last.
    pub(crate) fn reach(visible: &[Range<usize>]) -> Range<usize> {
        let seen = visible.iter().filter(|r| !r.is_empty());
        let (lo, hi) = seen.fold((usize::MAX, 0), |(lo, hi), r| (lo.min(r.start), hi.max(r.end)));
        if lo < hi { lo..hi } else { 0..0 }
    }

    /// The flat key-value head.
    pub(crate) fn kv_head(&self) -> usize {
        self.b * self.problem.kv_heads + self.h / self.problem.group()
    }

    /// Whether ties go to the last key, so that keys are walked backwards: strict comparison keeps
    /// what came first.
    pub(crate) fn backwards(&self) -> bool {
        self.problem.tie == TieBreak::Last
    }

    /// The panels of W keys that cover `reach`, in the order of the walk.
    pub(crate) fn panels(&self, reach: &Range<usize>, width: usize) -> impl Iterator<Item = usize> + use<T> {
        let panels = reach.start / width..reach.end.div_ceil(width);
        let backwards = self.backwards();
        (0..panels.len()).map(move |step| if backwards { panels.end - 1 - step } else { panels.start + step })
    }

    /// Adds the scores of the prior to the biases of keys `first..`.
    #[inline(always)]
    pub(crate) fn add_prior(&self, bias: &mut [T::Acc], first: usize) {
        if let Some(prior) = self.x.prior {
            let scale = self.prior_scale();
            let prior = &prior.row(self.b, self.h, self.problem.q_heads)[first..];
            bias.iter_mut().zip(prior).for_each(|(b, x)| *b = x.mul_add(scale, *b));
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
    pub(crate) fn finish(
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
    let sum = match score {
        Score::Energy => sum2(
            q,
            k,
            #[inline(always)]
            |q, k| {
                let x = q.up() - k.up();
                x * x
            },
        ),
        Score::Dot => -sum2(
            q,
            k,
            #[inline(always)]
            |q, k| q.up() * k.up(),
        ),
    };
    beta * sum - prior
}
