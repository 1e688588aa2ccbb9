//! Loops over chunks of an output, run in parallel where the output is large enough.

use rayon::prelude::*;

use crate::backend::cpu::element::Real;

/// Below this many output elements a loop stays on the calling thread.
const SERIAL: usize = 1 << 13;

/// Rows that one task handles: about 8192 elements. It depends on the row length alone, so that
/// partial sums over chunks are the same on every machine.
pub fn rows_per_chunk(row_len: usize) -> usize {
    (8192 / row_len.max(1)).clamp(1, 256)
}

/// Runs `f` compiled for the widest vectors of this machine (inlined loops only).
#[inline(always)]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `f(i, chunk i of out)` for all chunks, in parallel where it pays. May be nested.
pub fn for_chunks<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() < SERIAL {
        out.chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    }
}

/// As [`for_chunks`] over two outputs with chunk lengths of their own and the same number of chunks.
pub fn for_chunks2<T: Send, U: Send>(
    (a, a_chunk): (&mut [T], usize),
    (b, b_chunk): (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (a_chunk, b_chunk) = (a_chunk.max(1), b_chunk.max(1));
    if a.len() + b.len() < SERIAL {
        a.chunks_mut(a_chunk).zip(b.chunks_mut(b_chunk)).enumerate().for_each(|(i, (a, b))| f(i, a, b));
    } else {
        let chunks = a.par_chunks_mut(a_chunk).zip(b.par_chunks_mut(b_chunk));
        chunks.enumerate().for_each(|(i, (a, b))| f(i, a, b));
    }
}

/// Adds the equally long rows of `parts`, first to last.
pub fn sum_rows<T: Real>(parts: &[T], len: usize) -> Vec<T> {
    let mut total = vec![T::zero(); len];
    for part in parts.chunks_exact(len.max(1)) {
        total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
    }
    total
}
