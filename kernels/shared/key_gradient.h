// Gradients of keys, values and priors: segmented sums over the inverse index, rounded once. A warp takes
// READERS_PER_WARP consecutive entries, whatever segments they belong to, so that a key that all queries read costs no
// more than others. A segment inside of these entries is written directly; for a segment that extends beyond them a
// partial sum is stored, and a second kernel adds the partial sums in order.
#pragma once
#include "select.h"

// The inverse index: starts of the segments, the sorted segments and entries; and memory for partial sums [warps, 2,
// dim].
struct Readers {
    const DEVICE u32 *starts, *segments, *entries;
    DEVICE float *parts;
};

// Offset of the partial sum of a segment among those of the warp whose entries start at `from`: 0 for a segment that
// begins at or before `from`, else 1.
INLINE size_t part_at(u32 from, u32 begin, u32 dim) {
    return (size_t(from / READERS_PER_WARP) * 2 + (GD_FAULT(24) ? 0 : begin > from)) * dim;
}

// out [B, Hk, M, dim]: for every key, the sum over the entries that read it. add(thread, slot, row, key, first, sum)
// adds the columns first + 32 x + lane of one entry to sum[x].
template <class T, class Add>
INLINE void sum_readers(Thread me, PARAMS SelectParams &p, u32 dim, const LOCAL Readers &r, DEVICE T *out, Add add) {
    SelectRow at(me, p);
    u32 used = r.starts[p.batch * p.kv_heads * p.keys], from = at.row * READERS_PER_WARP,
        to = min(from + READERS_PER_WARP, used);
    for (u32 x = from, end; x < to; x = end) {
        u32 segment = r.segments[x], begin = r.starts[segment], stop = r.starts[segment + 1];
        end = min(stop, to);
        bool whole = begin >= from && stop <= to;
        at.b = segment / p.keys / p.kv_heads;
        at.kv = segment / p.keys % p.kv_heads;
        for (u32 first = 0; first < dim; first += 128) {
            float sum[4] = {0, 0, 0, 0};
            for (u32 e = x; e < (GD_FAULT(23) ? end - 1 : end); e++) {
                u32 slot = r.entries[e];
                at.row = slot / p.slots;
                at.i = at.row % p.queries;
                at.h = at.row / p.queries % p.q_heads;
                add(me, slot, at, i32(segment % p.keys), first, sum);
            }
            for (u32 y = 0; y < 4; y++) {
                u32 d = first + 32 * y + me.lane();
                if (d >= dim) continue;
                if (whole)
                    out[size_t(segment) * dim + d] = from_float<T>(sum[y]);
                else
                    r.parts[part_at(from, begin, dim) + d] = sum[y];
            }
        }
    }
}

// Writes the segments that no single warp has written: the sum of their partial sums, or zeros. One block per segment.
template <class T>
INLINE void add_partials(Thread me, u32 dim, const DEVICE u32 *starts, const DEVICE float *parts, DEVICE T *out) {
    u32 segment = me.block, begin = starts[segment], end = starts[segment + 1];
    bool written = begin < end && begin / READERS_PER_WARP == (end - 1) / READERS_PER_WARP;
    if (written) return;
    for (u32 d = me.index; d < dim; d += me.threads) {
        float sum = 0;
        for (u32 from = begin / READERS_PER_WARP * READERS_PER_WARP; from < end && begin < end;
             from += READERS_PER_WARP)
            sum += parts[part_at(from, begin, dim) + d];
        out[size_t(segment) * dim + d] = from_float<T>(sum);
    }
}

// dv: every reader adds its weight times dy.
template <class T> struct AddValue {
    PARAMS SelectParams &p;
    const DEVICE float *weights;
    const DEVICE T *dy;

    INLINE void operator()(Thread me, u32 slot, const LOCAL SelectRow &at, i32, u32 first,
                           LOCAL float (&sum)[4]) const {
        float w = weights[slot];
        if (w == 0) return;
        const DEVICE T *row = d_row(p, at, dy);
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.value_dim) sum[x] = fma(w, to_float(row[d]), sum[x]);
        }
    }
};
template <class T>
INLINE void value_gradient(Thread me, PARAMS SelectParams &p, const LOCAL Readers &r, const DEVICE float *weights,
                           const DEVICE T *dy, DEVICE T *dv) {
    sum_readers(me, p, p.value_dim, r, dv, AddValue<T>{p, weights, dy});
}

