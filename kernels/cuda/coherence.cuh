// The coherence point and the mixture density at it, one key a query (index [B, Hq, N]; slots is 1). In f64:
// near t = 2 the point turns with the square root of an error of t.
#pragma once
#include "gradient.cuh"

// m = tanh((l + t m) / 2) in the heavier well; the tie at l = 0 goes to the query (m < 0).
__device__ __forceinline__ double global_root(double t, double l) {
    if (l == 0 && t <= 2) return 0;
    double side = l > 0 ? 1 : -1, lo = 0, hi = 1, m = 1;
    l = fabs(l);
    // In that well's half the root is unique; Newton from 1, with bisection where it would leave the bracket.
    for (int step = 0; step < 60; step++) {
        double th = tanh(0.5 * (l + t * m)), f = m - th;
        if (f > 0)
            hi = m;
        else
            lo = m;
        double newton = m - f / (1 - 0.5 * t * (1 - th * th));
        double next = newton > lo && newton < hi ? newton : 0.5 * (lo + hi);
        if (fabs(next - m) <= 2.3e-16 * m) return side * next;
        m = next;
    }
    return side * m;
}

// u in [0, 1] on the passage from query to key, u = sigmoid(l + t (2u - 1)), l = ln((1 - alpha) / alpha).
__device__ __forceinline__ double coherence_point(double t, double alpha, u32 passage) {
    double l = log((1 - alpha) / alpha);
    if (!passage) return 0.5 * (1 + global_root(t, l));
    double lo = 0, hi = 1;
    for (int step = 0; step < 60; step++) {
        double u = 0.5 * (lo + hi), f = u - 1 / (1 + exp(-(l + t * (2 * u - 1))));
        if (f == 0) return u;
        if (f < 0)
            lo = u;
        else
            hi = u;
    }
    return 0.5 * (lo + hi);
}

// exp(-E*) and its derivatives by t and alpha; both hold u fixed, since the density is stationary in it.
struct Density {
    double value, by_t, by_alpha;
};
__device__ __forceinline__ Density density(double t, double alpha, u32 passage) {
    double u = coherence_point(t, alpha, passage), w = 1 - u;
    double near_q = exp(-t * u * u), near_k = exp(-t * w * w);
    return {alpha * near_q + (1 - alpha) * near_k, -(alpha * u * u * near_q + (1 - alpha) * w * w * near_k),
            near_q - near_k};
}

template <class T> __device__ __forceinline__ double distance(const T *q, const T *k, u32 dim) {
    double sum = 0;
    for (u32 d = lane_id(); d < dim; d += 32) {
        double x = double(up(q[d])) - double(up(k[d]));
        sum += x * x;
    }
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(ALL, sum, step);
    return sum;
}

// rho and u [B, Hq, N]; 0 where there is no key. Either may be null.
template <class T>
__device__ __forceinline__ void density_forward(const SelectParams &p, const T *q, const T *k,
                                                const float *beta, const float *alpha, const i32 *index,
                                                float *rho, float *point) {
    Place at(p);
    if (!at.exists) return;
    i32 j = index[at.row];
    double r = 0, u = 0;
    if (j >= 0) {
        double t = double(beta[at.h]) * distance(q_row(p, at, q), k_row(p, at, k, j), p.head_dim);
        if (rho) r = density(t, double(alpha[at.h]), p.passage).value;
        if (point) u = coherence_point(t, double(alpha[at.h]), p.passage);
    }
    if (lane_id() != 0) return;
    if (rho) rho[at.row] = float(r);
    if (point) point[at.row] = float(u);
}

// dq, the factor of (q - k) in it, and the row's gradients of beta and alpha.
template <class T>
__device__ __forceinline__ void
density_backward(const SelectParams &p, const T *q, const T *k, const float *beta, const float *alpha,
                 const i32 *index, const float *grad, T *dq, float *factor, float *dbeta, float *dalpha) {
    Place at(p);
    if (!at.exists) return;
    i32 j = index[at.row];
    const T *query = q_row(p, at, q), *key = k_row(p, at, k, max(j, 0));
    double c = 0, db = 0, da = 0;
    if (j >= 0) {
        double b = double(beta[at.h]), g = double(grad[at.row]), d = distance(query, key, p.head_dim);
        Density x = density(b * d, double(alpha[at.h]), p.passage);
        c = g * x.by_t * 2 * b;
        db = g * x.by_t * d;
        da = g * x.by_alpha;
    }
    for (u32 d = lane_id(); d < p.head_dim; d += 32)
        down(j >= 0 ? float(c) * (up(query[d]) - up(key[d])) : 0.0f, dq[size_t(at.row) * p.head_dim + d]);
    if (lane_id() == 0) factor[at.row] = float(c), dbeta[at.row] = float(db), dalpha[at.row] = float(da);
}

// dk: factor (k - q) of all readers.
template <class T>
__device__ __forceinline__ void density_key_gradient(const SelectParams &p, const Readers &r, const T *q,
                                                     const T *k, const float *factor, T *dk) {
    sum_readers(p, p.head_dim, r, dk, [&](u32 row, const Place &at, i32 j, u32 first, float (&sum)[4]) {
        const T *query = q_row(p, at, q), *key = k_row(p, at, k, j);
        float c = factor[row];
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.head_dim) sum[x] += c * (up(key[d]) - up(query[d]));
        }
    });
}
