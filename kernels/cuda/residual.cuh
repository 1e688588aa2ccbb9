// Refinement: r = q - c delta with delta = k - q, c = <q, delta> / |delta|^2; a query without a key, or on
// top of it, stays as it is. index [B, Hq, N]: slots is 1.
#pragma once
#include "gradient.cuh"

struct Jump {
    float length, along;
};

template <class T> __device__ __forceinline__ Jump jump(const T *q, const T *k, u32 dim) {
    Jump j = {0, 0};
    for (u32 d = lane_id(); d < dim; d += 32) {
        float x = up(q[d]), delta = up(k[d]) - x;
        j.length = fmaf(delta, delta, j.length);
        j.along = fmaf(x, delta, j.along);
    }
    j.length = warp_sum(j.length);
    j.along = warp_sum(j.along);
    return j;
}

template <class T>
__device__ __forceinline__ void residual_forward(const SelectParams &p, const T *q, const T *k,
                                                 const i32 *index, T *out) {
    Place at(p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const T *query = q_row(p, at, q), *key = k_row(p, at, k, max(j, 0));
    Jump x = {0, 0};
    if (j >= 0) x = jump(query, key, p.head_dim);
    T *row = out + size_t(at.row) * p.head_dim;
    float c = x.length > 0 ? x.along / x.length : 0.0f;
    for (u32 d = lane_id(); d < p.head_dim; d += 32) {
        if (x.length > 0)
            down(up(query[d]) - c * (up(key[d]) - up(query[d])), row[d]);
        else
            row[d] = query[d];
    }
}

// What delta's gradient is made of: ddelta = -c dr + step (q - 2 c delta), step = -<dr, delta> / |delta|^2.
template <class T>
__device__ __forceinline__ float jump_step(const T *q, const T *k, const T *dr, u32 dim, const Jump &x) {
    float dot = 0;
    for (u32 d = lane_id(); d < dim; d += 32)
        dot = fmaf(up(dr[d]), up(k[d]) - up(q[d]), dot);
    return -warp_sum(dot) / x.length;
}
__device__ __forceinline__ float delta_gradient(float q, float k, float dr, float c, float step) {
    return -(c * dr) + step * (q - 2.0f * c * (k - q));
}

// dq = dr + step delta - ddelta.
template <class T>
__device__ __forceinline__ void residual_backward(const SelectParams &p, const T *q, const T *k,
                                                  const i32 *index, const T *dr, T *dq) {
    Place at(p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const T *query = q_row(p, at, q), *key = k_row(p, at, k, max(j, 0)), *grad = d_row(p, at, dr);
    T *row = dq + size_t(at.row) * p.head_dim;
    Jump x = {0, 0};
    if (j >= 0) x = jump(query, key, p.head_dim);
    float c = 0, step = 0;
    if (x.length > 0) {
        c = x.along / x.length;
        step = jump_step(query, key, grad, p.head_dim, x);
    }
    for (u32 d = lane_id(); d < p.head_dim; d += 32) {
        if (x.length > 0) {
            float a = up(query[d]), b = up(key[d]), g = up(grad[d]);
            down(g + step * (b - a) - delta_gradient(a, b, g, c, step), row[d]);
        } else {
            row[d] = grad[d];
        }
    }
}

// dk: the gradients of delta of all readers.
template <class T>
__device__ __forceinline__ void residual_key_gradient(const SelectParams &p, const Readers &r, const T *q,
                                                      const T *k, const T *dr, T *dk) {
    sum_readers(p, p.head_dim, r, dk, [&](u32, const Place &at, i32 j, u32 first, float (&sum)[4]) {
        const T *query = q_row(p, at, q), *key = k_row(p, at, k, j), *grad = d_row(p, at, dr);
        Jump y = jump(query, key, p.head_dim);
        if (!(y.length > 0)) return;
        float c = y.along / y.length, step = jump_step(query, key, grad, p.head_dim, y);
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.head_dim) sum[x] += delta_gradient(up(query[d]), up(key[d]), up(grad[d]), c, step);
        }
    });
}

// The candidates without each row's winner; a row that abstained has none left to refine with.
__device__ __forceinline__ void select_rest(const SelectParams &p, const i32 *index, const i32 *slot,
                                            i32 *out) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.batch * p.q_heads * p.queries * p.slots) return;
    i32 won = slot[at / p.slots];
    out[at] = (won < 0 && !GD_FAULT(68)) || u32(won) == at % p.slots ? -1 : index[at];
}
