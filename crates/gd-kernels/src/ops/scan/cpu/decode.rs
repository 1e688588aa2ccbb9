//! The scan for few queries against many keys, as in decoding: the keys are read once, in place, and split over threads.
//!
//! A task takes the queries of all heads that share a key-value head, and a chunk of its keys. It computes f32 scores in
//! a fast order of summation, with a bound of their difference from the native scores. The keys that the bound does not
//! exclude are then scored with the operations of the dense scan, so that the result has the same bits. With 8-bit keys
//! the method is the same, and a quarter of the bytes is read.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::par_map;
use crate::backend::cpu::prefetch::prefetch;
use crate::backend::cpu::quantize::KEYS;
use crate::cache::int8_keys::cpu::Int8Panels;
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::bounded_lists::{BoundedLists, capacity, reached_by};
use crate::ops::scan::cpu::certified::{Certified, visible_bits};
use crate::ops::scan::cpu::int8::Int8Path;
use crate::ops::scan::cpu::rescore::{Rescore, Rescoring};
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// Keys of a task.
const CHUNK_KEYS: usize = 1024;

/// Multiply-adds below which all tasks run on one thread: a few tens of microseconds of work, less than it costs to wake
/// other threads.
const MIN_PARALLEL_FLOPS: usize = 1 << 19;

/// Distance between the key that is read and the key that is prefetched. The hardware prefetcher detects the sequence of
/// keys too late.
const PREFETCH_DISTANCE_BYTES: usize = 1 << 12;

/// Independent accumulators of a dot product.
const ACCUMULATORS: usize = 4;

/// Scores and squares above this have no finite bound.
const MAX_BOUNDED: f32 = 1e30;

/// Upper bound of the error of a norm whose squares underflow to subnormal numbers.
const SUBNORMAL_NORM_ERROR: f32 = 1e-21;

/// Finds the candidates of the blocks, one block per query head in order.
pub(crate) fn run<'a, T: Element>(
    arch: Arch,
    problem: &Problem,
    int8: Option<&Int8Panels>,
    path: Int8Path,
    blocks: Vec<Block<'a, T>>,
) -> Vec<Rescoring<Block<'a, T>>> {
    let (group, chunks) = (problem.group(), problem.keys.div_ceil(CHUNK_KEYS));
    let flops = problem.batch * problem.q_heads * problem.queries * problem.keys * problem.head_dim;
    let tasks = blocks.chunks(group).flat_map(|blocks| (0..chunks).map(move |c| (blocks, c * CHUNK_KEYS)));
    let tasks: Vec<(&[Block<'a, T>], usize)> = tasks.collect();
    // For every task, the lists of each head; none if the head must be scanned densely.
    let bounded: Vec<Vec<Option<BoundedLists>>> = map(flops, tasks, &|_, (blocks, first)| {
        let keys = first..problem.keys.min(first + CHUNK_KEYS);
        match int8 {
            Some(int8) => {
                let of = |block: &Block<'a, T>| {
                    let path = path.for_rows(block.rows.len());
                    arch.dispatch(Certified { block, int8, path, keys: keys.clone() })
                };
                blocks.iter().map(of).collect()
            }
            None => arch.dispatch(KeyChunk { blocks, keys }),
        }
    });
    map(flops, blocks, &|at, block| {
        let tasks = &bounded[at / group * chunks..(at / group + 1) * chunks];
        let bounded = tasks.iter().map(|bounded| bounded[at % group].as_ref()).collect();
        arch.dispatch(Rescore { block, bounded, int8 })
    })
}

/// The results of tasks that take `flops` in all, on all threads or on this one.
fn map<X: Send, R: Send>(flops: usize, tasks: Vec<X>, f: &(dyn Fn(usize, X) -> R + Sync)) -> Vec<R> {
    match flops < MIN_PARALLEL_FLOPS {
        true => tasks.into_iter().enumerate().map(|(i, task)| f(i, task)).collect(),
        false => par_map(tasks, f),
    }
}

/// The query heads of a key-value head, and a chunk of its keys.
struct KeyChunk<'b, 'a, T: Element> {
    blocks: &'b [Block<'a, T>],
    keys: Range<usize>,
}

/// A query head and the lists of its queries.
struct Head<A> {
    visible: Vec<Range<usize>>,
    /// `[rows][D]`.
    q: Vec<A>,
    norm: Vec<f32>,
    bounded: Option<BoundedLists>,
}

