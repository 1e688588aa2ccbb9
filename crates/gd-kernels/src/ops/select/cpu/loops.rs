//! Loops over query rows and keys that the steps of `select` share.

use super::Keys;
use super::inverse_index::InverseIndex;
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::{par_chunks, par_chunks2, par_items, par_map, vectorize};
use crate::ops::select::Sizes;

/// Query rows per task; fixed, so that results do not depend on the number of threads.
const TASK_ROWS: usize = 64;

/// Keys per task.
const TASK_KEYS: usize = 64;

/// Fills `out`, of `len` elements per row, by `f(row, state, out)`; `state` is created once per task.
pub(super) fn for_rows<O: Send, S>(
    out: &mut [O],
    len: usize,
    state: impl Fn() -> S + Sync,
    f: impl Fn(usize, &mut S, &mut [O]) + Sync,
) {
    par_chunks(out, TASK_ROWS * len, &|task, out| {
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
pub(super) fn for_rows2<A: Send, B: Send, S>(
    (a, a_len): (&mut [A], usize),
    (b, b_len): (&mut [B], usize),
    state: impl Fn() -> S + Sync,
    f: impl Fn(usize, &mut S, &mut [A], &mut [B]) + Sync,
) {
    par_chunks2((a, TASK_ROWS * a_len), (b, TASK_ROWS * b_len), &|task, a, b| {
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
pub(super) fn key_gradient<T: Element>(
    keys: &Keys,
    len: usize,
    add: impl Fn(usize, [usize; 3], &mut [T::Acc]) + Sync,
) -> Vec<T> {
    let Sizes { batch, q_heads, kv_heads, queries, keys: key_count, slots, .. } = keys.sizes;
    let per_head = q_heads / kv_heads * queries * slots;
    let inverses: Vec<InverseIndex> =
        par_map(keys.index.chunks(per_head).collect(), &|_, rows| InverseIndex::new(rows, key_count));
    let mut out = vec![T::down(T::Acc::of(0.0)); batch * kv_heads * key_count * len];
    let blocks = key_count.div_ceil(TASK_KEYS);
    let mut tasks: Vec<&mut [T]> = Vec::with_capacity(inverses.len() * blocks);
    for head in out.chunks_mut(key_count * len) {
        tasks.extend(head.chunks_mut(TASK_KEYS * len));
    }
    par_items(tasks, &|task, out| {
        let (head, first) = (task / blocks, task % blocks * TASK_KEYS);
        vectorize(
            #[inline(always)]
            || {
                let mut sum = vec![T::Acc::of(0.0); len];
                for (at, out) in out.chunks_mut(len).enumerate() {
                    let key = [head / kv_heads, head % kv_heads, first + at];
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
pub(super) fn head_sums<A: Real>(sizes: &Sizes, rows: &[A]) -> Vec<A> {
    let mut sums = vec![0f64; sizes.q_heads];
    for (head, rows) in rows.chunks(sizes.queries).enumerate() {
        sums[head % sizes.q_heads] += rows.iter().map(|x| x.wide()).sum::<f64>();
    }
    sums.into_iter().map(A::of).collect()
}
