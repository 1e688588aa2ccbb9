// Decoding: a few queries against a long cache, in two passes. The keys of a row are split over blocks; in a
// block every simdgroup takes its own keys, 16 of a tile of 64, straight from memory: four lanes read a key
// once for all rows of the block, so that the heads of a group share the read. Each block writes its winner of
// every row, and a second kernel merges those and writes index, energy and value row.
#pragma once
#include "../shared/query_rows.h"
#include "range.h"

// Rows and simdgroups of a block, keys of a tile.
constexpr constant u32 ROWS = 16, DECODE_WARPS = 4, TILE = 64;

// The rows of a block, and the KV head of their keys.
struct DecodeRows {
    u32 b, h0, kv, first;

    DecodeRows(constant DecodeParams &p, u32 row_tile) {
        u32 groups_per_batch = p.q_heads / p.pack;
        first = row_tile % p.row_tiles * ROWS;
        b = row_tile / p.row_tiles / groups_per_batch;
        h0 = row_tile / p.row_tiles % groups_per_batch * p.pack;
        kv = h0 / (p.q_heads / p.kv_heads);
    }

    bool exists(constant DecodeParams &p, u32 r) const { return first + r < p.queries * p.pack; }
    u32 head(constant DecodeParams &p, u32 r) const { return h0 + (first + r) % p.pack; }
    u32 query(constant DecodeParams &p, u32 r) const { return (first + r) / p.pack; }
};

template <class T>
INLINE const device T *query_row(constant DecodeParams &p, const thread DecodeRows &at, const device T *q, u32 r) {
    return q + size_t(at.b) * p.q_batch + size_t(at.head(p, r)) * p.q_head + size_t(at.query(p, r)) * p.q_row;
}

// The page of a key, or the batch entry, and the key's row in it.
INLINE u32 page_of(constant DecodeParams &p, const thread DecodeRows &at, const device i32 *pages, u32 j) {
    return p.page_keys ? min(u32(pages[size_t(at.b) * p.table_row + j / p.page_keys]), p.pages - 1) : at.b;
}
INLINE u32 page_offset(constant DecodeParams &p, u32 j) { return p.page_keys ? j % p.page_keys : j; }
template <class T>
INLINE const device T *key_row(constant DecodeParams &p, const thread DecodeRows &at, const device i32 *pages,
                               const device T *k, u32 j) {
    return k + size_t(page_of(p, at, pages, j)) * p.k_batch + size_t(at.kv) * p.k_head +
           size_t(page_offset(p, j)) * p.k_row;
}

// The keys of a KV head in a cache.
template <class T> struct CachedRows {
    constant DecodeParams &p;
    const thread DecodeRows &at;
    const device i32 *pages;
    const device T *k;

    const device T *row(u32 j) const { return key_row(p, at, pages, k, j); }
};

// A key and its score; key -1: none.
struct ScoredKey {
    float score;
    i32 key;
};
INLINE bool precedes(ScoredKey x, ScoredKey y, u32 tie) {
    return x.key >= 0 && (y.key < 0 || x.score > y.score || (x.score == y.score && wins_tie(x.key, y.key, tie)));
}
INLINE ScoredKey max_across(ScoredKey x, u32 step, u32 tie) {
    ScoredKey y = {shuffle_xor(x.score, step), shuffle_xor(x.key, step)};
    return precedes(y, x, tie) ? y : x;
}

// Loads eight elements of a row from d on as f32; zeros without a row or beyond its end.
template <class T> INLINE void load_eight(const device T *row, u32 d, u32 dim, thread float (&x)[8]) {
    for (u32 from = 0; from < 8; from += 4) {
        if (!row || d >= dim) {
            for (u32 y = 0; y < 4; y++)
                x[from + y] = 0.0f;
        } else if (has(FEATURE_VECTOR_LOADS)) {
            vec<T, 4> four = *reinterpret_cast<const device vec<T, 4> *>(row + d + from);
            for (u32 y = 0; y < 4; y++)
                x[from + y] = to_float(four[y]);
        } else {
            for (u32 y = 0; y < 4; y++)
                x[from + y] = to_float(row[d + from + y]);
        }
    }
}

// Size of the shared key ranges: those of every row, then their union.
constexpr constant u32 DECODE_RANGES = 2 * ROWS + 2;

