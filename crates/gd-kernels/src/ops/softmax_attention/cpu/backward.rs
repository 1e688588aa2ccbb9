//! The backward pass: the weights of a block are computed again from the scores and the logarithms of their sums.
//!
//! With the weights p, `delta_i = <dy_i, y_i>` and `ds_ij = p_ij (<dy_i, v_j> - delta_i)`: `dv = p^T dy`,
//! `dq = scale ds k`, `dk = scale ds^T q`, `dprior_j = sum_i ds_ij` and `dsink = -sum_i exp(sink - log_sum_i) delta_i`.

use std::ops::Range;

use num_traits::{One, Zero};

use super::Problem;
use super::block::{
    BLOCK_KEYS, BLOCK_ROWS, KeyRange, QueryRows, columns_of_heads, gather, prior_of_rows, rows_of_heads,
    within,
};
use crate::backend::cpu::element::{Element, Real, sum2};
use crate::backend::cpu::matrix::{Left, Padded, multiply, padded};
use crate::backend::cpu::parallel::{par_items, vectorize};
use crate::backend::cpu::view::View;
use crate::mask::reach;

/// Query rows that are processed one after the other. Their gradients of a block of keys are summed, and the sums of all
/// chunks are added in order, so that the result does not depend on the number of threads.
const CHUNK_ROWS: usize = 6 * BLOCK_ROWS;

/// The gradients of q, k and v, with those of sink and prior as last elements of the rows of q and k.
pub(super) fn backward<T: Element>(
    problem: &Problem,
    [q, k, v, y, dy]: [View<'_, T>; 5],
    log_sums: &[T::Acc],
) -> [Vec<T::Acc>; 3] {
    let sizes = problem.sizes;
    let heads = sizes.batch * sizes.kv_heads;
    let lengths = [sizes.rows() * sizes.q_row(), sizes.keys * sizes.k_row(), sizes.keys * sizes.value_dim];
    let [mut dq, mut dk, mut dv] = lengths.map(|len| vec![T::Acc::zero(); heads * len]);
    if lengths.contains(&0) || heads == 0 {
        return [dq, dk, dv];
    }
    let pass = Backward {
        problem,
        q,
        prior: sizes.has_prior.then(|| prior_of_rows(problem, k)),
        y,
        dy,
        keys: rows_of_heads(problem, k, sizes.head_dim),
        key_columns: columns_of_heads(problem, k, sizes.head_dim),
        value_columns: columns_of_heads(problem, v, sizes.value_dim),
    };
    let parts = dk.chunks_mut(lengths[1]).zip(dv.chunks_mut(lengths[2]));
    let tasks: Vec<_> = dq.chunks_mut(lengths[0]).zip(log_sums.chunks(sizes.rows())).zip(parts).collect();
    par_items(tasks, &|head, ((dq, log_sums), (dk, dv))| pass.head(head, log_sums, [dq, dk, dv]));
    [dq, dk, dv]
}

struct Backward<'a, T: Element> {
    problem: &'a Problem,
    q: View<'a, T>,
    /// That of all keys `[B * Hk, M]`.
    prior: Option<Vec<T::Acc>>,
    y: View<'a, T>,
    dy: View<'a, T>,
    /// The result of [`rows_of_heads`] for k, and of [`columns_of_heads`] for k and v.
    keys: Vec<T::Acc>,
    key_columns: Vec<T::Acc>,
    value_columns: Vec<T::Acc>,
}

