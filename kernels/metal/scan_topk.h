// The scan for several candidates: every row keeps a list of 64 in threadgroup memory.
#pragma once
#include "../shared/bounded_list.h"
#include "scan.h"

// Entries of a list.
constexpr constant u32 LIST_CAPACITY = 64;

template <class T, int D, int KEYS>
INLINE void scan_topk(Thread me, constant ScanParams &p, threadgroup uchar *shared, threadgroup i32 *ranges,
                      const device T *q, const device T *k, const device float *bias, const device float *beta,
                      const device float *prior, const device i32 *table, device i32 *index, device float *energy,
                      const device i32 *protected_keys, device uint8_t *flags) {
    typedef Scoring<T, D, 1, KEYS> S;
    typedef typename S::E E;
    constexpr u32 LANE_KEYS = KEYS / 4;
    u32 rows = me.warps() * S::ROWS, first = me.warp() * S::ROWS, lane = me.lane(), g = lane / 4, t = lane % 4;
    QueryBlock at(me, p, rows);
    compute_key_ranges(me, ranges, p, at, table, rows);

    threadgroup E *tile = reinterpret_cast<threadgroup E *>(shared);
    threadgroup float *tile_bias = reinterpret_cast<threadgroup float *>(tile + KEYS * S::PITCH);
    threadgroup float *out = tile_bias + KEYS + first * S::OUT;
    threadgroup float *lists = tile_bias + KEYS + rows * S::OUT + first * 2 * LIST_CAPACITY;
    S scoring;
    load_queries(me, scoring, tile, p, at, q);

    Range row_range = range_of_row(ranges, first + g);
    // Of the lane's row, the same in the four lanes that share it.
    float threshold = -GD_INFINITY;
    u32 count = 0;
    u32 quad = 0xfu << (lane & 28), below = (1u << lane) - 1;
    WarpRange warp_range(ranges, first, S::ROWS);
    KeyRows<T> keys = key_rows(p, at, k);
    const device float *biases = key_biases(p, at, bias);
    Tiles tiles(ranges, p.tie, KEYS);
    for (i32 step = 0; step < tiles.count; step++) {
        u32 number = tiles.number(step);
        load_tile<T, D, KEYS>(me, tile, tile_bias, keys, biases, number, p.head_dim);
        i32 start = i32(number * KEYS);
        if (!warp_range.overlaps(start, KEYS)) continue;
        bool whole = warp_range.covers(start, KEYS);
        scoring.scores(tile, out);
        warp_barrier();
        float s[LANE_KEYS];
        bool any = false;
#pragma unroll
        for (u32 x = 0; x < LANE_KEYS; x++) {
            u32 at_key = x * 4 + t;
            i32 j = start + i32(at_key);
            s[x] = out[g * S::OUT + at_key] + tile_bias[at_key];
            bool open = s[x] < GD_INFINITY && (whole || (j >= row_range.lo && j < row_range.hi));
            if (!open) s[x] = -GD_INFINITY;
            any = any || s[x] > threshold;
        }
        // Most tiles have no score above a threshold.
        if (!simd_any(any)) continue;
        u32 hits[LANE_KEYS], total = 0;
#pragma unroll
        for (u32 x = 0; x < LANE_KEYS; x++) {
            hits[x] = vote(s[x] > threshold) & quad;
            total += bits_set(hits[x]);
        }
        u32 full = vote(count + total > (GD_FAULT(110) ? LIST_CAPACITY + 8 : LIST_CAPACITY));
        compact_lists(me, p, lists, 0, LIST_CAPACITY, full, count, threshold);
        List list(lists, g, LIST_CAPACITY);
#pragma unroll
        for (u32 x = 0; x < LANE_KEYS; x++) {
            if (hits[x] >> lane & 1) {
                u32 to = count + bits_set(hits[x] & below);
                list.score[to] = s[x];
                list.key[to] = start + i32(x * 4 + t);
            }
            count += bits_set(hits[x]);
        }
    }

    CommonOffset offset = unknown_offset();
    for (u32 r = 0; r < 8; r++) {
        u32 row = first + r, entries = shuffle(count, r * 4);
        if (!at.exists(p, row)) continue;
        List list(lists, r, LIST_CAPACITY);
        write_list(me, p, at, row, list, entries, range_of_row(ranges, row), offset, q, keys.first, beta, prior, index,
                   energy, protected_keys, flags);
    }
}