impl<T: Element> WithSimd for KeyChunk<'_, '_, T> {
    type Output = Vec<Option<BoundedLists>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Some(block) = self.blocks.first() else { return Vec::new() };
        let (x, problem) = (block.x, block.problem);
        let d = problem.head_dim;
        let mut heads = Vec::with_capacity(self.blocks.len());
        for block in self.blocks {
            heads.push(Head::new::<S, T>(simd, block));
        }
        let mut widened = vec![T::Acc::of(0.0); KEYS * d];
        let (head, distance) =
            (block.h / problem.group(), PREFETCH_DISTANCE_BYTES.div_ceil(d * size_of::<T>()));
        for first in self.keys.clone().step_by(KEYS) {
            let count = KEYS.min(self.keys.end - first);
            let reads = |h: &Head<T::Acc>| h.visible.iter().any(|r| visible_bits(r, first) != 0);
            if !heads.iter().any(reads) {
                continue;
            }
            let mut keys: [&[T::Acc]; KEYS] = [&[]; KEYS];
            for (w, (key, widened)) in
                keys.iter_mut().zip(widened.chunks_exact_mut(d)).enumerate().take(count)
            {
                if first + w + distance < problem.keys {
                    prefetch(x.k.row(block.b, head, first + w + distance));
                }
                *key = T::widened(x.k.row(block.b, head, first + w), widened);
            }
            let keys = &keys[..count];
            let (mut square, mut score) = ([0f32; KEYS], [0f32; KEYS]);
            // With one query, one pass over a key computes its score and its square.
            let single = match &heads[..] {
                [head] if head.norm.len() == 1 => Some(&head.q),
                _ => None,
            };
            for ((square, score), k) in square.iter_mut().zip(&mut score).zip(keys) {
                match single {
                    Some(q) => [*score, *square] = dots::<T::Acc, S>(simd, q, k),
                    None => *square = dot::<T::Acc, S>(simd, k, k),
                }
            }
            let scores = single.is_some().then_some(&score);
            for (head, block) in heads.iter_mut().zip(self.blocks) {
                let mut prior = [T::Acc::of(0.0); KEYS];
                block.add_prior(&mut prior[..count], first);
                head.add_keys::<S, T>(simd, block, keys, scores, &square, &prior, first);
            }
        }
        heads.into_iter().map(|head| head.bounded).collect()
    }
}

impl<A: Real> Head<A> {
    #[inline(always)]
    fn new<S: Simd, T: Element<Acc = A>>(simd: S, block: &Block<'_, T>) -> Self {
        let (d, visible) = (block.problem.head_dim, block.visible());
        let mut q = vec![A::of(0.0); visible.len() * d];
        for (q, i) in q.chunks_exact_mut(d).zip(block.rows.clone()) {
            q.copy_from_slice(block.x.q.row(block.b, block.h, i));
        }
        let norm: Vec<f32> =
            q.chunks_exact(d).map(|q| dot::<A, S>(simd, q, q).sqrt() + SUBNORMAL_NORM_ERROR).collect();
        let bounded = norm.iter().all(|n| *n < MAX_BOUNDED.sqrt());
        let candidates = block.problem.candidates;
        let bounded = bounded.then(|| BoundedLists::new(visible.len(), capacity(candidates), candidates));
        Self { visible, q, norm, bounded }
    }

    /// Appends the keys from `first` on that can be candidates to the lists. `scores` holds their products with the query
    /// if there is one query.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn add_keys<S: Simd, T: Element<Acc = A>>(
        &mut self,
        simd: S,
        block: &Block<'_, T>,
        keys: &[&[A]],
        scores: Option<&[f32; KEYS]>,
        square: &[f32; KEYS],
        prior: &[A; KEYS],
        first: usize,
    ) {
        let Some(bounded) = &mut self.bounded else { return };
        let (d, problem) = (block.problem.head_dim, block.problem);
        // Covers two chains of D products with their biases, the native and this one, and the rounding of the bound.
        let rounding = (2 * d + 32) as f32 * (0.5 * f32::EPSILON);
        let half = if problem.score == Score::Energy { 0.5 } else { 0.0 };
        let mut unbounded = 0u32;
        for (row, q) in self.q.chunks_exact(d).enumerate() {
            let visible = visible_bits(&self.visible[row], first);
            if visible == 0 {
                continue;
            }
            let mut score = scores.copied().unwrap_or_default();
            if scores.is_none() {
                for (score, k) in score.iter_mut().zip(keys) {
                    *score = dot::<A, S>(simd, q, k);
                }
            }
            let (norm, threshold) = (self.norm[row], bounded.threshold[row]);
            let (mut upper, mut lower) = ([0f32; KEYS], [0f32; KEYS]);
            let (mut hits, mut no_bound) = (0u32, 0u32);
            for w in 0..KEYS {
                let b = prior[w].wide() as f32;
                let size = norm * (square[w].sqrt() + SUBNORMAL_NORM_ERROR) + square[w] + b.abs();
                let (score, error) = (score[w] - half * square[w] + b, rounding * size);
                (upper[w], lower[w]) = (score + error, score - error);
                hits |= u32::from(upper[w] >= threshold) << w;
                no_bound |= u32::from(size.is_nan() || size >= MAX_BOUNDED) << w;
            }
            let visible = visible & (u32::MAX >> (KEYS - keys.len()));
            unbounded |= no_bound & visible;
            let mut hits = hits & visible & !no_bound;
            if hits == 0 {
                continue;
            }
            while hits != 0 {
                let w = hits.trailing_zeros() as usize;
                hits &= hits - 1;
                bounded.push(row, (first + w) as u32, upper[w], lower[w]);
            }
            if bounded.full(row) {
                if !bounded.tighten(row) {
                    self.bounded = None;
                    return;
                }
            } else if problem.candidates == 1 {
                bounded.threshold[row] = reached_by(bounded.lower(row), 1, threshold);
            }
        }
        while unbounded != 0 {
            let w = unbounded.trailing_zeros();
            unbounded &= unbounded - 1;
            // A prior of -inf excludes its key; other keys without a bound are scored for every row.
            if prior[w as usize] > A::neg_infinity() {
                bounded.unbounded.push(first as u32 + w);
            }
        }
        if bounded.unbounded.len() > capacity(bounded.candidates) {
            self.bounded = None;
        }
    }
}

