// The query rows of a block of a scan, and the output of a row's winner.
#pragma once
#include "ill_conditioned.h"

// The query rows of a block. The rows of `pack` query heads that share a KV head are interleaved, so that one load of
// the keys serves all of them: row r is query r / pack of head h0 + r % pack.
struct QueryBlock {
    u32 b, h0, kv, first;

    INLINE QueryBlock(Thread me, PARAMS ScanParams &p, u32 rows) {
        u32 batch_groups = p.q_heads / p.pack, groups = p.batch * batch_groups;
        // Under a causal mask the last rows have the most keys. Their blocks start first, for load balance.
        u32 group = me.block % groups, block = p.row_blocks - 1 - me.block / groups;
        b = group / batch_groups;
        h0 = group % batch_groups * p.pack;
        kv = h0 / (p.q_heads / p.kv_heads);
        first = block * rows;
    }

    INLINE bool exists(PARAMS ScanParams &p, u32 row) const { return first + row < p.queries * p.pack; }
    INLINE u32 head(PARAMS ScanParams &p, u32 row) const { return h0 + (first + row) % p.pack; }
    INLINE u32 query(PARAMS ScanParams &p, u32 row) const { return (first + row) / p.pack; }
    // The row in index and energy.
    INLINE size_t output_row(PARAMS ScanParams &p, u32 row) const {
        return (size_t(b) * p.q_heads + head(p, row)) * p.queries + query(p, row);
    }
};

template <class T>
INLINE const DEVICE T *query_row(PARAMS ScanParams &p, const LOCAL QueryBlock &at, const DEVICE T *q, u32 row) {
    return q + size_t(at.b) * p.q_batch + size_t(at.head(p, row)) * p.q_head + size_t(at.query(p, row)) * p.q_row;
}

template <class T>
INLINE const DEVICE T *value_row(PARAMS ScanParams &p, const LOCAL QueryBlock &at, const DEVICE T *v, i32 key) {
    return v + size_t(at.b) * p.v_batch + size_t(at.kv) * p.v_head + size_t(max(key, 0)) * p.v_row;
}

// The energy of a query's winner; keys.row(j) is key j of its head, and `range` are those it sees. In an
// ill-conditioned row another key may become the winner. If there is none, or its energy is not finite or above the
// threshold of the head, the winner becomes -1 and the energy +inf. Called by a whole warp.
template <class P, class T, class Keys>
INLINE float admit_winner(Thread me, PARAMS P &p, u32 b, u32 h, LOCAL i32 &winner, const DEVICE T *query,
                          const LOCAL Keys &keys, Range range, LOCAL CommonOffset &offset, const DEVICE float *beta,
                          const DEVICE float *prior, const DEVICE float *threshold) {
    const DEVICE float *priors = p.prior_batch ? prior + prior_offset(p, b, h) : nullptr;
    RankedRow<T, Keys> row = {query, keys, range, priors, beta[h], p.score, p.tie, p.head_dim};
    if (ill_conditioned(me, row, winner, winner >= 0 ? 1 : 0, 1, offset))
        winner = winner_by_differences(me, row, winner);
    if (winner < 0) return GD_INFINITY;
    const DEVICE T *key = keys.row(u32(winner));
    float e = pair_energy(me, p.score, row.beta, row.prior_of(winner), query, key, p.head_dim);
    if (finite(e) && !(threshold && e > threshold[h])) return e;
    winner = -1;
    return GD_INFINITY;
}

// Writes row `out` of index, energy and y: the value row of the winner, or zeros without one. Called by a whole warp.
template <class T>
INLINE void write_winner(Thread me, size_t out, i32 winner, float e, const DEVICE T *value, u32 dim, DEVICE i32 *index,
                         DEVICE float *energy, DEVICE T *y) {
    if (me.lane() == 0) index[out] = winner, energy[out] = e;
    for (u32 d = me.lane(); d < dim; d += 32)
        y[out * dim + d] = winner >= 0 ? value[d] : from_float<T>(0.0f);
}
