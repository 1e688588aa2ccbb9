// Gradients of keys, values and priors: one block a list of the inverse index. Its four warps add up a
// quarter of the readers each; the quarters are added in order. Every gradient is rounded once.
#pragma once
#include "select.cuh"

constexpr u32 GRADIENT_WARPS = 4;

// out [B, Hk, M, dim] = sum over the list's entries of add(entry, place of its row, first d, sums of 4 d).
template <class T, class Add>
__device__ __forceinline__ void sum_readers(const SelectParams &p, u32 dim, const u32 *starts,
                                            const u32 *entries, T *out, Add add) {
    GD_SHARED(float[GRADIENT_WARPS * 128], part);
    u32 list = blockIdx.x, warp = threadIdx.x / 32;
    u32 begin = starts[list], count = starts[list + 1] - begin,
        quarter = (count + GRADIENT_WARPS - 1) / GRADIENT_WARPS;
    u32 from = begin + min(quarter * warp, count),
        to = begin + min(quarter * (warp + 1), GD_FAULT(23) ? count - 1 : count);
    Place at(p);
    at.b = list / p.keys / p.kv_heads;
    at.kv = list / p.keys % p.kv_heads;
    for (u32 first = 0; first < dim; first += 128) {
        float sum[4] = {0, 0, 0, 0};
        for (u32 x = from; x < to; x++) {
            u32 slot = entries[x];
            at.row = slot / p.slots;
            at.i = at.row % p.queries;
            at.h = at.row / p.queries % p.q_heads;
            add(slot, at, first, sum);
        }
        for (u32 x = 0; x < 4; x++)
            part[warp * 128 + 32 * x + lane_id()] = sum[x];
        __syncthreads();
        u32 d = first + threadIdx.x;
        if (d < dim) {
            float all = 0;
            for (u32 w = 0; w < GRADIENT_WARPS; w++)
                all += part[w * 128 + threadIdx.x];
            down(all, out[size_t(list) * dim + d]);
        }
        if (!GD_FAULT(24)) __syncthreads();
    }
}

// dv: every reader adds its weight times dy.
template <class T>
__device__ __forceinline__ void value_gradient(const SelectParams &p, const u32 *starts, const u32 *entries,
                                               const float *weights, const T *dy, T *dv) {
    sum_readers(p, p.value_dim, starts, entries, dv,
                [&](u32 slot, const Place &at, u32 first, float (&sum)[4]) {
                    float w = weights[slot];
                    if (w == 0) return;
                    const T *row = d_row(p, at, dy);
                    for (u32 x = 0; x < 4; x++) {
                        u32 d = first + 32 * x + lane_id();
                        if (d < p.value_dim) sum[x] = fmaf(w, up(row[d]), sum[x]);
                    }
                });
}

// dk through the energies: 2 beta g (k - q), or -beta g q.
template <class T>
__device__ __forceinline__ void energy_key_gradient(const SelectParams &p, const u32 *starts,
                                                    const u32 *entries, const T *q, const T *k,
                                                    const float *beta, const float *grad, T *dk) {
    i32 j = i32(blockIdx.x % p.keys);
    sum_readers(p, p.head_dim, starts, entries, dk,
                [&](u32 slot, const Place &at, u32 first, float (&sum)[4]) {
                    float g = grad[slot];
                    if (g == 0) return;
                    const T *query = q_row(p, at, q), *key = k_row(p, at, k, j);
                    float c = p.score ? -(beta[at.h] * g) : 2.0f * beta[at.h] * g;
                    for (u32 x = 0; x < 4; x++) {
                        u32 d = first + 32 * x + lane_id();
                        if (d < p.head_dim)
                            sum[x] += c * (p.score ? up(query[d]) : up(key[d]) - up(query[d]));
                    }
                });
}

// dprior [B|1, Hq|Hk, M]: minus the gradients of the energies in which the key's prior takes part, in f64,
// one thread a prior.
__device__ __forceinline__ void prior_gradient(const SelectParams &p, const u32 *starts, const u32 *entries,
                                               const float *grad, float *dprior) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.prior_batch * p.prior_heads * p.keys) return;
    u32 j = at % p.keys, head = at / p.keys % p.prior_heads, pb = at / p.keys / p.prior_heads;
    u32 kv = head / (p.prior_heads / p.kv_heads);
    double sum = 0;
    for (u32 b = pb; b < p.batch; b += p.prior_batch) {
        u32 list = (b * p.kv_heads + kv) * p.keys + j;
        for (u32 x = starts[list]; x < starts[list + 1]; x++) {
            u32 slot = entries[x], h = slot / p.slots / p.queries % p.q_heads;
            if (h / (p.q_heads / p.prior_heads) == head) sum -= double(grad[slot]);
        }
    }
    dprior[at] = float(sum);
}

// Sums of rows [B, Hq, N] into heads [Hq], in f64, one block a head.
__device__ __forceinline__ void head_sums(const SelectParams &p, const float *rows, float *out) {
    GD_SHARED(double[256], part);
    double sum = 0;
    for (u32 x = threadIdx.x; x < p.batch * p.queries; x += blockDim.x)
        sum += double(rows[(size_t(x / p.queries) * p.q_heads + blockIdx.x) * p.queries + x % p.queries]);
    part[threadIdx.x] = sum;
    for (u32 step = blockDim.x / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
    }
    if (threadIdx.x == 0) out[blockIdx.x] = float(part[0]);
}
