//! The scan for a few queries against many keys, as in decoding: the keys are read once, where they
//! lie, and split over threads.
//!
//! A task takes the queries of all heads that share a key-value head, and a stretch of its keys. It
//! scores them in whatever order of additions is quick, with a bound of how far that may be from the
//! native score; the keys that the bound does not rule out are scored as the native scan does, so
//! that the result has the same bits. With quantised keys the same holds, and a quarter of the bytes
//! is read.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::prefetch::prefetch;
use crate::backend::cpu::quantize::KEYS;
use crate::cache::int8_keys::cpu::Filter;
use crate::ops::scan::cpu::Block;
use crate::ops::scan::cpu::bounded_lists::{Lists, capacity, reached_by};
use crate::ops::scan::cpu::certified::{Certified, seen};
use crate::ops::scan::cpu::int8::Code;
use crate::ops::scan::cpu::rescore::{Left, Settle};
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// Keys of a task.
const STRETCH: usize = 1024;

/// Products of queries and keys below which handing work to another thread costs more than it saves: a few tens
/// of microseconds of work.
const LIGHT: usize = 1 << 19;

/// Bytes between a key that is read and the one that is asked for meanwhile. Left to itself, a processor may see too
/// late that one key follows another.
const AHEAD: usize = 1 << 12;

/// Chains of additions that run side by side.
const SIDE: usize = 4;

/// Scores and squares beyond this have no bound.
const GREATEST: f32 = 1e30;

/// What a norm loses at most where squares fall below the normal numbers.
const LOST: f32 = 1e-21;

/// Scores the blocks, one for each query head in order, and returns what is left of them.
pub(crate) fn run<'a, T: Element>(
    arch: Arch,
    problem: &Problem,
    filter: Option<&Filter>,
    code: Code,
    blocks: Vec<Block<'a, T>>,
) -> Vec<Left<Block<'a, T>>> {
    let (group, stretches) = (problem.group(), problem.keys.div_ceil(STRETCH));
    let products = problem.batch * problem.q_heads * problem.queries * problem.keys * problem.head_dim;
    // Tasks that stay on one thread.
    let together = if products < LIGHT { usize::MAX } else { 1 };
    let tasks = blocks.chunks(group).flat_map(|blocks| (0..stretches).map(move |s| (blocks, s * STRETCH)));
    let tasks: Vec<(&[Block<'a, T>], usize)> = tasks.collect();
    // For every task one list a head; none where the head must be left.
    let found: Vec<Vec<Option<Lists>>> = tasks
        .into_par_iter()
        .with_min_len(together)
        .with_max_len(together)
        .map(|(blocks, first)| {
            let keys = first..problem.keys.min(first + STRETCH);
            match filter {
                Some(filter) => {
                    let of = |block: &Block<'a, T>| {
                        let code = code.of_rows(block.rows.len());
                        arch.dispatch(Certified { block, filter, code, keys: keys.clone() })
                    };
                    blocks.iter().map(of).collect()
                }
                None => arch.dispatch(Stretch { blocks, keys }),
            }
        })
        .collect();
    let each = blocks.into_par_iter().with_min_len(together).with_max_len(together).enumerate();
    each.map(|(at, block)| {
        let tasks = &found[at / group * stretches..(at / group + 1) * stretches];
        let lists = tasks.iter().map(|lists| lists[at % group].as_ref()).collect();
        arch.dispatch(Settle { block, lists, filter })
    })
    .collect()
}

/// The query heads of a key-value head, and a stretch of its keys.
struct Stretch<'b, 'a, T: Element> {
    blocks: &'b [Block<'a, T>],
    keys: Range<usize>,
}

/// One query head during a walk.
struct Head<A> {
    visible: Vec<Range<usize>>,
    /// `[rows][D]`.
    q: Vec<A>,
    norm: Vec<f32>,
    lists: Option<Lists>,
}

impl<T: Element> WithSimd for Stretch<'_, '_, T> {
    type Output = Vec<Option<Lists>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Some(block) = self.blocks.first() else { return Vec::new() };
        let (x, problem) = (block.x, block.problem);
        let d = problem.head_dim;
        let mut heads = Vec::with_capacity(self.blocks.len());
        for block in self.blocks {
            heads.push(Head::new::<S, T>(simd, block));
        }
        let mut room = vec![T::Acc::of(0.0); KEYS * d];
        let (head, ahead) = (block.h / problem.group(), AHEAD.div_ceil(d * size_of::<T>()));
        for first in self.keys.clone().step_by(KEYS) {
            let count = KEYS.min(self.keys.end - first);
            let open = |h: &Head<T::Acc>| h.visible.iter().any(|r| seen(r, first) != 0);
            if !heads.iter().any(open) {
                continue;
            }
            let mut keys: [&[T::Acc]; KEYS] = [&[]; KEYS];
            for (w, (key, room)) in keys.iter_mut().zip(room.chunks_exact_mut(d)).enumerate().take(count) {
                if first + w + ahead < problem.keys {
                    prefetch(x.k.row(block.b, head, first + w + ahead));
                }
                *key = T::widened(x.k.row(block.b, head, first + w), room);
            }
            let keys = &keys[..count];
            let (mut square, mut score) = ([0f32; KEYS], [0f32; KEYS]);
            // With one query a key is walked over once for both of its products.
            let lone = match &heads[..] {
                [head] if head.norm.len() == 1 => Some(&head.q),
                _ => None,
            };
            for ((square, score), k) in square.iter_mut().zip(&mut score).zip(keys) {
                match lone {
                    Some(q) => [*score, *square] = dots::<T::Acc, S>(simd, q, k),
                    None => *square = dot::<T::Acc, S>(simd, k, k),
                }
            }
            let known = lone.is_some().then_some(&score);
            for (head, block) in heads.iter_mut().zip(self.blocks) {
                let mut prior = [T::Acc::of(0.0); KEYS];
                block.add_prior(&mut prior[..count], first);
                head.offer::<S, T>(simd, block, keys, known, &square, &prior, first);
            }
        }
        heads.into_iter().map(|head| head.lists).collect()
    }
}

