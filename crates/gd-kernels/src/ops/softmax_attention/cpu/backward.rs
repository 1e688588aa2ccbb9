//! The backward pass: the weights of a block are computed again from the scores and the logarithms of their sums.
//!
//! With the weights p, `delta_i = <dy_i, y_i>` and `ds_ij = p_ij (<dy_i, v_j> - delta_i)`: `dv = p^T dy`,
//! `dq = scale ds k`, `dk = scale ds^T q`, `dprior_j = sum_i ds_ij` and `dsink = -sum_i exp(sink - log_sum_i) delta_i`.

use std::ops::Range;

use num_traits::{One, Zero};

use super::Problem;
use super::block::{BLOCK_KEYS, BLOCK_ROWS, KeyBlock, QueryRows, gather, union, within};
use crate::backend::cpu::element::{Element, Real, sum2};
use crate::backend::cpu::matrix::{Matrix, multiply};
use crate::backend::cpu::parallel::{par_items, vectorize};
use crate::backend::cpu::view::View;

/// Query rows that are processed one after the other. Their gradients of a block of keys are summed, and the sums of all
/// chunks are added in order, so that the result does not depend on the number of threads.
const CHUNK_ROWS: usize = 512;

/// The gradients of q, k and v, with those of sink and prior as last elements of the rows of q and k.
pub(super) fn backward<T: Element<Acc: 'static>>(
    problem: &Problem,
    tensors: [View<'_, T>; 5],
    log_sums: &[T::Acc],
) -> [Vec<T::Acc>; 3] {
    let sizes = problem.sizes;
    let heads = sizes.batch * sizes.kv_heads;
    let lengths = [sizes.rows() * sizes.q_row(), sizes.keys * sizes.k_row(), sizes.keys * sizes.value_dim];
    let [mut dq, mut dk, mut dv] = lengths.map(|len| vec![T::Acc::zero(); heads * len]);
    if lengths.contains(&0) || heads == 0 {
        return [dq, dk, dv];
    }
    let parts = dk.chunks_mut(lengths[1]).zip(dv.chunks_mut(lengths[2]));
    let tasks: Vec<_> = dq.chunks_mut(lengths[0]).zip(log_sums.chunks(sizes.rows())).zip(parts).collect();
    par_items(tasks, &|head, ((dq, log_sums), (dk, dv))| {
        let head = Head { problem, tensors, at: (head / sizes.kv_heads, head % sizes.kv_heads) };
        head.backward(log_sums, dq, dk, dv);
    });
    [dq, dk, dv]
}

/// The query rows and keys of one key-value head.
struct Head<'a, T> {
    problem: &'a Problem,
    /// q, k, v, y and dy.
    tensors: [View<'a, T>; 5],
    /// Batch entry and key-value head.
    at: (usize, usize),
}

impl<T: Element<Acc: 'static>> Head<'_, T> {
    fn backward(&self, log_sums: &[T::Acc], dq: &mut [T::Acc], dk: &mut [T::Acc], dv: &mut [T::Acc]) {
        let sizes = self.problem.sizes;
        let (q_row, k_row, v_row) = (sizes.q_row(), sizes.k_row(), sizes.value_dim);
        let chunks = sizes.rows().div_ceil(CHUNK_ROWS);
        let partial = BLOCK_KEYS * (k_row + v_row);
        let mut partials = vec![T::Acc::zero(); chunks * partial];
        let blocks = dk.chunks_mut(BLOCK_KEYS * k_row).zip(dv.chunks_mut(BLOCK_KEYS * v_row));
        for (i, (dk, dv)) in blocks.enumerate() {
            let keys = i * BLOCK_KEYS..i * BLOCK_KEYS + dv.len() / v_row;
            let parts = dq.chunks_mut(CHUNK_ROWS * q_row).zip(log_sums.chunks(CHUNK_ROWS));
            let tasks: Vec<_> = parts.zip(partials.chunks_mut(partial)).collect();
            par_items(tasks, &|chunk, ((dq, log_sums), partial)| {
                partial.fill(T::Acc::zero());
                let (dk, dv) = partial.split_at_mut(BLOCK_KEYS * k_row);
                let mut block = Block::new(self, keys.clone());
                let rows = dq.chunks_mut(BLOCK_ROWS * q_row).zip(log_sums.chunks(BLOCK_ROWS));
                for (i, (dq, log_sums)) in rows.enumerate() {
                    let first = chunk * CHUNK_ROWS + i * BLOCK_ROWS;
                    let queries = QueryRows::new(self.at.0, self.at.1, first, log_sums.len());
                    block.add(&queries, log_sums, keys.start == 0, [dq, dk, dv]);
                }
            });
            for partial in partials.chunks(partial) {
                let (k_part, v_part) = partial.split_at(BLOCK_KEYS * k_row);
                dk.iter_mut().zip(k_part).for_each(|(sum, &x)| *sum += x);
                dv.iter_mut().zip(v_part).for_each(|(sum, &x)| *sum += x);
            }
        }
    }
}

