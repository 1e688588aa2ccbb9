// The choice among candidates, one query row a warp: record, output, and the row's part of the backward pass.
#pragma once
#include "choice.cuh"

// The row of a warp.
struct Place {
    u32 row, b, h, kv, i;
    bool exists;

    __device__ __forceinline__ Place(const SelectParams &p) {
        row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
        i = row % p.queries;
        h = row / p.queries % p.q_heads;
        b = row / p.queries / p.q_heads;
        kv = h / (p.q_heads / p.kv_heads);
        exists = b < p.batch;
    }
};

template <class T>
__device__ __forceinline__ const T *q_row(const SelectParams &p, const Place &at, const T *q) {
    return q + size_t(at.b) * p.q_batch + size_t(at.h) * p.q_head + size_t(at.i) * p.q_row;
}
template <class T>
__device__ __forceinline__ const T *k_row(const SelectParams &p, const Place &at, const T *k, i32 j) {
    return k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head + size_t(j) * p.k_row;
}
template <class T>
__device__ __forceinline__ const T *v_row(const SelectParams &p, const Place &at, const T *v, i32 j) {
    return v + size_t(at.b) * p.v_batch + size_t(at.kv) * p.v_head + size_t(j) * p.v_row;
}
template <class T>
__device__ __forceinline__ const T *d_row(const SelectParams &p, const Place &at, const T *d) {
    return d + size_t(at.b) * p.d_batch + size_t(at.h) * p.d_head + size_t(at.i) * p.d_row;
}

// Calls visit(slot) for every slot whose lane says so.
template <class Visit> __device__ __forceinline__ void for_slots(const bool (&open)[2], Visit visit) {
#pragma unroll
    for (u32 x = 0; x < 2; x++)
        for (u32 left = __ballot_sync(ALL, open[x]); left; left &= left - 1)
            visit(u32(__ffs(left) - 1) + 32 * x);
}

// What lane and register of slot s hold.
template <class X> __device__ __forceinline__ X of_slot(const X (&x)[2], u32 s) {
    X low = __shfl_sync(ALL, x[0], s % 32), high = __shfl_sync(ALL, x[1], s % 32);
    return s < 32 ? low : high;
}

// Record and output of a row. slot, winner, nearest, chosen energy, margin and gate [B, Hq, N]; y may be
// null.
template <class T>
__device__ __forceinline__ void
select_forward(const SelectParams &p, const float *energy, const i32 *index, const float *tau, const T *v,
               i32 *slot, i32 *winner, i32 *nearest, float *chosen, float *margin, float *gate, T *y) {
    Place at(p);
    if (!at.exists) return;
    Candidates c = load_candidates(p, energy, index, at.row);
    Choice choice = choose(p, c, tau[at.h]);
    bool wins = choice.winner >= 0;
    i32 near_key = choice.nearest >= 0 ? of_slot(c.key, u32(choice.nearest)) : -1;
    if (lane_id() == 0 && slot) {
        slot[at.row] = choice.winner;
        winner[at.row] = wins ? near_key : -1;
        nearest[at.row] = near_key;
        chosen[at.row] = wins ? choice.energy : GD_INFINITY;
        margin[at.row] = choice.margin;
        gate[at.row] = wins ? choice.rho : 0.0f;
    }
    if (!y) return;
    float w[2];
    value_weights(p, c, choice, tau[at.h], w);
    // A row of weight 0 is not read: a NaN in it must not reach the output.
    bool open[2] = {w[0] != 0, w[1] != 0};
    for (u32 first = 0; first < p.value_dim; first += 128) {
        float sum[4] = {0, 0, 0, 0};
        for_slots(open, [&](u32 s) {
            const T *value = v_row(p, at, v, of_slot(c.key, s));
            float weight = of_slot(w, s);
#pragma unroll
            for (u32 x = 0; x < 4; x++) {
                u32 d = first + 32 * x + lane_id();
                if (d < p.value_dim) sum[x] = fmaf(weight, up(value[d]), sum[x]);
            }
        });
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.value_dim) down(sum[x], y[size_t(at.row) * p.value_dim + d]);
        }
    }
}