impl<A: Real> Head<A> {
    #[inline(always)]
    fn new<S: Simd, T: Element<Acc = A>>(simd: S, block: &Block<'_, T>) -> Self {
        let (d, visible) = (block.problem.head_dim, block.visible());
        let mut q = vec![A::of(0.0); visible.len() * d];
        for (q, i) in q.chunks_exact_mut(d).zip(block.rows.clone()) {
            q.iter_mut().zip(block.x.q.row(block.b, block.h, i)).for_each(|(q, x)| *q = x.up());
        }
        let norm: Vec<f32> = q.chunks_exact(d).map(|q| dot::<A, S>(simd, q, q).sqrt() + LOST).collect();
        let bounded = norm.iter().all(|n| *n < GREATEST.sqrt());
        let candidates = block.problem.candidates;
        let lists = bounded.then(|| Lists::new(visible.len(), capacity(candidates), candidates));
        Self { visible, q, norm, lists }
    }

    /// Enters the keys from `first` that can be candidates. `known` holds their products with the query, if
    /// there is only one.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn offer<S: Simd, T: Element<Acc = A>>(
        &mut self,
        simd: S,
        block: &Block<'_, T>,
        keys: &[&[A]],
        known: Option<&[f32; KEYS]>,
        square: &[f32; KEYS],
        prior: &[A; KEYS],
        first: usize,
    ) {
        let Some(lists) = &mut self.lists else { return };
        let (d, problem) = (block.problem.head_dim, block.problem);
        // Two chains of D products and their biases, the native one and this one, and the bound itself.
        let rounding = (2 * d + 32) as f32 * (0.5 * f32::EPSILON);
        let half = if problem.score == Score::Energy { 0.5 } else { 0.0 };
        let mut unbounded = 0u32;
        for (row, q) in self.q.chunks_exact(d).enumerate() {
            let open = seen(&self.visible[row], first);
            if open == 0 {
                continue;
            }
            let mut score = known.copied().unwrap_or_default();
            if known.is_none() {
                for (score, k) in score.iter_mut().zip(keys) {
                    *score = dot::<A, S>(simd, q, k);
                }
            }
            let (norm, threshold) = (self.norm[row], lists.threshold[row]);
            let (mut upper, mut lower) = ([0f32; KEYS], [0f32; KEYS]);
            let (mut hits, mut wild) = (0u32, 0u32);
            for w in 0..KEYS {
                let b = prior[w].wide() as f32;
                let size = norm * (square[w].sqrt() + LOST) + square[w] + b.abs();
                let (score, error) = (score[w] - half * square[w] + b, rounding * size);
                (upper[w], lower[w]) = (score + error, score - error);
                hits |= u32::from(upper[w] >= threshold) << w;
                wild |= u32::from(size.is_nan() || size >= GREATEST) << w;
            }
            let open = open & (u32::MAX >> (KEYS - keys.len()));
            unbounded |= wild & open;
            let mut hits = hits & open & !wild;
            if hits == 0 {
                continue;
            }
            while hits != 0 {
                let w = hits.trailing_zeros() as usize;
                hits &= hits - 1;
                lists.push(row, (first + w) as u32, upper[w], lower[w]);
            }
            if lists.full(row) {
                if !lists.tighten(row) {
                    self.lists = None;
                    return;
                }
            } else if problem.candidates == 1 {
                lists.threshold[row] = reached_by(lists.lower(row), 1, threshold);
            }
        }
        while unbounded != 0 {
            let w = unbounded.trailing_zeros();
            unbounded &= unbounded - 1;
            // A prior of -inf bans its key; what else has no bound is scored by every row.
            if prior[w as usize] > A::neg_infinity() {
                lists.unbounded.push(first as u32 + w);
            }
        }
        if lists.unbounded.len() > capacity(lists.candidates) {
            self.lists = None;
        }
    }
}

/// `<a, b>` in f32, added up in any order.
#[inline(always)]
fn dot<A: Real, S: Simd>(simd: S, a: &[A], b: &[A]) -> f32 {
    let (x, y) = (A::lanes::<S>(a), A::lanes::<S>(b));
    // Chunks of a size that the compiler knows: only so do the sums stay in registers.
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<SIDE>(), y.as_chunks::<SIDE>());
    let mut sum = [A::of(0.0).splat(simd); SIDE];
    for (x, y) in x.iter().zip(y) {
        for i in 0..SIDE {
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
    let whole = (SIDE * x.len() + x_rest.len()) * size_of::<A::Lanes<S>>() / size_of::<A>();
    for (&x, &y) in a[whole..].iter().zip(&b[whole..]) {
        total = x.mul_add(y, total);
    }
    total.wide() as f32
}

/// `<q, k>` and `<k, k>` in f32, added up in any order, from one walk over k.
#[inline(always)]
fn dots<A: Real, S: Simd>(simd: S, q: &[A], k: &[A]) -> [f32; 2] {
    const HALF: usize = SIDE / 2;
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
    // Spelled out: what a closure computes may end up in a function that lacks this one's instructions.
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
