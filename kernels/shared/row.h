// Warp-level operations on whole rows: sums, energies, and the order of candidates.
#pragma once
#include "language.h"

INLINE bool finite(float x) { return fabs(x) < GD_INFINITY; }

// sum (q - k)^2, or -<q, k>, over D elements: the energy for beta = 1 and no prior. Called by a whole warp. Squared
// differences stay accurate where query and key nearly coincide, unlike |q|^2 - 2 <q, k> + |k|^2.
template <class Q, class K>
INLINE float pair_form(Thread me, u32 score, const DEVICE Q *q, const DEVICE K *k, u32 dim) {
    float sum = 0;
    for (u32 d = me.lane(); d < dim; d += 32) {
        float x = to_float(q[d]), y = to_float(k[d]);
        sum = score == SCORE_DOT ? fma(-x, y, sum) : fma(x - y, x - y, sum);
    }
    return warp_sum(sum);
}

// The greatest finite number, which stands for energies beyond it.
constexpr CONSTANT float MAX_ENERGY = 3.402823466e38f;
// 2^-72 and 2^72: no sum of squares of numbers scaled down overflows.
constexpr CONSTANT float SCALE_DOWN = 2.1175823681357508e-22f, SCALE_UP = 4.7223664828696452e21f;

// An energy that overflowed to `energy`, computed from scaled numbers and limited to the finite numbers. Where q, k or
// the prior are not finite it stays as it is. Called by a whole warp.
template <class Q, class K>
COLD float overflowed_energy(Thread me, u32 score, float beta, float prior, const DEVICE Q *q, const DEVICE K *k,
                             u32 dim, float energy) {
    float sum = 0;
    for (u32 d = me.lane(); d < dim; d += 32) {
        float x = to_float(q[d]) * SCALE_DOWN, y = to_float(k[d]) * SCALE_DOWN;
        sum = score == SCORE_DOT ? fma(-x, y, sum) : fma(x - y, x - y, sum);
    }
    sum = warp_sum(sum);
    if (!finite(sum) || !finite(prior)) return energy;
    return fmin(fmax(sum * SCALE_UP * beta * SCALE_UP - prior, -MAX_ENERGY), MAX_ENERGY);
}

// beta |q - k|^2 - b, or -beta <q, k> - b. Called by a whole warp.
template <class Q, class K>
INLINE float pair_energy(Thread me, u32 score, float beta, float prior, const DEVICE Q *q, const DEVICE K *k, u32 dim) {
    float energy = beta * pair_form(me, score, q, k, dim) - prior;
    return finite(energy) ? energy : overflowed_energy(me, score, beta, prior, q, k, dim, energy);
}

// |x|^2. Called by a whole warp.
template <class T> INLINE float squared_norm(Thread me, const DEVICE T *x, u32 dim) {
    float sum = 0;
    for (u32 d = me.lane(); d < dim; d += 32)
        sum = fma(to_float(x[d]), to_float(x[d]), sum);
    return warp_sum(sum);
}

// The bias of a key without its prior: -|k|^2 / 2, or 0 for the dot product. Called by a whole warp.
template <class K> INLINE float key_bias(Thread me, u32 score, const DEVICE K *k, u32 dim) {
    return score == SCORE_DOT ? 0.0f : -0.5f * squared_norm(me, k, dim);
}

INLINE float warp_min(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x = fmin(x, shuffle_xor(x, step));
    return x;
}

// Whether key x wins against key y at equal scores.
INLINE bool wins_tie(i32 x, i32 y, u32 tie) { return tie == TIE_LAST ? x > y : x < y; }

// Offset of the prior of a head in [prior_batch, prior_heads, keys].
template <class P> INLINE size_t prior_offset(PARAMS P &p, u32 b, u32 h) {
    return (size_t(b % p.prior_batch) * p.prior_heads + h / (p.q_heads / p.prior_heads)) * p.keys;
}
