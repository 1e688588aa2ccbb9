// Conditional protection of the protected candidate of the lowest energy, one thread per row. In f64 where available,
// since its conditions are comparisons that should decide as on the CPU.
#pragma once
#include "select.h"

// Effect of the barrier: none (slot -1), a lift of the score of `slot` with the given strength relative to that of
// `other`, the greatest of the other scores, or (`floored`) a score of ln(floor / (1 - floor)) + logsumexp(others).
struct Effect {
    i32 slot, other;
    wide score, strength;
    bool floored;
};

// Whether slot x comes before slot y (-1: none).
INLINE bool precedes(const DEVICE float *energy, const DEVICE i32 *key, u32 x, i32 y, u32 tie) {
    return y < 0 || energy[x] < energy[y] || (energy[x] == energy[y] && wins_tie(key[x], key[y], tie));
}

INLINE Effect barrier_effect(PARAMS SelectParams &p, const DEVICE float *energy, const DEVICE i32 *key,
                             const DEVICE uint8_t *flags) {
    Effect idle = {-1, -1, 0, 0, false};
    i32 at = -1, other = -1;
    u32 used = 0;
    for (u32 s = 0; s < p.slots; s++) {
        if (key[s] < 0) continue;
        used++;
        if (flags[s] && precedes(energy, key, s, at, p.tie)) at = i32(s);
    }
    for (u32 s = 0; s < p.slots; s++)
        if (key[s] >= 0 && i32(s) != at && precedes(energy, key, s, other, p.tie)) other = i32(s);
    if (at < 0 || other < 0) return idle;
    wide score = -wide(energy[at]), rival = -wide(energy[other]), top = score > rival ? score : rival;
    wide total = 0, others = 0;
    for (u32 s = 0; s < p.slots; s++) {
        if (key[s] < 0) continue;
        total += exp(-wide(energy[s]) - top);
        if (i32(s) != at) others += exp(-wide(energy[s]) - rival);
    }
    wide gap = rival - score, margin = wide(p.barrier_margin), floor = wide(p.barrier_floor);
    bool active = exp(score - top) / total < floor && gap <= margin + wide(p.barrier_slack);
    if (!active && gap <= margin) {
        wide entropy = 0;
        for (u32 s = 0; s < p.slots; s++) {
            wide w = key[s] < 0 ? wide(0) : exp(-wide(energy[s]) - top) / total;
            if (w > 0) entropy -= w * log(w);
        }
        active = entropy / log(wide(used)) >= wide(p.barrier_entropy);
    }
    if (!active) return idle;
    wide deficit = margin - gap, strength = deficit > 0 ? wide(p.barrier_strength) : wide(0);
    wide lifted = score + strength * (deficit > 0 ? deficit : wide(0)), rest = rival + log(others);
    if (1 / (1 + exp(rest - lifted)) < floor) return {at, other, log(floor / (1 - floor)) + rest, 0, true};
    return {at, other, lifted, strength, false};
}

// Flags [B, Hq, N, K]; out may not be energy itself.
INLINE void barrier_forward(Thread me, PARAMS SelectParams &p, const DEVICE float *energy, const DEVICE i32 *index,
                            const DEVICE uint8_t *flags, DEVICE float *out) {
    size_t row = me.global();
    if (row >= size_t(p.batch) * p.q_heads * p.queries) return;
    size_t first = row * p.slots;
    Effect e = barrier_effect(p, energy + first, index + first, flags + first);
    for (u32 s = 0; s < p.slots; s++)
        out[first + s] = i32(s) == e.slot ? float(-e.score) : energy[first + s];
}

INLINE void barrier_backward(Thread me, PARAMS SelectParams &p, const DEVICE float *energy, const DEVICE i32 *index,
                             const DEVICE uint8_t *flags, const DEVICE float *grad, DEVICE float *out) {
    size_t row = me.global();
    if (row >= size_t(p.batch) * p.q_heads * p.queries) return;
    size_t first = row * p.slots;
    Effect e = barrier_effect(p, energy + first, index + first, flags + first);
    wide g = e.slot >= 0 ? wide(grad[first + e.slot]) : 0, total = 0;
    if (e.floored)
        for (u32 s = 0; s < p.slots; s++)
            if (index[first + s] >= 0 && i32(s) != e.slot)
                total += exp(wide(energy[first + e.other]) - wide(energy[first + s]));
    for (u32 s = 0; s < p.slots; s++) {
        wide x = wide(grad[first + s]);
        if (e.slot >= 0 && i32(s) == e.slot) {
            x = e.floored ? 0 : g * (1 + e.strength);
        } else if (e.slot >= 0 && index[first + s] >= 0) {
            if (e.floored)
                x += g * exp(wide(energy[first + e.other]) - wide(energy[first + s])) / total;
            else if (i32(s) == e.other)
                x -= g * e.strength;
        }
        out[first + s] = float(x);
    }
}
