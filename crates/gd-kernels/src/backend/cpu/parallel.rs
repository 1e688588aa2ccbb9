//! Loops over chunks of an output, run in parallel where the output is large enough.

use rayon::prelude::*;

use crate::backend::cpu::element::Real;

/// Output elements below which a loop runs on the calling thread.
const MIN_PARALLEL_ELEMENTS: usize = 1 << 13;

/// Approximate number of elements of a chunk.
const CHUNK_ELEMENTS: usize = 8192;

/// Greatest number of rows of a chunk.
const MAX_CHUNK_ROWS: usize = 256;

/// Rows of a chunk. The number depends on the row length alone, so that partial sums over chunks are the same on every
/// machine.
pub(crate) fn rows_per_chunk(row_len: usize) -> usize {
    (CHUNK_ELEMENTS / row_len.max(1)).clamp(1, MAX_CHUNK_ROWS)
}

/// Runs `f` with code for the widest vector instructions of this machine. This affects inlined loops only.
#[inline(always)]
pub(crate) fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `f(i, chunk i of out)` for all chunks, in parallel if the output is large. Calls may be nested.
pub(crate) fn for_chunks<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() < MIN_PARALLEL_ELEMENTS {
        out.chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    }
}

/// As [`for_chunks`] over two outputs with chunk lengths of their own and the same number of chunks.
pub(crate) fn for_chunks2<T: Send, U: Send>(
    (a, a_chunk): (&mut [T], usize),
    (b, b_chunk): (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (a_chunk, b_chunk) = (a_chunk.max(1), b_chunk.max(1));
    if a.len() + b.len() < MIN_PARALLEL_ELEMENTS {
        a.chunks_mut(a_chunk).zip(b.chunks_mut(b_chunk)).enumerate().for_each(|(i, (a, b))| f(i, a, b));
    } else {
        let chunks = a.par_chunks_mut(a_chunk).zip(b.par_chunks_mut(b_chunk));
        chunks.enumerate().for_each(|(i, (a, b))| f(i, a, b));
    }
}

/// Adds the equally long rows of `parts`, first to last.
pub(crate) fn sum_rows<T: Real>(parts: &[T], len: usize) -> Vec<T> {
    let mut total = vec![T::zero(); len];
    for part in parts.chunks_exact(len.max(1)) {
        total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
    }
    total
}
