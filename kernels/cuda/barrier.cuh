// Conditional protection of the protected candidate of least energy, one thread a row, in f64: its conditions
// are comparisons, which should fall as they do on the CPU.
#pragma once
#include "select.cuh"

// What it does: nothing (at -1), raise score `at` with the given slope in the best other one, or set it to
// ln(floor / (1 - floor)) + logsumexp(others).
struct Effect {
    i32 at, best;
    double score, strength;
    bool floored;
};

__device__ __forceinline__ Effect barrier_effect(const SelectParams &p, const float *energy, const i32 *key,
                                                 const uint8_t *flags) {
    Effect idle = {-1, -1, 0, 0, false};
    i32 at = -1, other = -1;
    u32 used = 0;
    auto closer = [&](u32 x, i32 y) {
        return y < 0 || energy[x] < energy[y] || (energy[x] == energy[y] && before(key[x], key[y], p.last));
    };
    for (u32 s = 0; s < p.slots; s++) {
        if (key[s] < 0) continue;
        used++;
        if (flags[s] && closer(s, at)) at = i32(s);
    }
    for (u32 s = 0; s < p.slots; s++)
        if (key[s] >= 0 && i32(s) != at && closer(s, other)) other = i32(s);
    if (at < 0 || other < 0) return idle;
    double score = -double(energy[at]), rival = -double(energy[other]), top = score > rival ? score : rival;
    double total = 0, others = 0;
    for (u32 s = 0; s < p.slots; s++) {
        if (key[s] < 0) continue;
        total += exp(-double(energy[s]) - top);
        if (i32(s) != at) others += exp(-double(energy[s]) - rival);
    }
    double gap = rival - score, margin = double(p.margin), floor = double(p.floor);
    bool active = exp(score - top) / total < floor && gap <= margin + double(p.slack);
    if (!active && gap <= margin) {
        double entropy = 0;
        for (u32 s = 0; s < p.slots; s++) {
            double w = key[s] < 0 ? 0.0 : exp(-double(energy[s]) - top) / total;
            if (w > 0) entropy -= w * log(w);
        }
        active = entropy / log(double(used)) >= double(p.trigger);
    }
    if (!active) return idle;
    double room = margin - gap, strength = room > 0 ? double(p.strength) : 0.0;
    double lifted = score + strength * (room > 0 ? room : 0.0), rest = rival + log(others);
    if (1 / (1 + exp(rest - lifted)) < floor) return {at, other, log(floor / (1 - floor)) + rest, 0, true};
    return {at, other, lifted, strength, false};
}

// Flags [B, Hq, N, K]; out may not be energy itself.
__device__ __forceinline__ void barrier_forward(const SelectParams &p, const float *energy, const i32 *index,
                                                const uint8_t *flags, float *out) {
    size_t row = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= size_t(p.batch) * p.q_heads * p.queries) return;
    size_t first = row * p.slots;
    Effect e = barrier_effect(p, energy + first, index + first, flags + first);
    for (u32 s = 0; s < p.slots; s++)
        out[first + s] = i32(s) == e.at ? float(-e.score) : energy[first + s];
}

__device__ __forceinline__ void barrier_backward(const SelectParams &p, const float *energy, const i32 *index,
                                                 const uint8_t *flags, const float *grad, float *out) {
    size_t row = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= size_t(p.batch) * p.q_heads * p.queries) return;
    size_t first = row * p.slots;
    Effect e = barrier_effect(p, energy + first, index + first, flags + first);
    double g = e.at >= 0 ? double(grad[first + e.at]) : 0, total = 0;
    if (e.floored)
        for (u32 s = 0; s < p.slots; s++)
            if (index[first + s] >= 0 && i32(s) != e.at)
                total += exp(double(energy[first + e.best]) - double(energy[first + s]));
    for (u32 s = 0; s < p.slots; s++) {
        double x = double(grad[first + s]);
        if (e.at >= 0 && i32(s) == e.at) {
            x = e.floored ? 0 : g * (1 + e.strength);
        } else if (e.at >= 0 && index[first + s] >= 0) {
            if (e.floored)
                x += g * exp(double(energy[first + e.best]) - double(energy[first + s])) / total;
            else if (i32(s) == e.best)
                x -= g * e.strength;
        }
        out[first + s] = float(x);
    }
}