/// The gradients of a block of keys.
struct Block<'a, T: Element> {
    head: &'a Head<'a, T>,
    all: Range<usize>,
    keys: KeyBlock<T::Acc>,
    q: Vec<T::Acc>,
    dy: Vec<T::Acc>,
    weights: Vec<T::Acc>,
    slopes: Vec<T::Acc>,
}

impl<'a, T: Element<Acc: 'static>> Block<'a, T> {
    fn new(head: &'a Head<'a, T>, all: Range<usize>) -> Self {
        let zeros = vec![T::Acc::zero(); BLOCK_ROWS * all.len()];
        let (weights, slopes) = (zeros.clone(), zeros);
        Self { head, all, keys: KeyBlock::new(head.problem), q: Vec::new(), dy: Vec::new(), weights, slopes }
    }

    /// Adds the gradients of a block of query rows: `dq` of these rows, `dk` and `dv` of all keys of the block.
    fn add(
        &mut self,
        queries: &QueryRows,
        log_sums: &[T::Acc],
        first_keys: bool,
        [dq, dk, dv]: [&mut [T::Acc]; 3],
    ) {
        let Head { problem, tensors: [q, k, v, y, dy], at } = *self.head;
        let sizes = problem.sizes;
        let (rows, d, value_dim) = (queries.len(), sizes.head_dim, sizes.value_dim);
        let (one, scale) = (T::Acc::one(), T::Acc::of(problem.scale));
        let visible = queries.visible(problem);
        let common = within(&union(&visible), &self.all);
        if common.is_empty() && !(first_keys && sizes.has_sink) {
            return;
        }
        gather(dy, value_dim, queries.indices(problem), &mut self.dy);
        let deltas: Vec<T::Acc> = vectorize(|| {
            let rows = queries.indices(problem).zip(self.dy.chunks_exact(value_dim));
            rows.map(|((a, b, c), dy)| sum2(dy, y.row(a, b, c), |dy, y: T| dy * y.up())).collect()
        });
        if first_keys && sizes.has_sink {
            let rows = queries.indices(problem).zip(deltas.iter().zip(log_sums));
            for (dq, ((a, b, c), (&delta, &log_sum))) in dq.chunks_exact_mut(sizes.q_row()).zip(rows) {
                dq[d] = -(q.row(a, b, c)[d].up() - log_sum).exp_fast() * delta;
            }
        }
        if common.is_empty() {
            return;
        }
        let keys = self.all.start + common.start..self.all.start + common.end;
        if self.keys.keys != keys {
            self.keys.load(problem, k, v, at, keys);
        }
        let count = self.keys.keys.len();
        gather(q, d, queries.indices(problem), &mut self.q);
        let (weights, slopes) = (&mut self.weights[..rows * count], &mut self.slopes[..rows * count]);
        self.keys.scores(problem, &self.q, rows, &visible, weights);
        let dy = Matrix::new(&self.dy, rows, value_dim, value_dim);
        multiply(slopes, count, false, one, dy, self.keys.v().t());
        vectorize(|| {
            let rows = weights.chunks_exact_mut(count).zip(slopes.chunks_exact_mut(count));
            for (((p, ds), visible), (&log_sum, &delta)) in
                rows.zip(&visible).zip(log_sums.iter().zip(&deltas))
            {
                weigh(p, ds, within(visible, &self.keys.keys), log_sum, delta);
            }
        });
        let (p, ds) = (Matrix::new(weights, rows, count, count), Matrix::new(slopes, rows, count, count));
        let q = Matrix::new(&self.q, rows, d, d);
        multiply(&mut dv[common.start * value_dim..], value_dim, true, one, p.t(), dy);
        multiply(dq, sizes.q_row(), true, scale, ds, self.keys.k());
        let dk = &mut dk[common.start * sizes.k_row()..];
        multiply(dk, sizes.k_row(), true, scale, ds.t(), q);
        if sizes.has_prior {
            for ds in slopes.chunks_exact(count) {
                dk.chunks_exact_mut(sizes.k_row()).zip(ds).for_each(|(dk, &ds)| dk[d] += ds);
            }
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
