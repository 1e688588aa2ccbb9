//! A block of query rows of one head: what a task of a scan works on, and where its candidates are written.

use std::ops::Range;

use num_traits::{Float, Zero};

use crate::backend::cpu::element::{Element, Real, sum2};
use crate::ops::scan::cpu::arguments::Arguments;
use crate::ops::scan::cpu::ill_conditioned::{finite, form_in_f64};
use crate::ops::scan::problem::Problem;
use crate::options::{Score, TieBreak};

/// A candidate of a row: energy, key, and whether the key is protected.
pub(crate) type Candidate<A> = (A, i32, bool);

/// A block of query rows of one head and its part of the outputs.
pub(crate) struct Block<'a, T: Element> {
    pub(crate) problem: &'a Problem,
    pub(crate) x: &'a Arguments<'a, T>,
    /// Batch entry.
    pub(crate) b: usize,
    /// Query head.
    pub(crate) h: usize,
    /// Queries.
    pub(crate) rows: Range<usize>,
    /// Slots of a row in the outputs.
    pub(crate) slots: usize,
    pub(crate) index: &'a mut [i32],
    pub(crate) energy: &'a mut [T::Acc],
    pub(crate) flags: &'a mut [u8],
    /// For the range of keys that starts at the first number and has the second as its length: whether they have a common
    /// offset. Of the last such range that was looked at.
    pub(crate) common_offset: Option<([usize; 2], bool)>,
}

impl<T: Element> Block<'_, T> {
    /// The visible keys of each row.
    pub(crate) fn visible(&self) -> Vec<Range<usize>> {
        self.rows.clone().map(|i| self.x.mask.visible(self.b, i, self.problem.keys)).collect()
    }

    /// The flat key-value head `b * Hk + h`.
    pub(crate) fn kv_head(&self) -> usize {
        self.b * self.problem.kv_heads + self.h / self.problem.group()
    }

    /// Whether keys are visited from the last to the first: with strict comparisons the first of several equal keys
    /// stays, which for [`TieBreak::Last`] must be the last key.
    pub(crate) fn backwards(&self) -> bool {
        self.problem.tie == TieBreak::Last
    }

    /// The panels of `width` keys that cover `reach`, in the order in which they are visited.
    pub(crate) fn panels(&self, reach: &Range<usize>, width: usize) -> impl Iterator<Item = usize> + use<T> {
        let panels = reach.start / width..reach.end.div_ceil(width);
        let backwards = self.backwards();
        (0..panels.len()).map(move |step| if backwards { panels.end - 1 - step } else { panels.start + step })
    }

    /// The prior of the keys, if there is one.
    #[inline(always)]
    pub(crate) fn prior_row(&self) -> Option<&[T::Acc]> {
        self.x.prior.map(|prior| prior.row(self.b, self.h, self.problem.q_heads))
    }

    /// Adds the prior, as scores, to the biases of the keys from `first` on.
    #[inline(always)]
    pub(crate) fn add_prior(&self, bias: &mut [T::Acc], first: usize) {
        if let Some(prior) = self.prior_row() {
            let scale = self.prior_scale();
            bias.iter_mut().zip(&prior[first..]).for_each(|(b, x)| *b = x.mul_add(scale, *b));
        }
    }

    /// The factor from a prior to a score. The score by which keys are ranked is `-eps / (2 beta)` for the energy,
    /// plus terms of the query alone, and `-eps / beta` for the dot product.
    #[inline(always)]
    fn prior_scale(&self) -> T::Acc {
        let beta = self.x.beta[self.h];
        match self.problem.score {
            Score::Energy => T::Acc::of(0.5) / beta,
            Score::Dot => beta.recip(),
        }
    }

    /// Writes the candidates of a row, `keys` (by score, the best first) and the protected ones, sorted by (energy,
    /// index). If the scores of the row are ill-conditioned, other keys take the place of `keys`. `candidates` is scratch
    /// memory.
    #[inline(always)]
    pub(crate) fn write_candidates(
        &mut self,
        row: usize,
        visible: &Range<usize>,
        keys: &[u32],
        candidates: &mut Vec<Candidate<T::Acc>>,
    ) {
        let i = self.rows.start + row;
        let mut ranked = Vec::new();
        let keys = if self.ill_conditioned(row, visible, keys) {
            self.rank_in_f64(row, visible, &mut ranked);
            ranked.as_slice()
        } else {
            keys
        };
        // Loops rather than iterator adaptors: a closure that is not inlined is compiled without the instruction set.
        candidates.clear();
        for &j in keys {
            candidates.push((self.candidate_energy(i, j as usize), j as i32, false));
        }
        if let Some(protected) = self.x.protected {
            for &j in protected.row(self.b, self.h, i, self.problem.q_heads) {
                match candidates.iter_mut().find(|c| c.1 == j) {
                    Some(candidate) => candidate.2 = true,
                    None if j >= 0 && visible.contains(&(j as usize)) => {
                        candidates.push((self.candidate_energy(i, j as usize), j, true));
                    }
                    None => {}
                }
            }
        }
        candidates.retain(|c| c.0.is_finite());
        candidates.sort_by(|a, b| {
            let by_index = if self.problem.tie == TieBreak::First { a.1.cmp(&b.1) } else { b.1.cmp(&a.1) };
            a.0.partial_cmp(&b.0).unwrap_or(std::cmp::Ordering::Equal).then(by_index)
        });
        if candidates.first().is_some_and(|c| is_overflowed(c.0))
            || candidates.last().is_some_and(|c| is_overflowed(c.0))
        {
            self.sort_overflowed(i, candidates);
        }
        let base = row * self.slots;
        for (slot, &(e, j, flag)) in candidates.iter().enumerate() {
            (self.energy[base + slot], self.index[base + slot]) = (e, j);
            if flag {
                self.flags[base + slot] = 1;
            }
        }
    }

    /// Sorts candidates, sorted by (energy, index), by what their energies are in f64 where they overflowed.
    #[cold]
    #[inline(never)]
    fn sort_overflowed(&self, i: usize, candidates: &mut [Candidate<T::Acc>]) {
        let q = self.x.q.row(self.b, self.h, i);
        let energy = |c: &Candidate<T::Acc>| {
            let k = self.x.k.row(self.b, self.h / self.problem.group(), c.1 as usize);
            let prior = self.prior_row().map_or(T::Acc::zero(), |p| p[c.1 as usize]);
            match is_overflowed(c.0) {
                true => energy_in_f64(self.problem.score, self.x.beta[self.h], prior, q, k),
                false => c.0.wide(),
            }
        };
        candidates.sort_by(|a, b| energy(a).total_cmp(&energy(b)));
    }

    #[inline(always)]
    fn candidate_energy(&self, i: usize, j: usize) -> T::Acc {
        let q = self.x.q.row(self.b, self.h, i);
        let k = self.x.k.row(self.b, self.h / self.problem.group(), j);
        let prior = self.prior_row().map_or(T::Acc::zero(), |p| p[j]);
        pair_energy(self.problem.score, self.x.beta[self.h], prior, q, k)
    }
}

