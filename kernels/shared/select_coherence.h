// The coherence point and the mixture density at it, with one key per query (index [B, Hq, N]; slots is 1). In f64
// where available: near t = 2 the error of the point is the square root of the error of t.
#pragma once
#include "key_gradient.h"

// m = tanh((l + t m) / 2) in the heavier well; the tie at l = 0 goes to the query (m < 0).
INLINE wide global_root(wide t, wide l) {
    if (l == 0 && t <= 2) return 0;
    wide side = l > 0 ? 1 : -1, lo = 0, hi = 1, m = 1;
    l = fabs(l);
    // The root is unique in the half of that well. Newton's method from 1, with bisection where it would leave the
    // bracket.
    for (int step = 0; step < 60; step++) {
        wide th = tanh(wide(0.5) * (l + t * m)), f = m - th;
        if (f > 0)
            hi = m;
        else
            lo = m;
        wide newton = m - f / (1 - wide(0.5) * t * (1 - th * th));
        wide next = newton > lo && newton < hi ? newton : wide(0.5) * (lo + hi);
        if (fabs(next - m) <= WIDE_ROUNDOFF * m) return side * next;
        m = next;
    }
    return side * m;
}

// u in [0, 1] on the passage from query to key, u = sigmoid(l + t (2u - 1)), l = ln((1 - alpha) / alpha).
INLINE wide coherence_point(wide t, wide alpha, u32 mode) {
    wide l = log((1 - alpha) / alpha);
    if (mode == COHERENCE_GLOBAL) return wide(0.5) * (1 + global_root(t, l));
    wide lo = 0, hi = 1;
    for (int step = 0; step < 60; step++) {
        wide u = wide(0.5) * (lo + hi), f = u - 1 / (1 + exp(-(l + t * (2 * u - 1))));
        if (f == 0) return u;
        if (f < 0)
            lo = u;
        else
            hi = u;
    }
    return wide(0.5) * (lo + hi);
}

// exp(-E*) and its derivatives with respect to t and alpha, at fixed u: the density is stationary in u.
struct Density {
    wide value, by_t, by_alpha;
};
INLINE Density density(wide t, wide alpha, u32 mode) {
    wide u = coherence_point(t, alpha, mode), w = 1 - u;
    wide near_q = exp(-t * u * u), near_k = exp(-t * w * w);
    return {alpha * near_q + (1 - alpha) * near_k, -(alpha * u * u * near_q + (1 - alpha) * w * w * near_k),
            near_q - near_k};
}

template <class T> INLINE wide distance(Thread me, const DEVICE T *q, const DEVICE T *k, u32 dim) {
    wide sum = 0;
    for (u32 d = me.lane(); d < dim; d += 32) {
        wide x = wide(to_float(q[d])) - wide(to_float(k[d]));
        sum += x * x;
    }
    for (int step = 16; step > 0; step /= 2)
        sum += shuffle_xor(sum, step);
    return sum;
}

// rho and u [B, Hq, N]; 0 where there is no key. Either may be null.
template <class T>
INLINE void density_forward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                            const DEVICE float *beta, const DEVICE float *alpha, const DEVICE i32 *index,
                            DEVICE float *rho, DEVICE float *point) {
    SelectRow at(me, p);
    if (!at.exists) return;
    i32 j = index[at.row];
    wide r = 0, u = 0;
    if (j >= 0) {
        wide t = wide(beta[at.h]) * distance(me, q_row(p, at, q), k_row(p, at, k, j), p.head_dim);
        if (rho) r = density(t, wide(alpha[at.h]), p.coherence).value;
        if (point) u = coherence_point(t, wide(alpha[at.h]), p.coherence);
    }
    if (me.lane() != 0) return;
    if (rho) rho[at.row] = float(r);
    if (point) point[at.row] = float(u);
}

// dq, the factor of (q - k) in it, and the row's gradients of beta and alpha.
template <class T>
INLINE void density_backward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                             const DEVICE float *beta, const DEVICE float *alpha, const DEVICE i32 *index,
                             const DEVICE float *grad, DEVICE T *dq, DEVICE float *factor, DEVICE float *dbeta,
                             DEVICE float *dalpha) {
    SelectRow at(me, p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const DEVICE T *query = q_row(p, at, q);
    const DEVICE T *key = k_row(p, at, k, max(j, 0));
    wide c = 0, db = 0, da = 0;
    if (j >= 0) {
        wide b = wide(beta[at.h]), g = wide(grad[at.row]), d = distance(me, query, key, p.head_dim);
        Density x = density(b * d, wide(alpha[at.h]), p.coherence);
        c = g * x.by_t * 2 * b;
        db = g * x.by_t * d;
        da = g * x.by_alpha;
    }
    for (u32 d = me.lane(); d < p.head_dim; d += 32)
        dq[size_t(at.row) * p.head_dim + d] =
            from_float<T>(j >= 0 ? float(c) * (to_float(query[d]) - to_float(key[d])) : 0.0f);
    if (me.lane() == 0) factor[at.row] = float(c), dbeta[at.row] = float(db), dalpha[at.row] = float(da);
}

// dk: factor (k - q) of all readers.
template <class T> struct AddDensityKey {
    PARAMS SelectParams &p;
    const DEVICE T *q;
    const DEVICE T *k;
    const DEVICE float *factor;

    INLINE void operator()(Thread me, u32 row, const LOCAL SelectRow &at, i32 j, u32 first,
                           LOCAL float (&sum)[4]) const {
        const DEVICE T *query = q_row(p, at, q);
        const DEVICE T *key = k_row(p, at, k, j);
        float c = factor[row];
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.head_dim) sum[x] += c * (to_float(key[d]) - to_float(query[d]));
        }
    }
};
template <class T>
INLINE void density_key_gradient(Thread me, PARAMS SelectParams &p, const LOCAL Readers &r, const DEVICE T *q,
                                 const DEVICE T *k, const DEVICE float *factor, DEVICE T *dk) {
    sum_readers(me, p, p.head_dim, r, dk, AddDensityKey<T>{p, q, k, factor});
}