impl<T: Element> Backward<'_, T> {
    /// The gradients of a key-value head and its queries.
    fn head(&self, head: usize, log_sums: &[T::Acc], [dq, dk, dv]: [&mut [T::Acc]; 3]) {
        let sizes = self.problem.sizes;
        let (q_row, k_row, v_row) = (sizes.q_row(), sizes.k_row(), sizes.value_dim);
        let mut sums: Vec<KeySums<T::Acc>> =
            (0..sizes.rows().div_ceil(CHUNK_ROWS)).map(|_| KeySums::new(self.problem)).collect();
        let blocks = dk.chunks_mut(BLOCK_KEYS * k_row).zip(dv.chunks_mut(BLOCK_KEYS * v_row));
        for (i, (dk, dv)) in blocks.enumerate() {
            let keys = i * BLOCK_KEYS..i * BLOCK_KEYS + dv.len() / v_row;
            let parts = dq.chunks_mut(CHUNK_ROWS * q_row).zip(log_sums.chunks(CHUNK_ROWS));
            let tasks: Vec<_> = parts.zip(&mut sums).collect();
            par_items(tasks, &|chunk, ((dq, log_sums), sums)| {
                sums.clear();
                let rows = dq.chunks_mut(BLOCK_ROWS * q_row).zip(log_sums.chunks(BLOCK_ROWS));
                for (i, (dq, log_sums)) in rows.enumerate() {
                    let first = chunk * CHUNK_ROWS + i * BLOCK_ROWS;
                    let queries = QueryRows::new(self.problem, head, first, log_sums.len());
                    self.block(head, &keys, &queries, log_sums, dq, sums);
                }
            });
            for sums in &sums {
                sums.add_to(self.problem, dk, dv);
            }
        }
    }

    /// Adds the gradients of a block of query rows and the keys `all`: `dq` of these rows, `sums` of all keys.
    fn block(
        &self,
        head: usize,
        all: &Range<usize>,
        queries: &QueryRows,
        log_sums: &[T::Acc],
        dq: &mut [T::Acc],
        sums: &mut KeySums<T::Acc>,
    ) {
        let (problem, sizes) = (self.problem, self.problem.sizes);
        let (rows, d, value_dim) = (queries.len(), sizes.head_dim, sizes.value_dim);
        let (one, scale) = (T::Acc::one(), T::Acc::of(problem.scale));
        let visible = queries.visible(problem);
        let common = within(&reach(&visible), all);
        let adds_sink = all.start == 0 && sizes.has_sink;
        if common.is_empty() && !adds_sink {
            return;
        }
        let KeySums { scratch: Scratch { q, dy, weights, slopes, dq: row_sums }, dk, dv, dprior } = sums;
        gather(self.dy, value_dim, queries.indices(problem), dy);
        let deltas: Vec<T::Acc> = vectorize(|| {
            let rows = queries.indices(problem).zip(dy.chunks_exact(padded(value_dim)));
            rows.map(|((a, b, c), dy)| sum2(&dy[..value_dim], self.y.row(a, b, c), |dy, y: T| dy * y.up()))
                .collect()
        });
        if adds_sink {
            let rows = queries.indices(problem).zip(deltas.iter().zip(log_sums));
            for (dq, ((a, b, c), (&delta, &log_sum))) in dq.chunks_exact_mut(sizes.q_row()).zip(rows) {
                dq[d] = -(self.q.row(a, b, c)[d].up() - log_sum).exp_fast() * delta;
            }
        }
        if common.is_empty() {
            return;
        }
        let keys = KeyRange { head, keys: all.start + common.start..all.start + common.end };
        gather(self.q, d, queries.indices(problem), q);
        keys.products(problem, (q, rows), (&self.key_columns, d), scale, weights);
        keys.products(problem, (dy, rows), (&self.value_columns, value_dim), one, slopes);
        let prior = self.prior.as_ref().map(|prior| keys.prior(problem, prior));
        let columns = keys.columns();
        vectorize(|| {
            let blocks = weights.chunks_exact_mut(BLOCK_KEYS).zip(slopes.chunks_exact_mut(BLOCK_KEYS));
            for (((p, ds), visible), (&log_sum, &delta)) in
                blocks.zip(&visible).zip(log_sums.iter().zip(&deltas))
            {
                let own = within(visible, &columns);
                if let Some(prior) = prior {
                    p[own.clone()].iter_mut().zip(&prior[own.clone()]).for_each(|(s, &x)| *s += x);
                }
                weigh(&mut p[..columns.len()], &mut ds[..columns.len()], own, log_sum, delta);
            }
        });
        let (offset, count) = (keys.offset(), keys.keys.len());
        let (p, ds) = (&weights[offset..], &slopes[offset..]);
        // Gradients of the rows.
        row_sums.clear();
        row_sums.resize(rows * padded(d), T::Acc::zero());
        let out = Padded { data: &mut row_sums[..], stride: padded(d) };
        let left = Left::new(ds, rows, count, BLOCK_KEYS);
        multiply(out, d, false, scale, left, keys.rows(problem, &self.keys, d));
        for (dq, sums) in dq.chunks_exact_mut(sizes.q_row()).zip(row_sums.chunks_exact(padded(d))) {
            dq[..d].iter_mut().zip(sums).for_each(|(dq, &x)| *dq += x);
        }
        // Gradients of the keys.
        let out = Padded { data: &mut dv[common.start * padded(value_dim)..], stride: padded(value_dim) };
        let right = Padded { data: &dy[..], stride: padded(value_dim) };
        multiply(out, value_dim, true, one, Left::transposed(p, rows, count, BLOCK_KEYS), right);
        let out = Padded { data: &mut dk[common.start * padded(d)..], stride: padded(d) };
        let right = Padded { data: &q[..], stride: padded(d) };
        multiply(out, d, true, scale, Left::transposed(ds, rows, count, BLOCK_KEYS), right);
        if sizes.has_prior {
            for ds in slopes.chunks_exact(BLOCK_KEYS).take(rows) {
                let own = &ds[offset..offset + count];
                dprior[common.clone()].iter_mut().zip(own).for_each(|(sum, &ds)| *sum += ds);
            }
        }
    }
}