/// `beta |q - k|^2 - b`, or `-beta <q, k> - b`. The difference is formed before it is squared, which stays accurate
/// where query and key nearly coincide. The energy of finite numbers that exceeds the range of the accumulator is its
/// greatest number, with the sign of the energy.
#[inline(always)]
pub(crate) fn pair_energy<Q: Element, K: Element<Acc = Q::Acc>>(
    score: Score,
    beta: Q::Acc,
    prior: Q::Acc,
    q: &[Q],
    k: &[K],
) -> Q::Acc {
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
    let energy = beta * sum - prior;
    if energy.is_finite() { energy } else { overflowed(score, beta, prior, q, k, energy) }
}

/// An energy that overflowed, computed in f64.
#[cold]
#[inline(never)]
fn overflowed<Q: Element, K: Element<Acc = Q::Acc>>(
    score: Score,
    beta: Q::Acc,
    prior: Q::Acc,
    q: &[Q],
    k: &[K],
    energy: Q::Acc,
) -> Q::Acc {
    if !(finite(q) && finite(k) && prior.is_finite()) {
        return energy;
    }
    let energy = energy_in_f64(score, beta, prior, q, k);
    Q::Acc::of(energy).max(Q::Acc::min_value()).min(Q::Acc::max_value())
}

/// The energy of finite numbers in f64.
fn energy_in_f64<Q: Element, K: Element>(score: Score, beta: Q::Acc, prior: Q::Acc, q: &[Q], k: &[K]) -> f64 {
    let energy = beta.wide() * form_in_f64(score, q, k) - prior.wide();
    // NaN is the difference of two infinities.
    if energy.is_nan() { f64::MAX } else { energy }
}

/// Whether an energy is the greatest number, with either sign, which stands for those beyond it.
#[inline(always)]
pub(crate) fn is_overflowed<A: Real>(energy: A) -> bool {
    energy.abs() == A::max_value()
}
