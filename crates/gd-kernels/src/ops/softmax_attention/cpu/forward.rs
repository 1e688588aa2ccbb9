//! The forward pass: output rows, and the logarithm of the sum of the exponentials of each row's scores.

use std::ops::Range;

use num_traits::{Float, One, Zero};

use super::Problem;
use super::block::{
    BLOCK_KEYS, BLOCK_ROWS, KeyRange, QueryRows, columns_of_heads, gather, rows_of_heads, within,
};
use crate::backend::cpu::element::{Element, Real, maximum, sum1};
use crate::backend::cpu::matrix::{Left, Padded, multiply, padded};
use crate::backend::cpu::parallel::{par_items, vectorize};
use crate::backend::cpu::view::View;
use crate::mask::reach;

/// The output `[B, Hq, N, Dv]` and the logarithms `[B, Hq, N]`, minus infinity for a query without keys.
///
/// Keys and values may be stored in another element type than the queries, with the same accumulator; `prior` is that of
/// all keys `[B * Hk, M]`.
pub(super) fn forward<T: Element, S: Element<Acc = T::Acc>>(
    problem: &Problem,
    q: View<'_, T>,
    k: View<'_, S>,
    v: View<'_, S>,
    prior: Option<&[T::Acc]>,
) -> (Vec<T>, Vec<T::Acc>) {
    let sizes = problem.sizes;
    let (rows, heads) = (sizes.rows(), sizes.batch * sizes.kv_heads);
    let mut y = vec![T::zero(); heads * rows * sizes.value_dim];
    let mut log_sums = vec![T::Acc::neg_infinity(); heads * rows];
    if y.is_empty() || sizes.keys == 0 {
        return (y, log_sums);
    }
    let pass = Forward {
        problem,
        q,
        prior,
        keys: columns_of_heads(problem, k, sizes.head_dim),
        values: rows_of_heads(problem, v, sizes.value_dim),
    };
    let mut tasks = Vec::new();
    let outputs = y.chunks_mut(rows * sizes.value_dim).zip(log_sums.chunks_mut(rows));
    for (head, (y, log_sums)) in outputs.enumerate() {
        let parts = y.chunks_mut(BLOCK_ROWS * sizes.value_dim).zip(log_sums.chunks_mut(BLOCK_ROWS));
        tasks.extend(parts.enumerate().map(|(i, (y, log_sums))| (head, i * BLOCK_ROWS, y, log_sums)));
    }
    // The last rows of a causal problem see the most keys: they come first, so that no thread ends with them.
    tasks.reverse();
    par_items(tasks, &|_, (head, first, y, log_sums)| {
        let queries = QueryRows::new(problem, head, first, log_sums.len());
        pass.block(head, &queries, y, log_sums);
    });
    (y, log_sums)
}

struct Forward<'a, T: Element> {
    problem: &'a Problem,
    q: View<'a, T>,
    prior: Option<&'a [T::Acc]>,
    /// The result of [`columns_of_heads`].
    keys: Vec<T::Acc>,
    /// The result of [`rows_of_heads`].
    values: Vec<T::Acc>,
}

impl<T: Element> Forward<'_, T> {
    /// The output of a block of rows.
    fn block(&self, head: usize, queries: &QueryRows, y: &mut [T], log_sums: &mut [T::Acc]) {
        let (problem, sizes) = (self.problem, self.problem.sizes);
        let (rows, value_row) = (queries.len(), padded(sizes.value_dim));
        let (zero, one) = (T::Acc::zero(), T::Acc::one());
        let visible = queries.visible(problem);
        let mut q = Vec::new();
        gather(self.q, sizes.head_dim, queries.indices(problem), &mut q);
        let mut states = vec![State { top: T::Acc::neg_infinity(), sum: zero }; rows];
        if sizes.has_sink {
            for (state, (a, b, c)) in states.iter_mut().zip(queries.indices(problem)) {
                *state = State { top: self.q.row(a, b, c)[sizes.head_dim].up(), sum: one };
            }
        }
        let mut sums = vec![zero; rows * value_row];
        let mut scores = vec![zero; rows * BLOCK_KEYS];
        for keys in blocks(reach(&visible)) {
            let keys = KeyRange { head, keys };
            keys.products(
                problem,
                (&q, rows),
                (&self.keys, sizes.head_dim),
                T::Acc::of(problem.scale),
                &mut scores,
            );
            let prior = self.prior.map(|prior| keys.prior(problem, prior));
            let columns = keys.columns();
            vectorize(|| {
                let outputs = sums.chunks_exact_mut(value_row).zip(&mut states);
                for ((row, (sums, state)), visible) in
                    scores.chunks_exact_mut(BLOCK_KEYS).zip(outputs).zip(&visible)
                {
                    let own = within(visible, &columns);
                    row[..own.start].fill(zero);
                    row[own.end..columns.len()].fill(zero);
                    if let Some(prior) = prior {
                        row[own.clone()].iter_mut().zip(&prior[own.clone()]).for_each(|(s, &p)| *s += p);
                    }
                    state.add(&mut row[own], sums);
                }
            });
            let weights = Left::new(&scores[keys.offset()..], rows, keys.keys.len(), BLOCK_KEYS);
            let values = keys.rows(problem, &self.values, sizes.value_dim);
            let sums = Padded { data: &mut sums[..], stride: value_row };
            multiply(sums, sizes.value_dim, true, one, weights, values);
        }
        vectorize(|| {
            let rows = y.chunks_exact_mut(sizes.value_dim).zip(sums.chunks_exact(value_row));
            for ((state, log_sum), (y, sums)) in states.iter().zip(log_sums).zip(rows) {
                if state.sum > zero {
                    *log_sum = state.top + state.sum.ln();
                    let scale = state.sum.recip();
                    y.iter_mut().zip(sums).for_each(|(y, &sum)| *y = T::down(sum * scale));
                }
            }
        });
    }
}

/// The parts of a range between multiples of [`BLOCK_KEYS`], so that the blocks of a row, and with them its rounding
/// errors, do not depend on what other rows see.
fn blocks(keys: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let first = keys.start / BLOCK_KEYS;
    (first..keys.end.div_ceil(BLOCK_KEYS))
        .map(move |block| keys.start.max(block * BLOCK_KEYS)..keys.end.min((block + 1) * BLOCK_KEYS))
}

/// The greatest score of a row so far, and the sum of `exp(score - top)`.
#[derive(Clone, Copy)]
struct State<A> {
    top: A,
    sum: A,
}

impl<A: Real> State<A> {
    /// Replaces scores by their exponentials relative to the greatest score, to which `sums` are scaled as well.
    #[inline(always)]
    fn add(&mut self, scores: &mut [A], sums: &mut [A]) {
        let greatest = maximum(scores);
        // Excluded keys have the score -inf, and their difference from a greatest score of -inf is NaN.
        if greatest == A::neg_infinity() {
            scores.fill(A::zero());
            return;
        }
        if greatest > self.top {
            let scale = (self.top - greatest).exp_fast();
            self.sum *= scale;
            sums.iter_mut().for_each(|sum| *sum *= scale);
            self.top = greatest;
        }
        let top = self.top;
        scores.iter_mut().for_each(|s| *s = (*s - top).exp_fast());
        self.sum += sum1(scores, |s| s);
    }
}