// Gradients of the energies, the weights of dy in the value rows [B, Hq, N, K], and of the threshold [B, Hq,
// N].
template <class T>
__device__ __forceinline__ void select_backward(const SelectParams &p, const float *energy, const i32 *index,
                                                const float *tau, const T *v, const T *dy, float *denergy,
                                                float *weights, float *dtau) {
    Place at(p);
    if (!at.exists) return;
    Candidates c = load_candidates(p, energy, index, at.row);
    Choice choice = choose(p, c, tau[at.h]);
    const T *gradient = d_row(p, at, dy);
    float a[2] = {0, 0};
    // The winner's estimator needs its own product alone, and that only for a gate.
    bool own = p.estimator == 1 && p.hardness == 1.0f;
    bool open[2];
    for (u32 x = 0; x < 2; x++)
        open[x] = c.key[x] >= 0 && (!own || i32(lane_id() + 32 * x) == choice.winner);
    for_slots(open, [&](u32 s) {
        const T *value = v_row(p, at, v, of_slot(c.key, s));
        float sum = 0;
        for (u32 d = lane_id(); d < p.value_dim; d += 32)
            sum = fmaf(up(gradient[d]), up(value[d]), sum);
        sum = warp_sum(sum);
        if (lane_id() == s % 32) a[s / 32] = sum;
    });
    float de[2], dv[2], dt = choice_backward(p, c, choice, tau[at.h], a, de, dv);
    for (u32 x = 0; x < 2; x++) {
        u32 s = lane_id() + 32 * x;
        if (s < p.slots)
            denergy[size_t(at.row) * p.slots + s] = de[x], weights[size_t(at.row) * p.slots + s] = dv[x];
    }
    if (lane_id() == 0) dtau[at.row] = dt;
}

// Energies of given candidates; +inf in unused slots.
template <class T>
__device__ __forceinline__ void energy_forward(const SelectParams &p, const T *q, const T *k,
                                               const float *beta, const float *prior, const i32 *index,
                                               float *energy) {
    Place at(p);
    if (!at.exists) return;
    const T *query = q_row(p, at, q);
    for (u32 s = 0; s < p.slots; s++) {
        i32 j = index[size_t(at.row) * p.slots + s];
        float e = GD_INFINITY;
        if (j >= 0) {
            float b = p.prior_batch ? prior[prior_at(p, at.b, at.h) + j] : 0.0f;
            e = pair_energy(p.score, beta[at.h], b, query, k_row(p, at, k, j), p.head_dim);
        }
        if (lane_id() == 0) energy[size_t(at.row) * p.slots + s] = e;
    }
}

// dq [B, Hq, N, D] and the row's gradient of beta [B, Hq, N] from that of the energies.
template <class T>
__device__ __forceinline__ void energy_backward(const SelectParams &p, const T *q, const T *k,
                                                const float *beta, const i32 *index, const float *grad, T *dq,
                                                float *dbeta) {
    Place at(p);
    if (!at.exists) return;
    const T *query = q_row(p, at, q);
    float scale = beta[at.h], db = 0;
    for (u32 first = 0; first < p.head_dim; first += 128) {
        float sum[4] = {0, 0, 0, 0};
        for (u32 s = 0; s < p.slots; s++) {
            i32 j = index[size_t(at.row) * p.slots + s];
            float g = j >= 0 ? grad[size_t(at.row) * p.slots + s] : 0.0f;
            if (g == 0) continue;
            const T *key = k_row(p, at, k, j);
            float c = p.score ? -(scale * g) : 2.0f * scale * g;
#pragma unroll
            for (u32 x = 0; x < 4; x++) {
                u32 d = first + 32 * x + lane_id();
                if (d < p.head_dim) sum[x] += c * (p.score ? up(key[d]) : up(query[d]) - up(key[d]));
            }
            // The derivative by beta is the energy at beta 1, without a prior.
            if (first == 0) db += g * pair_form(p.score, query, key, p.head_dim);
        }
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + lane_id();
            if (d < p.head_dim) down(sum[x], dq[size_t(at.row) * p.head_dim + d]);
        }
    }
    if (lane_id() == 0) dbeta[at.row] = db;
}
