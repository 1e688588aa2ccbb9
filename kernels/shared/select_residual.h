// Refinement: r = q - c delta with delta = k - q, c = <q, delta> / |delta|^2; a query without a key, or
// equal to it, is unchanged. index [B, Hq, N]: slots is 1.
#pragma once
#include "key_gradient.h"

struct Jump {
    float length, along;
};

template <class T> INLINE Jump jump(Thread me, const DEVICE T *q, const DEVICE T *k, u32 dim) {
    Jump j = {0, 0};
    for (u32 d = me.lane(); d < dim; d += 32) {
        float x = to_float(q[d]), delta = to_float(k[d]) - x;
        j.length = fma(delta, delta, j.length);
        j.along = fma(x, delta, j.along);
    }
    j.length = warp_sum(j.length);
    j.along = warp_sum(j.along);
    return j;
}

template <class T>
INLINE void residual_forward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                             const DEVICE i32 *index, DEVICE T *out) {
    SelectRow at(me, p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const DEVICE T *query = q_row(p, at, q);
    const DEVICE T *key = k_row(p, at, k, max(j, 0));
    Jump x = {0, 0};
    if (j >= 0) x = jump(me, query, key, p.head_dim);
    DEVICE T *row = out + size_t(at.row) * p.head_dim;
    float c = x.length > 0 ? x.along / x.length : 0.0f;
    for (u32 d = me.lane(); d < p.head_dim; d += 32) {
        if (x.length > 0)
            row[d] = from_float<T>(to_float(query[d]) - c * (to_float(key[d]) - to_float(query[d])));
        else
            row[d] = query[d];
    }
}

// Gradient of delta: ddelta = -c dr + step (q - 2 c delta), step = -<dr, delta> / |delta|^2.
template <class T>
INLINE float jump_step(Thread me, const DEVICE T *q, const DEVICE T *k, const DEVICE T *dr, u32 dim,
                       const LOCAL Jump &x) {
    float dot = 0;
    for (u32 d = me.lane(); d < dim; d += 32)
        dot = fma(to_float(dr[d]), to_float(k[d]) - to_float(q[d]), dot);
    return -warp_sum(dot) / x.length;
}
INLINE float delta_gradient(float q, float k, float dr, float c, float step) {
    return -(c * dr) + step * (q - 2.0f * c * (k - q));
}

// dq = dr + step delta - ddelta.
template <class T>
INLINE void residual_backward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                              const DEVICE i32 *index, const DEVICE T *dr, DEVICE T *dq) {
    SelectRow at(me, p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const DEVICE T *query = q_row(p, at, q);
    const DEVICE T *key = k_row(p, at, k, max(j, 0));
    const DEVICE T *grad = d_row(p, at, dr);
    DEVICE T *row = dq + size_t(at.row) * p.head_dim;
    Jump x = {0, 0};
    if (j >= 0) x = jump(me, query, key, p.head_dim);
    float c = 0, step = 0;
    if (x.length > 0) {
        c = x.along / x.length;
        step = jump_step(me, query, key, grad, p.head_dim, x);
    }
    for (u32 d = me.lane(); d < p.head_dim; d += 32) {
        if (x.length > 0) {
            float a = to_float(query[d]), b = to_float(key[d]), g = to_float(grad[d]);
            row[d] = from_float<T>(g + step * (b - a) - delta_gradient(a, b, g, c, step));
        } else {
            row[d] = grad[d];
        }
    }
}

// dk: the gradients of delta of all readers.
template <class T> struct AddResidualKey {
    PARAMS SelectParams &p;
    const DEVICE T *q;
    const DEVICE T *k;
    const DEVICE T *dr;

    INLINE void operator()(Thread me, u32, const LOCAL SelectRow &at, i32 j, u32 first, LOCAL float (&sum)[4]) const {
        const DEVICE T *query = q_row(p, at, q);
        const DEVICE T *key = k_row(p, at, k, j);
        const DEVICE T *grad = d_row(p, at, dr);
        Jump y = jump(me, query, key, p.head_dim);
        if (!(y.length > 0)) return;
        float c = y.along / y.length, step = jump_step(me, query, key, grad, p.head_dim, y);
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.head_dim)
                sum[x] += delta_gradient(to_float(query[d]), to_float(key[d]), to_float(grad[d]), c, step);
        }
    }
};
template <class T>
INLINE void residual_key_gradient(Thread me, PARAMS SelectParams &p, const LOCAL Readers &r, const DEVICE T *q,
                                  const DEVICE T *k, const DEVICE T *dr, DEVICE T *dk) {
    sum_readers(me, p, p.head_dim, r, dk, AddResidualKey<T>{p, q, k, dr});
}

// The candidates of the next round of refinement: all but the winner, none for a row that abstained.
INLINE void select_remaining(Thread me, PARAMS SelectParams &p, const DEVICE i32 *index, const DEVICE i32 *slot,
                             DEVICE i32 *out) {
    u32 at = me.global();
    if (at >= p.batch * p.q_heads * p.queries * p.slots) return;
    i32 won = slot[at / p.slots];
    out[at] = (won < 0 && !GD_FAULT(88)) || u32(won) == at % p.slots ? -1 : index[at];
}
