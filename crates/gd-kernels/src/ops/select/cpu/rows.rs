//! Loops over query rows and keys that the operators of Select share.

use rayon::prelude::*;

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::vectorize;
use crate::ops::select::cpu::inverse::Inverse;

/// The sizes of a selection: q `[b, hq, n, _]`, k and v `[b, hk, m, _]`, candidates `[b, hq, n, slots]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) b: usize,
    pub(crate) hq: usize,
    pub(crate) hk: usize,
    pub(crate) n: usize,
    pub(crate) m: usize,
    pub(crate) slots: usize,
}

impl Dims {
    /// Query rows in all.
    pub(crate) fn rows(&self) -> usize {
        self.b * self.hq * self.n
    }

    /// Batch entry, query head, key head and query of a flat row.
    #[inline(always)]
    pub(crate) fn place(&self, row: usize) -> [usize; 4] {
        let (head, i) = (row / self.n, row % self.n);
        let h = head % self.hq;
        [head / self.hq, h, h / (self.hq / self.hk), i]
    }
}

/// Query rows that a task takes; fixed, so that results do not depend on the thread count.
const TASK_ROWS: usize = 64;

/// Keys that a task takes.
const TASK_KEYS: usize = 64;

/// Fills `out`, `len` elements a row, by `f(row, state, out)`; `state` is made once a task.
pub(crate) fn for_rows<O: Send, S>(
    out: &mut [O],
    len: usize,
    state: impl Fn() -> S + Sync,
    f: impl Fn(usize, &mut S, &mut [O]) + Sync,
) {
    out.par_chunks_mut(TASK_ROWS * len).enumerate().for_each(|(task, out)| {
        vectorize(
            #[inline(always)]
            || {
                let mut state = state();
                for (r, out) in out.chunks_mut(len).enumerate() {
                    f(task * TASK_ROWS + r, &mut state, out);
                }
            },
        );
    });
}

/// As [`for_rows`] with two outputs.
pub(crate) fn for_rows2<A: Send, B: Send, S>(
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    state: impl Fn() -> S + Sync,
    f: impl Fn(usize, &mut S, &mut [A], &mut [B]) + Sync,
) {
    let tasks = a.par_chunks_mut(TASK_ROWS * a_len).zip(b.par_chunks_mut(TASK_ROWS * b_len));
    tasks.enumerate().for_each(|(task, (a, b))| {
        vectorize(
            #[inline(always)]
            || {
                let mut state = state();
                for (r, (a, b)) in a.chunks_mut(a_len).zip(b.chunks_mut(b_len)).enumerate() {
                    f(task * TASK_ROWS + r, &mut state, a, b);
                }
            },
        );
    });
}

/// The gradient of keys or values `[B, Hk, M, len]`: for each key the sum of `add(slot, sum)` over
/// the flat slots (row * K + slot) that hold it, in ascending order, rounded once.
pub(crate) fn key_gradient<T: Element>(
    dims: &Dims,
    index: &[i32],
    len: usize,
    add: impl Fn(usize, [usize; 3], &mut [T::Acc]) + Sync,
) -> Vec<T> {
    let per_head = dims.hq / dims.hk * dims.n * dims.slots;
    let inverses: Vec<Inverse> = index.par_chunks(per_head).map(|rows| Inverse::new(rows, dims.m)).collect();
    let mut out = vec![T::down(T::Acc::of(0.0)); dims.b * dims.hk * dims.m * len];
    let blocks = dims.m.div_ceil(TASK_KEYS);
    let mut tasks: Vec<&mut [T]> = Vec::with_capacity(inverses.len() * blocks);
    for head in out.chunks_mut(dims.m * len) {
        tasks.extend(head.chunks_mut(TASK_KEYS * len));
    }
    tasks.into_par_iter().enumerate().for_each(|(task, out)| {
        let (head, first) = (task / blocks, task % blocks * TASK_KEYS);
        vectorize(
            #[inline(always)]
            || {
                let mut sum = vec![T::Acc::of(0.0); len];
                for (at, out) in out.chunks_mut(len).enumerate() {
                    let key = [head / dims.hk, head % dims.hk, first + at];
                    sum.fill(T::Acc::of(0.0));
                    for slot in inverses[head].readers(first + at) {
                        add(head * per_head + slot, key, &mut sum);
                    }
                    out.iter_mut().zip(&sum).for_each(|(o, &s)| *o = T::down(s));
                }
            },
        );
    });
    out
}

/// Sums per-row values `[B, Hq, N]` into heads `[Hq]`, in row order, in f64.
pub(crate) fn head_sums<A: Real>(dims: &Dims, rows: &[A]) -> Vec<A> {
    let mut sums = vec![0f64; dims.hq];
    for (head, rows) in rows.chunks(dims.n).enumerate() {
        sums[head % dims.hq] += rows.iter().map(|x| x.wide()).sum::<f64>();
    }
    sums.into_iter().map(A::of).collect()
}