// partial [row tiles, splits, ROWS, 2]: the bits of the score, and the key.
template <class T, int D>
INLINE void decode(Thread me, constant DecodeParams &p, threadgroup float *queries, threadgroup i32 *ranges,
                   threadgroup float *scores, threadgroup i32 *keys, const device T *q, const device T *k,
                   const device float *bias, const device float *beta, const device float *prior,
                   const device i32 *table, const device i32 *pages, device u32 *partial) {
    constexpr u32 PITCH = D + 4;
    u32 split = me.block % p.splits, lane = me.lane(), g = lane / 4, t = lane % 4;
    DecodeRows at(p, me.block / p.splits);

    if (me.index == 0) ranges[2 * ROWS] = i32(p.keys), ranges[2 * ROWS + 1] = 0;
    block_barrier();
    if (me.index < ROWS) {
        Range r = {0, 0};
        if (at.exists(p, me.index)) r = visible_keys(p.mask, table, at.b, at.query(p, me.index));
        ranges[2 * me.index] = r.lo;
        ranges[2 * me.index + 1] = r.hi;
        if (r.lo < r.hi) widen(ranges + 2 * ROWS, r);
    }
    for (u32 x = me.index; x < gd_rows * D; x += me.threads) {
        u32 r = x / D, d = x % D;
        queries[r * PITCH + d] = at.exists(p, r) && d < p.head_dim ? to_float(query_row(p, at, q, r)[d]) : 0.0f;
    }
    if (!GD_FAULT(111)) block_barrier();

    i32 lo = ranges[2 * ROWS], hi = ranges[2 * ROWS + 1], from = lo / i32(TILE);
    i32 count = max((hi + i32(TILE) - 1) / i32(TILE) - from, 0), share = (count + i32(p.splits) - 1) / i32(p.splits);
    i32 begin = from + min(share * i32(split), count);
    i32 end = from + min(share * i32(split + 1) - (GD_FAULT(112) ? 1 : 0), count);
    float scale = (p.score == SCORE_DOT ? 1.0f : 0.5f) / beta[at.h0];
    // Lane t of the four lanes of a key tracks rows t, t + 4, ..
    ScoredKey top[ROWS / 4];
    for (u32 x = 0; x < ROWS / 4; x++)
        top[x] = {-GD_INFINITY, -1};
    for (i32 tile = begin; tile < end; tile++) {
        u32 first = u32(tile) * TILE + me.warp() * (TILE / DECODE_WARPS) + g;
        const device T *row[2];
        for (u32 e = 0; e < 2; e++) {
            u32 j = first + 8 * e;
            row[e] = j < p.keys ? key_row(p, at, pages, k, j) : nullptr;
        }
        float sum[2][ROWS];
        for (u32 r = 0; r < ROWS; r++)
            sum[0][r] = sum[1][r] = 0.0f;
        for (u32 d = 8 * t; d < D; d += 32) {
            float x[2][8];
            for (u32 e = 0; e < 2; e++)
                load_eight(row[e], d, p.head_dim, x[e]);
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r >= gd_rows) continue;
                const threadgroup float *query = queries + r * PITCH + d;
                for (u32 y = 0; y < 8; y++) {
                    sum[0][r] = fma(query[y], x[0][y], sum[0][r]);
                    sum[1][r] = fma(query[y], x[1][y], sum[1][r]);
                }
            }
        }
        for (u32 e = 0; e < 2; e++) {
            u32 j = first + 8 * e;
            float offset = -GD_INFINITY;
            if (j < p.keys) {
                u32 page = page_of(p, at, pages, j);
                offset = bias[(size_t(page) * p.kv_heads + at.kv) * p.bias_row + page_offset(p, j)];
                if (has(FEATURE_PRIOR)) offset = fma(prior[prior_offset(p, at.b, at.h0) + j], scale, offset);
            }
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r >= gd_rows) continue;
                float s = sum[e][r];
                s += shuffle_xor(s, 1);
                if (!GD_FAULT(113)) s += shuffle_xor(s, 2);
                ScoredKey x = {s + offset, i32(j)};
                bool open = i32(j) >= ranges[2 * r] && i32(j) < ranges[2 * r + 1] && finite(x.score);
                if (r % 4 == t && open && precedes(x, top[r / 4], p.tie)) top[r / 4] = x;
            }
        }
    }

#pragma unroll
    for (u32 x = 0; x < ROWS / 4; x++) {
        for (u32 step = 4; step < (GD_FAULT(114) ? 16 : 32); step *= 2)
            top[x] = max_across(top[x], step, p.tie);
        if (g == 0) {
            scores[me.warp() * ROWS + 4 * x + t] = top[x].score;
            keys[me.warp() * ROWS + 4 * x + t] = top[x].key;
        }
    }
    if (!GD_FAULT(115)) block_barrier();
    if (me.index < ROWS) {
        ScoredKey all = {-GD_INFINITY, -1};
        for (u32 w = 0; w < DECODE_WARPS; w++) {
            ScoredKey x = {scores[w * ROWS + me.index], keys[w * ROWS + me.index]};
            if (precedes(x, all, p.tie)) all = x;
        }
        device u32 *to = partial + (size_t(me.block) * ROWS + me.index) * 2;
        to[0] = as_type<u32>(all.score);
        to[1] = u32(all.key);
    }
}

// Merges the winners of all splits. One simdgroup per row.
template <class T>
INLINE void decode_merge(Thread me, constant DecodeParams &p, const device T *q, const device T *k,
                         const device float *beta, const device float *prior, const device i32 *table,
                         const device i32 *pages, const device T *v, const device float *threshold,
                         const device u32 *partial, device i32 *index, device float *energy, device T *y) {
    DecodeRows at(p, me.block);
    CommonOffset offset = unknown_offset();
    for (u32 r = me.warp(); r < ROWS; r += me.warps()) {
        if (!at.exists(p, r)) continue;
        ScoredKey top = {-GD_INFINITY, -1};
        for (u32 s = me.lane(); s < p.splits - (GD_FAULT(116) ? 1 : 0); s += 32) {
            const device u32 *x = partial + ((size_t(me.block) * p.splits + s) * ROWS + r) * 2;
            ScoredKey candidate = {as_type<float>(x[0]), i32(x[1])};
            if (precedes(candidate, top, p.tie)) top = candidate;
        }
        for (u32 step = 16; step > 0; step /= 2)
            top = max_across(top, step, p.tie);
        i32 winner = top.key;
        u32 h = at.head(p, r), i = at.query(p, r);
        CachedRows<T> keys = {p, at, pages, k};
        float e = admit_winner(me, p, at.b, h, winner, query_row(p, at, q, r), keys,
                               visible_keys(p.mask, table, at.b, i), offset, beta, prior, threshold);
        u32 j = u32(max(winner, 0));
        size_t to = (size_t(at.b) * p.q_heads + h) * p.queries + i;
        const device T *value = v + size_t(page_of(p, at, pages, j)) * p.v_batch + size_t(at.kv) * p.v_head +
                                size_t(page_offset(p, j)) * p.v_row;
        write_winner(me, to, winner, e, value, p.value_dim, index, energy, y);
    }
}