// dk through the energies: 2 beta g (k - q), or -beta g q.
template <class T> struct AddEnergyKey {
    PARAMS SelectParams &p;
    const DEVICE T *q;
    const DEVICE T *k;
    const DEVICE float *beta;
    const DEVICE float *grad;

    INLINE void operator()(Thread me, u32 slot, const LOCAL SelectRow &at, i32 j, u32 first,
                           LOCAL float (&sum)[4]) const {
        float g = grad[slot];
        if (g == 0) return;
        const DEVICE T *query = q_row(p, at, q);
        const DEVICE T *key = k_row(p, at, k, j);
        float c = p.score == SCORE_DOT ? -(beta[at.h] * g) : 2.0f * beta[at.h] * g;
        for (u32 x = 0; x < 4; x++) {
            u32 d = first + 32 * x + me.lane();
            if (d < p.head_dim)
                sum[x] += c * (p.score == SCORE_DOT ? to_float(query[d]) : to_float(key[d]) - to_float(query[d]));
        }
    }
};
template <class T>
INLINE void energy_key_gradient(Thread me, PARAMS SelectParams &p, const LOCAL Readers &r, const DEVICE T *q,
                                const DEVICE T *k, const DEVICE float *beta, const DEVICE float *grad, DEVICE T *dk) {
    sum_readers(me, p, p.head_dim, r, dk, AddEnergyKey<T>{p, q, k, beta, grad});
}

// rows [B, Hk, M, prior heads of a key head]: minus the gradients of the energies in which a key's prior takes
// part.
struct AddPrior {
    const DEVICE float *grad;
    u32 dim, share;

    INLINE void operator()(Thread me, u32 slot, const LOCAL SelectRow &at, i32, u32 first,
                           LOCAL float (&sum)[4]) const {
        float g = grad[slot];
        for (u32 x = 0; x < 4; x++)
            if (first + 32 * x + me.lane() == at.h / share % dim) sum[x] -= g;
    }
};
INLINE void prior_rows(Thread me, PARAMS SelectParams &p, const LOCAL Readers &r, const DEVICE float *grad,
                       DEVICE float *rows) {
    u32 dim = p.prior_heads / p.kv_heads;
    sum_readers(me, p, dim, r, rows, AddPrior{grad, dim, p.q_heads / p.prior_heads});
}

// dprior [B|1, Hq|Hk, M] from those rows, one thread a prior.
INLINE void prior_gradient(Thread me, PARAMS SelectParams &p, const DEVICE float *rows, DEVICE float *dprior) {
    u32 at = me.global(), dim = p.prior_heads / p.kv_heads;
    if (at >= p.prior_batch * p.prior_heads * p.keys) return;
    u32 j = at % p.keys, head = at / p.keys % p.prior_heads, pb = at / p.keys / p.prior_heads;
    float sum = 0;
    for (u32 b = pb; b < p.batch; b += p.prior_batch)
        sum += rows[((size_t(b) * p.kv_heads + head / dim) * p.keys + j) * dim + (GD_FAULT(87) ? 0 : head % dim)];
    dprior[at] = sum;
}

// Sums of rows [B, Hq, N] into heads [Hq], one block a head; `part` has an entry for each of its threads.
INLINE void head_sums(Thread me, PARAMS SelectParams &p, SHARED Total *part, const DEVICE float *rows,
                      DEVICE float *out) {
    Total sum = total(0.0f);
    for (u32 x = me.index; x < p.batch * p.queries; x += me.threads)
        sum = plus(sum, total(rows[(size_t(x / p.queries) * p.q_heads + me.block) * p.queries + x % p.queries]));
    store(sum, part + me.index);
    for (u32 step = me.threads / 2; step > 0; step /= 2) {
        block_barrier();
        if (me.index < step) store(plus(load(part + me.index), load(part + me.index + step)), part + me.index);
    }
    if (me.index == 0) out[me.block] = value(load(part));
}
