// Shared by all scans: key ranges of the query rows, and the loop over tiles of keys.
#pragma once
#include "../shared/query_rows.h"
#include "range.h"
#include "tile.h"

// Greatest number of rows of a block.
constexpr constant u32 MAX_ROWS = 128;

template <class T> struct QueryRows {
    constant ScanParams &p;
    const thread QueryBlock &at;
    const device T *q;

    const device T *row(u32 r) const { return at.exists(p, r) ? query_row(p, at, q, r) : nullptr; }
};

template <class T> INLINE KeyRows<T> key_rows(constant ScanParams &p, const thread QueryBlock &at, const device T *k) {
    return {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys};
}
INLINE const device float *key_biases(constant ScanParams &p, const thread QueryBlock &at, const device float *bias) {
    u32 head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    return bias + (size_t(at.b) * p.bias_heads + head) * p.bias_row;
}

// Key ranges of the rows of a block as pairs lo, hi, followed by their union.
constexpr constant u32 KEY_RANGES = 2 * MAX_ROWS + 2;
INLINE Range range_of_row(const threadgroup i32 *ranges, u32 row) { return {ranges[2 * row], ranges[2 * row + 1]}; }

// Computes the ranges of `rows` rows, at most one per thread; ends with a barrier.
INLINE void compute_key_ranges(Thread me, threadgroup i32 *ranges, constant ScanParams &p, const thread QueryBlock &at,
                               const device i32 *table, u32 rows) {
    if (me.index == 0) ranges[2 * MAX_ROWS] = i32(p.keys), ranges[2 * MAX_ROWS + 1] = 0;
    block_barrier();
    if (me.index < rows) {
        Range r = {0, 0};
        if (at.exists(p, me.index)) r = visible_keys(p.mask, table, at.b, at.query(p, me.index));
        ranges[2 * me.index] = r.lo;
        ranges[2 * me.index + 1] = r.hi;
        if (r.lo < r.hi) widen(ranges + 2 * MAX_ROWS, r);
    }
    block_barrier();
}

// Union (`any`) and intersection (`all`) of the key ranges of a simdgroup's rows.
struct WarpRange {
    Range any, all;

    WarpRange(const threadgroup i32 *ranges, u32 first, u32 rows) {
        any = {0x7fffffff, 0};
        all = {0, 0x7fffffff};
        for (u32 r = 0; r < rows; r++) {
            Range x = range_of_row(ranges, first + r);
            if (x.lo < x.hi) any = {min(any.lo, x.lo), max(any.hi, x.hi)};
            all = {max(all.lo, x.lo), min(all.hi, x.hi)};
        }
    }

    bool overlaps(i32 first, i32 count) const { return first < any.hi && first + count > any.lo; }
    bool covers(i32 first, i32 count) const { return first >= all.lo && first + count <= all.hi; }
};

// The tiles in the union of the rows' ranges, in ascending order, or in descending order if ties go to the last key.
struct Tiles {
    i32 from, count;
    bool descending;

    Tiles(const threadgroup i32 *ranges, u32 tie, i32 keys) {
        Range all = range_of_row(ranges, MAX_ROWS);
        from = all.lo / keys;
        count = all.lo < all.hi ? (all.hi + keys - 1) / keys - from : 0;
        descending = tie == TIE_LAST;
    }
    u32 number(i32 step) const { return u32(descending ? from + count - 1 - step : from + step); }
};

// Loads a tile of keys with its biases. A barrier before waits until the previous tile has been read; another follows.
template <class T, int D, int KEYS>
INLINE void load_tile(Thread me, threadgroup typename Element<T>::type *tile, threadgroup float *biases,
                      const thread KeyRows<T> &keys, const device float *bias, u32 number, u32 dim) {
    if (!GD_FAULT(101)) block_barrier();
    load_rows<T, D, KEYS>(me, tile, keys, number * KEYS, dim);
    for (u32 x = me.index; x < KEYS; x += me.threads)
        biases[x] = bias[number * KEYS + x];
    if (!GD_FAULT(102)) block_barrier();
}

// Loads the query rows of every simdgroup into its registers, through the memory of the tile.
template <class T, int D, int MT, int KEYS>
INLINE void load_queries(Thread me, thread Scoring<T, D, MT, KEYS> &scoring,
                         threadgroup typename Element<T>::type *tile, constant ScanParams &p,
                         const thread QueryBlock &at, const device T *q) {
    static_assert(KEYS >= 8 * MT, "the tile holds the rows of a simdgroup");
    QueryRows<T> rows = {p, at, q};
    for (u32 w = 0; w < me.warps(); w++) {
        block_barrier();
        load_rows<T, D, 8 * MT>(me, tile, rows, w * 8 * MT, p.head_dim);
        if (!GD_FAULT(103)) block_barrier();
        if (me.warp() == w) scoring.load_queries(tile);
    }
}
