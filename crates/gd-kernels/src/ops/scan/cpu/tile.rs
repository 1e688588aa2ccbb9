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
    mut scores: [[A::Lanes<S>; REGISTERS]; R],
    visible: &[Range<usize>],
    first: usize,
) -> [[A::Lanes<S>; REGISTERS]; R] {
    for (r, scores) in scores.iter_mut().enumerate() {
        let range = visible.get(r).cloned().unwrap_or_default();
        let mut mask = [A::neg_infinity(); MAX_KEYS];
        for (w, o) in mask.iter_mut().enumerate() {
            if range.contains(&(first + w)) {
                *o = A::zero();
            }
        }
        let mut all = mask;
        A::lanes_mut::<S>(&mut all)[..REGISTERS].copy_from_slice(scores);
        for (s, &o) in all.iter_mut().zip(&mask) {
            *s = if o < A::zero() { o } else { *s };
        }
        scores.copy_from_slice(&A::lanes::<S>(&all)[..REGISTERS]);
    }
    scores
}
