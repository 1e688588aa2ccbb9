// What a warp does with whole rows: sums, energies, order of candidates.
#pragma once
#include "../shared/params.h"
#include "ptx.cuh"

__device__ __forceinline__ u32 lane_id() { return threadIdx.x % 32; }

// The sum over the lanes, the same bits in all of them.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += __shfl_xor_sync(ALL, x, step);
    return x;
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) < GD_INFINITY; }

// sum (q - k)^2, or -<q, k>, over D elements, by a warp: the energy at beta 1 without a prior. Differences
// stay accurate where query and key nearly coincide.
template <class Q, class K>
__device__ __forceinline__ float pair_form(u32 score, const Q *q, const K *k, u32 dim) {
    float sum = 0;
    for (u32 d = lane_id(); d < dim; d += 32) {
        float x = up(q[d]), y = up(k[d]);
        sum = score ? fmaf(-x, y, sum) : fmaf(x - y, x - y, sum);
    }
    return warp_sum(sum);
}

// beta |q - k|^2 - b, or -beta <q, k> - b.
template <class Q, class K>
__device__ __forceinline__ float pair_energy(u32 score, float beta, float prior, const Q *q, const K *k,
                                             u32 dim) {
    return beta * pair_form(score, q, k, dim) - prior;
}

// The bias of a key without a prior, by a warp: -|k|^2 / 2, or 0 for the dot product.
template <class K> __device__ __forceinline__ float key_bias(u32 score, const K *k, u32 dim) {
    if (score) return 0;
    float sum = 0;
    for (u32 d = lane_id(); d < dim; d += 32)
        sum = fmaf(up(k[d]), up(k[d]), sum);
    return -0.5f * warp_sum(sum);
}

// Whether key x goes before key y among equals.
__device__ __forceinline__ bool before(i32 x, i32 y, u32 last) { return last ? x > y : x < y; }

// Where the prior of a head starts, of [prior_batch, prior_heads, keys].
template <class P> __device__ __forceinline__ size_t prior_at(const P &p, u32 b, u32 h) {
    return (size_t(b % p.prior_batch) * p.prior_heads + h / (p.q_heads / p.prior_heads)) * p.keys;
}
