//! Loops over chunks of an output, run in parallel where the output is large enough.

use std::cell::RefCell;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::backend::cpu::cache_line::AlignedVec;
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
    let f: ChunkBody<'_, T> = &f;
    if out.len() < MIN_PARALLEL_ELEMENTS {
        out.chunks_mut(chunk.max(1)).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        par_chunks(out, chunk, f);
    }
}

/// As [`for_chunks`] over two outputs with chunk lengths of their own and the same number of chunks.
pub(crate) fn for_chunks2<T: Send, U: Send>(
    a: (&mut [T], usize),
    b: (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let f: ChunkBody2<'_, T, U> = &f;
    if a.0.len() + b.0.len() < MIN_PARALLEL_ELEMENTS {
        let chunks = a.0.chunks_mut(a.1.max(1)).zip(b.0.chunks_mut(b.1.max(1)));
        chunks.enumerate().for_each(|(i, (a, b))| f(i, a, b));
    } else {
        par_chunks2(a, b, f);
    }
}

// Every parallel loop below is one over task numbers with a trait object as its body, so that rayon's code is compiled once and
// not for each type of body and of item: that took a third of the time to compile this crate.

/// The body of a loop over chunks.
type ChunkBody<'a, T> = &'a (dyn Fn(usize, &mut [T]) + Sync);

/// The body of a loop over the chunks of two slices.
type ChunkBody2<'a, T, U> = &'a (dyn Fn(usize, &mut [T], &mut [U]) + Sync);

/// Calls `f(i)` for the tasks 0 to `count` in parallel.
fn par_tasks(count: usize, f: &(dyn Fn(usize) + Sync)) {
    (0..count).into_par_iter().with_max_len(1).for_each(f);
}

/// Calls `f(i, item i)` for all items in parallel.
pub(crate) fn par_items<X: Send>(items: Vec<X>, f: &(dyn Fn(usize, X) + Sync)) {
    // Each lock is taken once.
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    par_tasks(items.len(), &|i| {
        let item = items[i].lock().unwrap_or_else(PoisonError::into_inner).take();
        item.into_iter().for_each(|item| f(i, item));
    });
}

/// As [`par_items`], with the results in the order of the items.
pub(crate) fn par_map<X: Send, R: Send>(items: Vec<X>, f: &(dyn Fn(usize, X) -> R + Sync)) -> Vec<R> {
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    par_items(items.into_iter().zip(&mut results).collect(), &|i, (item, result)| *result = Some(f(i, item)));
    results.into_iter().flatten().collect()
}

/// Calls `f(i, chunk i of out)` for all chunks in parallel.
pub(crate) fn par_chunks<T: Send>(out: &mut [T], chunk: usize, f: ChunkBody<'_, T>) {
    par_items(out.chunks_mut(chunk.max(1)).collect(), f);
}

/// As [`par_chunks`] over two outputs with chunk lengths of their own and the same number of chunks.
pub(crate) fn par_chunks2<T: Send, U: Send>(
    (a, a_chunk): (&mut [T], usize),
    (b, b_chunk): (&mut [U], usize),
    f: ChunkBody2<'_, T, U>,
) {
    let chunks = a.chunks_mut(a_chunk.max(1)).zip(b.chunks_mut(b_chunk.max(1)));
    par_items(chunks.collect(), &|i, (a, b)| f(i, a, b));
}

/// The parts of a matrix with rows of `len` elements that tasks over its columns write: for each task `width` columns of every
/// row, and fewer for the last one.
pub(crate) fn column_tasks<T>(matrix: &mut [T], len: usize, width: usize) -> Vec<Vec<&mut [T]>> {
    let rows = matrix.len() / len.max(1);
    let mut tasks: Vec<Vec<&mut [T]>> = (0..len.div_ceil(width)).map(|_| Vec::with_capacity(rows)).collect();
    for row in matrix.chunks_exact_mut(len.max(1)) {
        tasks.iter_mut().zip(row.chunks_mut(width)).for_each(|(task, part)| task.push(part));
    }
    tasks
}

thread_local! {
    /// The buffers of [`with_scratch`] that are not in use, which keep their pages from call to call.
    static SCRATCH: RefCell<Vec<AlignedVec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with a buffer of this thread at a cache line: `len` elements of any value.
pub(crate) fn with_scratch<T: bytemuck::Pod, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    // A call within `f` gets another buffer.
    let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len * size_of::<T>() {
        buffer.resize(len * size_of::<T>(), 0);
    }
    let result = f(&mut bytemuck::cast_slice_mut(&mut buffer[..len * size_of::<T>()])[..len]);
    SCRATCH.with_borrow_mut(|buffers| buffers.push(buffer));
    result
}

/// Adds the equally long rows of `parts`, first to last.
pub(crate) fn sum_rows<T: Real>(parts: &[T], len: usize) -> Vec<T> {
    let mut total = vec![T::zero(); len];
    for part in parts.chunks_exact(len.max(1)) {
        total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
    }
    total
}