/// The gradients of a block of keys, and the memory of their computation.
struct KeySums<A> {
    dk: Vec<A>,
    dv: Vec<A>,
    dprior: Vec<A>,
    scratch: Scratch<A>,
}

/// Buffers of a block of rows.
struct Scratch<A> {
    q: Vec<A>,
    dy: Vec<A>,
    weights: Vec<A>,
    slopes: Vec<A>,
    dq: Vec<A>,
}

impl<A: Real> KeySums<A> {
    fn new(problem: &Problem) -> Self {
        let sizes = problem.sizes;
        let zeros = |len: usize| vec![A::zero(); len];
        let scores = BLOCK_ROWS.min(sizes.rows()) * BLOCK_KEYS;
        Self {
            dk: zeros(BLOCK_KEYS * padded(sizes.head_dim)),
            dv: zeros(BLOCK_KEYS * padded(sizes.value_dim)),
            dprior: zeros(BLOCK_KEYS),
            scratch: Scratch {
                q: Vec::new(),
                dy: Vec::new(),
                weights: zeros(scores),
                slopes: zeros(scores),
                dq: Vec::new(),
            },
        }
    }

    fn clear(&mut self) {
        for sums in [&mut self.dk, &mut self.dv, &mut self.dprior] {
            sums.fill(A::zero());
        }
    }

    /// Adds the sums to the gradients of the keys.
    fn add_to(&self, problem: &Problem, dk: &mut [A], dv: &mut [A]) {
        let sizes = problem.sizes;
        let (d, value_dim) = (sizes.head_dim, sizes.value_dim);
        let keys = self.dk.chunks_exact(padded(d)).zip(&self.dprior);
        for (dk, (sums, &prior)) in dk.chunks_exact_mut(sizes.k_row()).zip(keys) {
            dk[..d].iter_mut().zip(sums).for_each(|(dk, &x)| *dk += x);
            dk[d..].iter_mut().for_each(|dk| *dk += prior);
        }
        for (dv, sums) in dv.chunks_exact_mut(value_dim).zip(self.dv.chunks_exact(padded(value_dim))) {
            dv.iter_mut().zip(sums).for_each(|(dv, &x)| *dv += x);
        }
    }
}

/// Replaces scores by weights and the products `<dy, v>` by the gradients of the scores; both are 0 for other keys than
/// those that the row sees.
#[inline(always)]
fn weigh<A: Real>(p: &mut [A], ds: &mut [A], visible: Range<usize>, log_sum: A, delta: A) {
    for part in [&mut *p, &mut *ds] {
        part[..visible.start].fill(A::zero());
        part[visible.end..].fill(A::zero());
    }
    // A row without a key of finite score.
    if log_sum == A::neg_infinity() {
        p[visible.clone()].fill(A::zero());
        ds[visible].fill(A::zero());
        return;
    }
    for (p, ds) in p[visible.clone()].iter_mut().zip(&mut ds[visible]) {
        *p = (*p - log_sum).exp_fast();
        *ds = *p * (*ds - delta);
    }
}
