// The choice of one row, distributed over a warp: slot s is in register s / 32 of lane s % 32. p denotes the softmax of
// -energy / T over the used slots and the null slot, whose energy is the threshold tau. That of an estimator may have a
// temperature of its own for every row, and no null slot (tau = +inf).
#pragma once
#include "row.h"

struct Candidates {
    float energy[2];
    i32 key[2];
};

// The nearest key of a row, and whether the threshold admits it.
struct Choice {
    i32 nearest;  // slot of the lowest energy, admitted or not; -1 without candidates
    i32 winner;   // the same slot if its energy is at most the threshold, else -1
    float energy; // of the nearest
    float margin; // to the second lowest admitted energy; +inf without one
    float rho;    // energy gate of the nearest
};

INLINE Candidates load_candidates(Thread me, PARAMS SelectParams &p, const DEVICE float *energy,
                                  const DEVICE i32 *index, size_t row) {
    Candidates c;
#pragma unroll
    for (u32 x = 0; x < 2; x++) {
        u32 s = me.lane() + 32 * x;
        c.key[x] = s < p.slots ? index[row * p.slots + s] : -1;
        c.energy[x] = c.key[x] >= 0 ? energy[row * p.slots + s] : GD_INFINITY;
    }
    return c;
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// Weights of several picks, the first p.picks slots of a row: e^(-energy / T) beside the null slot of the energy gate, by
// their sum. Returns the weight of the null slot.
INLINE float pick_weights(Thread me, PARAMS SelectParams &p, const LOCAL Candidates &c, float tau,
                          LOCAL float (&w)[2]) {
    bool gated = p.gate_temperature > 0, picked = me.lane() < p.picks && c.key[0] >= 0;
    float temperature = gated ? p.gate_temperature : 1.0f, rejected = gated ? tau : GD_INFINITY;
    float lowest = fmin(rejected, warp_min(picked ? c.energy[0] : GD_INFINITY));
    w[0] = w[1] = 0;
    if (!finite(lowest)) return 0;
    if (picked) w[0] = exp((lowest - c.energy[0]) / temperature);
    float null = exp((lowest - rejected) / temperature), total = null + warp_sum(w[0]);
    w[0] /= total;
    return null / total;
}

// Whether energy x of key i in slot s comes before energy y of key j in slot t. Energies that overflowed are equal; a
// scan has sorted their keys by what they were.
INLINE bool comes_first(float x, i32 i, i32 s, float y, i32 j, i32 t, u32 tie) {
    if (x != y) return x < y;
    return fabs(x) == MAX_ENERGY && !GD_FAULT(91) ? s < t : wins_tie(i, j, tie);
}

INLINE Choice choose(Thread me, PARAMS SelectParams &p, const LOCAL Candidates &c, float tau) {
    float lowest = GD_INFINITY;
    i32 key = -1, slot = -1;
#pragma unroll
    for (u32 x = 0; x < 2; x++) {
        i32 s = i32(me.lane() + 32 * x);
        bool wins = c.key[x] >= 0 && (key < 0 || comes_first(c.energy[x], c.key[x], s, lowest, key, slot, p.tie));
        if (wins) lowest = c.energy[x], key = c.key[x], slot = s;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        float e = shuffle_xor(lowest, step);
        i32 j = shuffle_xor(key, step), s = shuffle_xor(slot, step);
        bool first =
            GD_FAULT(21) && e == lowest ? wins_tie(key, j, p.tie) : comes_first(e, j, s, lowest, key, slot, p.tie);
        bool wins = j >= 0 && (key < 0 || first);
        if (wins) lowest = e, key = j, slot = s;
    }
    Choice out = {slot, -1, lowest, GD_INFINITY, 1.0f};
    if (slot < 0) return out;
    if (p.gate_temperature > 0) out.rho = sigmoid((tau - lowest) / p.gate_temperature);
    if (p.picks > 1) {
        float w[2];
        pick_weights(me, p, c, tau, w);
        out.rho = shuffle(w[0], 0);
    }
    float limit = tau + p.admission;
    if (lowest > limit) return out;
    out.winner = slot;
    float margin = GD_INFINITY;
#pragma unroll
    for (u32 x = 0; x < 2; x++) {
        bool other = c.key[x] >= 0 && i32(me.lane() + 32 * x) != slot && c.energy[x] <= limit;
        if (other) margin = fmin(margin, c.energy[x] - lowest);
    }
    out.margin = warp_min(margin);
    return out;
}

// The temperature of the estimator in this row: T + c (mean energy - least energy) over the used slots.
INLINE float row_temperature(PARAMS SelectParams &p, const LOCAL Candidates &c, float used) {
    if (p.temperature_spread == 0) return p.temperature;
    float lowest = warp_min(fmin(c.energy[0], c.energy[1]));
    float sum = warp_sum((c.key[0] >= 0 ? c.energy[0] : 0.0f) + (c.key[1] >= 0 ? c.energy[1] : 0.0f));
    float spread = sum / used - lowest;
    return finite(spread) ? p.temperature + p.temperature_spread * spread : p.temperature;
}

// p of the lane's slots at a temperature; returns p of the null slot.
INLINE float softmax(float temperature, const LOCAL Candidates &c, float tau, LOCAL float (&share)[2]) {
    float lowest = fmin(tau, warp_min(fmin(c.energy[0], c.energy[1])));
    share[0] = share[1] = 0;
    if (!finite(lowest)) return 0;
    float null = exp((lowest - tau) / temperature);
#pragma unroll
    for (u32 x = 0; x < 2; x++)
        if (c.key[x] >= 0) share[x] = exp((lowest - c.energy[x]) / temperature);
    float total = null + warp_sum(share[0] + share[1]);
    share[0] /= total;
    share[1] /= total;
    return null / total;
}

// Weights of the value rows in the forward pass: (1 - hardness) p + hardness rho one-hot(winner).
INLINE void value_weights(Thread me, PARAMS SelectParams &p, const LOCAL Candidates &c, const LOCAL Choice &choice,
                          float tau, LOCAL float (&w)[2]) {
    w[0] = w[1] = 0;
    if (p.hardness < 1.0f) {
        softmax(p.temperature, c, tau, w);
        w[0] *= 1.0f - p.hardness;
        w[1] *= 1.0f - p.hardness;
    }
    if (p.picks > 1 && p.hardness > 0) {
        float picked[2];
        pick_weights(me, p, c, tau, picked);
        if (c.energy[0] <= tau + p.admission) w[0] += p.hardness * picked[0];
        return;
    }
#pragma unroll
    for (u32 x = 0; x < 2; x++)
        if (i32(me.lane() + 32 * x) == choice.winner) w[x] += p.hardness * choice.rho;
}

// Adds the gradient of the energies through scale J(share) a to de, with J(p) a = p (a - <p, a>); returns the gradient
// of the threshold.
INLINE float jacobian(float temperature, const LOCAL float (&share)[2], float null, const LOCAL float (&a)[2],
                      float scale, LOCAL float (&de)[2]) {
    float mean = warp_sum(share[0] * a[0] + share[1] * a[1]), rate = -scale / temperature;
#pragma unroll
    for (u32 x = 0; x < 2; x++)
        de[x] += rate * share[x] * (a[x] - mean);
    return -rate * null * mean;
}

// Backward pass from a = <dy, v> of every slot: the gradient `de` of the energies, and the weights `dv` of dy in the
// gradients of the value rows. Returns the gradient of the threshold.
INLINE float choice_backward(Thread me, PARAMS SelectParams &p, const LOCAL Candidates &c, const LOCAL Choice &choice,
                             float tau, const LOCAL float (&a)[2], LOCAL float (&de)[2], LOCAL float (&dv)[2]) {
    de[0] = de[1] = dv[0] = dv[1] = 0;
    float share[2], dtau = 0, hard = p.hardness, rest = 1.0f - p.hardness;
    if (rest > 0) {
        float null = softmax(p.temperature, c, tau, share);
        dtau += jacobian(p.temperature, share, null, a, rest, de);
        dv[0] = rest * share[0];
        dv[1] = rest * share[1];
    }
    if (hard == 0) return dtau;
    float value_scale = hard * choice.rho, scale = hard * fmax(choice.rho, p.gate_floor);
    bool wins[2];
    for (u32 x = 0; x < 2; x++)
        wins[x] = i32(me.lane() + 32 * x) == choice.winner;
    // p mixed with a uniform distribution over the used slots: (1 - f) p + f / |C|, f the preserve floor.
    float used = float(bits_set(vote(c.key[0] >= 0)) + bits_set(vote(c.key[1] >= 0)));
    float temperature = row_temperature(p, c, used);
    float null = softmax(temperature, c, p.null_candidate ? tau : GD_INFINITY, share);
    float mixed[2];
    for (u32 x = 0; x < 2; x++)
        mixed[x] = c.key[x] >= 0 ? (1.0f - p.preserve_floor) * share[x] + p.preserve_floor / used : 0.0f;
    if (p.picks > 1) {
        // The weights of the picks have an exact gradient. The estimator adds that of the other candidates, scaled by the
        // weight of all picks. An excluded pick keeps its weight and has the value 0.
        float picked[2], rejected = pick_weights(me, p, c, tau, picked), mass = 1.0f - rejected;
        bool pick = me.lane() < p.picks, admitted = pick && c.key[0] >= 0 && c.energy[0] <= tau + p.admission;
        float lambda = p.estimator == ESTIMATOR_WINNER ? 0.0f : p.value_floor;
        float kept[2] = {admitted ? a[0] : 0.0f, 0.0f}, others[2] = {pick ? 0.0f : a[0], a[1]};
        dtau += jacobian(p.gate_temperature > 0 ? p.gate_temperature : 1.0f, picked, rejected, kept, hard, de);
        if (admitted) dv[0] += hard * (1.0f - lambda) * picked[0];
        for (u32 x = 0; x < 2; x++)
            dv[x] += hard * mass * lambda * mixed[x];
        if (p.estimator == ESTIMATOR_WINNER) return dtau;
        float factor = hard * fmax(mass, p.gate_floor);
        return dtau + jacobian(temperature, mixed, (1.0f - p.preserve_floor) * null, others, factor, de);
    }
    if (p.estimator == ESTIMATOR_CANDIDATES) {
        dtau += jacobian(temperature, mixed, (1.0f - p.preserve_floor) * null, a, scale, de);
    } else if (p.estimator == ESTIMATOR_REINMAX) {
        dtau += jacobian(temperature, share, null, a, -0.5f * scale, de);
        float middle[2];
        for (u32 x = 0; x < 2; x++)
            middle[x] = 0.5f * share[x] + (wins[x] ? 0.5f : 0.0f);
        float rejected = choice.winner < 0 ? 0.5f : 0.0f;
        dtau += jacobian(temperature, middle, 0.5f * null + rejected, a, 2.0f * scale, de);
    }
    float lambda = p.estimator == ESTIMATOR_WINNER ? 0.0f : p.value_floor;
    for (u32 x = 0; x < 2; x++) {
        dv[x] += value_scale * lambda * mixed[x];
        if (!wins[x]) continue;
        dv[x] += value_scale * (1.0f - lambda);
        if (p.gate_temperature > 0) {
            float d = hard * a[x] * choice.rho * (1.0f - choice.rho) / p.gate_temperature;
            de[x] -= d;
            dtau += d;
        }
    }
    if (p.gate_temperature > 0 && choice.winner >= 0) dtau = shuffle(dtau, choice.winner % 32);
    return dtau;
}
