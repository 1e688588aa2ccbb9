// The scan for one candidate. A lane holds the running maximum of one row over a quarter of the keys. The winner's
// value row is written optionally.
#pragma once
#include "scan.h"

template <class T, int D, int MT, int KEYS>
INLINE void scan_top1(Thread me, constant ScanParams &p, threadgroup uchar *shared, threadgroup i32 *ranges,
                      const device T *q, const device T *k, const device float *bias, const device float *beta,
                      const device float *prior, const device i32 *table, device i32 *index, device float *energy,
                      const device T *v, const device float *threshold, device T *y) {
    typedef Scoring<T, D, MT, KEYS> S;
    typedef typename S::E E;
    u32 rows = me.warps() * S::ROWS, first = me.warp() * S::ROWS, g = me.lane() / 4, t = me.lane() % 4;
    QueryBlock at(me, p, rows);
    compute_key_ranges(me, ranges, p, at, table, rows);

    threadgroup E *tile = reinterpret_cast<threadgroup E *>(shared);
    threadgroup float *tile_bias = reinterpret_cast<threadgroup float *>(tile + KEYS * S::PITCH);
    threadgroup float *out = tile_bias + KEYS + first * S::OUT;
    S scoring;
    load_queries(me, scoring, tile, p, at, q);

    Range row_ranges[MT];
    float max_score[MT];
    i32 max_key[MT];
    for (int m = 0; m < MT; m++) {
        row_ranges[m] = range_of_row(ranges, first + m * 8 + g);
        max_score[m] = -GD_INFINITY;
        max_key[m] = -1;
    }
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
        if (!GD_FAULT(104)) warp_barrier();
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (u32 y = 0; y < KEYS / 4; y++) {
                // Keys are visited in tie order, so the first of equal scores is kept.
                u32 x = (p.tie == TIE_LAST ? KEYS / 4 - 1 - y : y) * 4 + t;
                i32 j = start + i32(x);
                float s = out[(m * 8 + g) * S::OUT + x] + tile_bias[x];
                i32 hi = row_ranges[m].hi + (GD_FAULT(105) ? 1 : 0);
                bool open = s < GD_INFINITY && (whole || (j >= row_ranges[m].lo && j < hi));
                if (open && (GD_FAULT(106) ? s >= max_score[m] : s > max_score[m])) max_score[m] = s, max_key[m] = j;
            }
        }
    }

    CommonOffset offset = unknown_offset();
    for (int m = 0; m < MT; m++) {
        for (u32 r = 0; r < 8; r++) {
            u32 row = first + m * 8 + r;
            if (!at.exists(p, row)) continue;
            float top = -GD_INFINITY;
            i32 winner = -1;
            for (u32 part = 0; part < (GD_FAULT(107) ? 3 : 4); part++) {
                float s = shuffle(max_score[m], r * 4 + part);
                i32 j = shuffle(max_key[m], r * 4 + part);
                bool wins = j >= 0 && (winner < 0 || s > top || (s == top && wins_tie(j, winner, p.tie)));
                if (wins) top = s, winner = j;
            }
            StridedKeys<T> key_rows = {keys.first, p.k_row};
            float e = admit_winner(me, p, at.b, at.head(p, row), winner, query_row(p, at, q, row), key_rows,
                                   range_of_row(ranges, row), offset, beta, prior, threshold);
            write_winner(me, at.output_row(p, row), winner, e, value_row(p, at, v, winner), p.value_dim, index, energy,
                         y);
        }
    }
}