/// `<a, b>` in f32, in an unspecified order of summation.
#[inline(always)]
fn dot<A: Real, S: Simd>(simd: S, a: &[A], b: &[A]) -> f32 {
    let (x, y) = (A::lanes::<S>(a), A::lanes::<S>(b));
    // Chunks of constant size: the sums then stay in registers.
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<ACCUMULATORS>(), y.as_chunks::<ACCUMULATORS>());
    let mut sum = [A::of(0.0).splat(simd); ACCUMULATORS];
    for (x, y) in x.iter().zip(y) {
        for i in 0..ACCUMULATORS {
            sum[i] = A::fused(simd, x[i], y[i], sum[i]);
        }
    }
    let mut rest = A::of(0.0).splat(simd);
    for (&x, &y) in x_rest.iter().zip(y_rest) {
        rest = A::fused(simd, x, y, rest);
    }
    let one = A::of(1.0).splat(simd);
    let (left, right) = (A::fused(simd, one, sum[0], sum[1]), A::fused(simd, one, sum[2], sum[3]));
    let mut total = A::total(simd, A::fused(simd, one, A::fused(simd, one, left, right), rest));
    let whole = (ACCUMULATORS * x.len() + x_rest.len()) * size_of::<A::Lanes<S>>() / size_of::<A>();
    for (&x, &y) in a[whole..].iter().zip(&b[whole..]) {
        total = x.mul_add(y, total);
    }
    total.wide() as f32
}

/// `<q, k>` and `<k, k>` in f32, in an unspecified order of summation, in one pass over k.
#[inline(always)]
fn dots<A: Real, S: Simd>(simd: S, q: &[A], k: &[A]) -> [f32; 2] {
    const HALF: usize = ACCUMULATORS / 2;
    let (x, y) = (A::lanes::<S>(q), A::lanes::<S>(k));
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<HALF>(), y.as_chunks::<HALF>());
    let (mut score, mut square) = ([A::of(0.0).splat(simd); HALF], [A::of(0.0).splat(simd); HALF]);
    for (x, y) in x.iter().zip(y) {
        for i in 0..HALF {
            score[i] = A::fused(simd, x[i], y[i], score[i]);
            square[i] = A::fused(simd, y[i], y[i], square[i]);
        }
    }
    for (&x, &y) in x_rest.iter().zip(y_rest) {
        score[0] = A::fused(simd, x, y, score[0]);
        square[0] = A::fused(simd, y, y, square[0]);
    }
    // Not in a closure, which could be compiled into a function without this one's instruction set.
    let one = A::of(1.0).splat(simd);
    let mut of_score = A::total(simd, A::fused(simd, one, score[0], score[1]));
    let mut of_square = A::total(simd, A::fused(simd, one, square[0], square[1]));
    let whole = (HALF * x.len() + x_rest.len()) * size_of::<A::Lanes<S>>() / size_of::<A>();
    for (&x, &y) in q[whole..].iter().zip(&k[whole..]) {
        of_score = x.mul_add(y, of_score);
        of_square = y.mul_add(y, of_square);
    }
    [of_score.wide() as f32, of_square.wide() as f32]
}
