//! The register tile: the scores of R query rows against one panel of keys.

use std::ops::Range;

use pulp::Simd;

use crate::backend::cpu::element::Real;

/// Vector registers that a panel of keys fills.
pub(crate) const REGISTERS: usize = 2;

/// Most keys of a panel: two 512-bit registers of f32.
pub(crate) const MAX_KEYS: usize = 32;

/// `bias + <q, k>` for R queries `[D][R]` against one panel `[D][W]`: one chain of fused
/// multiply-adds each, in the order of D, so that every instruction set gives the same bits.
#[inline(always)]
pub(crate) fn scores<A: Real, S: Simd, const R: usize>(
    simd: S,
    q: &[A],
    panel: &[A],
    bias: &[A],
) -> [[A::Lanes<S>; REGISTERS]; R] {
    let bias = A::lanes::<S>(bias);
    let mut acc = [[bias[0], bias[1]]; R];
    for (q, k) in q.chunks_exact(R).zip(A::lanes::<S>(panel).chunks_exact(REGISTERS)) {
        for r in 0..R {
            let x = q[r].splat(simd);
            acc[r][0] = A::fused(simd, x, k[0], acc[r][0]);
            acc[r][1] = A::fused(simd, x, k[1], acc[r][1]);
        }
    }
    acc
}

/// The scores with minus infinity for keys that are not visible to a row; the panel starts at key `first`.
#[inline(always)]
pub(crate) fn masked<A: Real, S: Simd, const R: usize>(
    simd: S,
    mut scores: [[A::Lanes<S>; REGISTERS]; R],
    visible: &[Range<usize>],
    first: usize,
) -> [[A::Lanes<S>; REGISTERS]; R] {
    let mut keys = [A::zero(); MAX_KEYS];
    for (w, key) in keys.iter_mut().enumerate() {
        *key = A::of(w as f64);
    }
    let keys = A::lanes::<S>(&keys);
    let hidden = A::neg_infinity().splat(simd);
    for (r, scores) in scores.iter_mut().enumerate() {
        let range = visible.get(r).cloned().unwrap_or_default();
        // Bounds between two keys.
        let bound = |key: usize| A::of(key as f64 - first as f64 - 0.5).splat(simd);
        let (start, end) = (bound(range.start), bound(range.end));
        for (score, &key) in scores.iter_mut().zip(keys) {
            let from_start = A::pick(simd, A::greater(simd, key, start), *score, hidden);
            *score = A::pick(simd, A::greater(simd, end, key), from_start, hidden);
        }
    }
    scores
}
