// Select: the choice among the candidates of a query row, its output, and the row's part of the backward pass. One warp
// per row.
#pragma once
#include "select_choice.h"

// The query row of a warp.
struct SelectRow {
    u32 row, b, h, kv, i;
    bool exists;

    INLINE SelectRow(Thread me, PARAMS SelectParams &p) {
        row = me.block * me.warps() + me.warp();
        i = row % p.queries;
        h = row / p.queries % p.q_heads;
        b = row / p.queries / p.q_heads;
        kv = h / (p.q_heads / p.kv_heads);
        exists = b < p.batch;
    }
};

template <class T> INLINE const DEVICE T *q_row(PARAMS SelectParams &p, const LOCAL SelectRow &at, const DEVICE T *q) {
    return q + size_t(at.b) * p.q_batch + size_t(at.h) * p.q_head + size_t(at.i) * p.q_row;
}
template <class T>
INLINE const DEVICE T *k_row(PARAMS SelectParams &p, const LOCAL SelectRow &at, const DEVICE T *k, i32 j) {
    return k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head + size_t(j) * p.k_row;
}
template <class T>
INLINE const DEVICE T *v_row(PARAMS SelectParams &p, const LOCAL SelectRow &at, const DEVICE T *v, i32 j) {
    return v + size_t(at.b) * p.v_batch + size_t(at.kv) * p.v_head + size_t(j) * p.v_row;
}
template <class T> INLINE const DEVICE T *d_row(PARAMS SelectParams &p, const LOCAL SelectRow &at, const DEVICE T *d) {
    return d + size_t(at.b) * p.d_batch + size_t(at.h) * p.d_head + size_t(at.i) * p.d_row;
}

// Iterates over the slots whose lanes vote for them.
struct SlotSet {
    u32 low, high;

    INLINE SlotSet(const LOCAL bool (&used)[2]) : low(vote(used[0])), high(vote(used[1])) {}
    INLINE bool any() const { return (low | high) != 0; }
    INLINE u32 next() {
        u32 s = low ? first_bit(low) : 32 + first_bit(high);
        if (low)
            low &= low - 1;
        else
            high &= high - 1;
        return s;
    }
};

// Broadcasts the value of slot s from its lane and register.
template <class X> INLINE X broadcast_slot(const LOCAL X (&x)[2], u32 s) {
    X low = shuffle(x[0], s % 32), high = shuffle(x[1], s % 32);
    return s < 32 ? low : high;
}

// Choice and output of a row: slot, winner, nearest key, energy, margin and gate [B, Hq, N], and y [B, Hq, N, Dv].
// `slot` (and then all of the choice) and y may be null.
template <class T>
INLINE void select_forward(Thread me, PARAMS SelectParams &p, const DEVICE float *energy, const DEVICE i32 *index,
                           const DEVICE float *tau, const DEVICE T *v, DEVICE i32 *slot, DEVICE i32 *winner,
                           DEVICE i32 *nearest, DEVICE float *chosen, DEVICE float *margin, DEVICE float *gate,
                           DEVICE T *y) {
    SelectRow at(me, p);
    if (!at.exists) return;
    Candidates c = load_candidates(me, p, energy, index, at.row);
    Choice choice = choose(me, p, c, tau[at.h]);
    bool wins = choice.winner >= 0;
    i32 near_key = choice.nearest >= 0 ? broadcast_slot(c.key, u32(choice.nearest)) : -1;
    if (me.lane() == 0 && slot) {
        slot[at.row] = choice.winner;
        winner[at.row] = wins ? near_key : -1;
        nearest[at.row] = near_key;
        chosen[at.row] = wins ? choice.energy : GD_INFINITY;
        margin[at.row] = choice.margin;
        gate[at.row] = wins ? choice.rho : 0.0f;
    }
    if (!y) return;
    float w[2];
    value_weights(me, p, c, choice, tau[at.h], w);
    // Value rows of weight 0 are not read, so that a NaN in them does not reach the output.
    bool used[2] = {w[0] != 0, w[1] != 0};
    for (u32 first = 0; first < p.value_dim; first += 128) {
        float sum[4] = {0, 0, 0, 0};
        for (SlotSet left(used); left.any();) {
            u32 s = left.next();
            const DEVICE T *value = v_row(p, at, v, broadcast_slot(c.key, s));
            float weight = broadcast_slot(w, s);
#pragma unroll
            for (u32 x = 0; x < 4; x++) {
                u32 d = first + 32 * x + me.lane();
                if (d < p.value_dim) sum[x] = fma(weight, to_float(value[d]), sum[x]);
            }
        }
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.value_dim) y[size_t(at.row) * p.value_dim + d] = from_float<T>(sum[x]);
        }
    }
}

// Gradients of the energies and weights of dy in the value rows, [B, Hq, N, K] each, and the row's gradient of the
// threshold [B, Hq, N].
template <class T>
INLINE void select_backward(Thread me, PARAMS SelectParams &p, const DEVICE float *energy, const DEVICE i32 *index,
                            const DEVICE float *tau, const DEVICE T *v, const DEVICE T *dy, DEVICE float *denergy,
                            DEVICE float *weights, DEVICE float *dtau) {
    SelectRow at(me, p);
    if (!at.exists) return;
    Candidates c = load_candidates(me, p, energy, index, at.row);
    Choice choice = choose(me, p, c, tau[at.h]);
    const DEVICE T *gradient = d_row(p, at, dy);
    float a[2] = {0, 0};
    // The estimator `winner` needs <dy, v> of the winner alone.
    bool winner_only = p.estimator == ESTIMATOR_WINNER && p.hardness == 1.0f && p.picks == 1;
    bool used[2];
    for (u32 x = 0; x < 2; x++)
        used[x] = c.key[x] >= 0 && (!winner_only || i32(me.lane() + 32 * x) == choice.winner);
    for (SlotSet left(used); left.any();) {
        u32 s = left.next();
        const DEVICE T *value = v_row(p, at, v, broadcast_slot(c.key, s));
        float sum = 0;
        for (u32 d = me.lane(); d < p.value_dim; d += 32)
            sum = fma(to_float(gradient[d]), to_float(value[d]), sum);
        sum = warp_sum(sum);
        bool mine = me.lane() == s % 32;
        // Constant indices only: an index computed at run time would move the array to local memory.
        if (mine && s < 32) a[0] = sum;
        if (mine && s >= 32) a[1] = sum;
    }
    float de[2], dv[2], dt = choice_backward(me, p, c, choice, tau[at.h], a, de, dv);
    for (u32 x = 0; x < 2; x++) {
        u32 s = me.lane() + 32 * x;
        if (s < p.slots) denergy[size_t(at.row) * p.slots + s] = de[x], weights[size_t(at.row) * p.slots + s] = dv[x];
    }
    if (me.lane() == 0) dtau[at.row] = dt;
}

// Energies of given candidates; +inf in unused slots.
template <class T>
INLINE void energy_forward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                           const DEVICE float *beta, const DEVICE float *prior, const DEVICE i32 *index,
                           DEVICE float *energy) {
    SelectRow at(me, p);
    if (!at.exists) return;
    const DEVICE T *query = q_row(p, at, q);
    for (u32 s = 0; s < p.slots; s++) {
        i32 j = index[size_t(at.row) * p.slots + s];
        float e = GD_INFINITY;
        if (j >= 0) {
            float b = p.prior_batch ? prior[prior_offset(p, at.b, at.h) + j] : 0.0f;
            e = pair_energy(me, p.score, beta[at.h], b, query, k_row(p, at, k, j), p.head_dim);
        }
        if (me.lane() == 0) energy[size_t(at.row) * p.slots + s] = e;
    }
}

// dq [B, Hq, N, D] and the row's gradient of beta [B, Hq, N] from that of the energies.
template <class T>
INLINE void energy_backward(Thread me, PARAMS SelectParams &p, const DEVICE T *q, const DEVICE T *k,
                            const DEVICE float *beta, const DEVICE i32 *index, const DEVICE float *grad, DEVICE T *dq,
                            DEVICE float *dbeta) {
    SelectRow at(me, p);
    if (!at.exists) return;
    const DEVICE T *query = q_row(p, at, q);
    float scale = beta[at.h], db = 0;
    for (u32 first = 0; first < p.head_dim; first += 128) {
        float sum[4] = {0, 0, 0, 0};
        for (u32 s = 0; s < p.slots; s++) {
            i32 j = index[size_t(at.row) * p.slots + s];
            float g = j >= 0 ? grad[size_t(at.row) * p.slots + s] : 0.0f;
            if (g == 0) continue;
            const DEVICE T *key = k_row(p, at, k, j);
            float c = p.score == SCORE_DOT ? -(scale * g) : 2.0f * scale * g;
#pragma unroll
            for (u32 x = 0; x < 4; x++) {
                u32 d = first + 32 * x + me.lane();
                if (d < p.head_dim)
                    sum[x] += c * (p.score == SCORE_DOT ? to_float(key[d]) : to_float(query[d]) - to_float(key[d]));
            }
            // The derivative by beta is the energy for beta = 1 and no prior.
            if (first == 0) db += g * pair_form(me, p.score, query, key, p.head_dim);
        }
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.head_dim) dq[size_t(at.row) * p.head_dim + d] = from_float<T>(sum[x]);
        }
    }
    if (me.lane() == 0) dbeta[at.row] = db;
}
