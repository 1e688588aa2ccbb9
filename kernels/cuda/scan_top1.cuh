// Scan for one candidate: scores and a running maximum per row. Only the tile of the maximum is remembered; its key is
// recovered at the end. The winner's value row is written optionally.
#pragma once
#include "scan.cuh"

// Writes the result of a row: the key of the best score, `winner` (-1: none), or what ranking by differences puts in
// its place, with its energy, if the threshold of the head admits it, and its value row. Called by a whole warp.
template <class T>
__device__ __forceinline__ void write_top1(const ScanParams &p, const QueryBlock &at, u32 row, i32 winner, Range range,
                                           CommonOffset &offset, const T *q, const Source<T> &keys, const float *beta,
                                           const float *prior, i32 *index, float *energy, const T *v,
                                           const float *threshold, T *y) {
    StridedKeys<T> rows = {keys.first, keys.stride};
    float e = admit_winner(this_thread(), p, at.b, at.head(p, row), winner, query_row(p, at, q, row), rows, range,
                           offset, beta, prior, threshold);
    write_winner(this_thread(), at.output_row(p, row), winner, e, value_row(p, at, v, winner), p.value_dim, index,
                 energy, y);
}

template <class T, int DP, int MT>
__device__ __forceinline__ void scan_top1(const ScanParams &p, const T *q, const T *k, const float *bias,
                                          const float *beta, const float *prior, const i32 *table, i32 *index,
                                          float *energy, const T *v, const float *threshold, T *y) {
    using S = typename Scoring<T>::template Of<DP, MT>;
    constexpr int KEYS = S::KEYS, TILE = KEYS * S::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(KeyRanges, ranges);
    u32 warp = threadIdx.x / 32, g = lane_id() / 4;
    u32 rows = blockDim.x / 32 * S::ROWS, first = warp * S::ROWS;
    QueryBlock at(this_thread(), p, rows);
    compute_key_ranges(ranges, p, at, table, rows);

    T *tiles = reinterpret_cast<T *>(shared);
    unsigned char *queries = shared + 2 * (TILE * sizeof(T) + KEYS * 4) + warp * S::QUERY_BYTES;
    S scoring;
    scoring.load_queries(reinterpret_cast<T *>(queries), p.head_dim, p.vector_loads, true,
                         [&](u32 r) { return at.exists(p, first + r) ? query_row(p, at, q, first + r) : nullptr; });

    Range row_ranges[MT][2];
    float max_score[MT][2];
    i32 max_tile[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            row_ranges[m][half] = ranges.row[first + m * 16 + half * 8 + g];
            max_score[m][half] = -GD_INFINITY;
            max_tile[m][half] = -1;
        }
    }
    WarpRange warp_range(ranges, first, S::ROWS);
    Source<T> keys = {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys, p.head_dim,
                      p.vector_loads != 0};
    u32 bias_head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    const float *biases = bias + (size_t(at.b) * p.bias_heads + bias_head) * p.bias_row;

    for_each_tile<T, DP, KEYS>(
        tiles, keys, biases, ranges.all, p.tie, [&](u32 number, const T *tile, const float *tile_bias) {
            i32 start = i32(number * KEYS);
            if (!warp_range.overlaps(start, KEYS)) return;
            bool whole = warp_range.covers(start, KEYS);
            float top[MT][2];
#pragma unroll
            for (int m = 0; m < MT; m++)
                top[m][0] = top[m][1] = -GD_INFINITY;
#pragma unroll
            for (int group = 0; group < KEYS; group += GROUP) {
                float acc[MT][4][4];
                group_scores(scoring, tile, tile_bias, group, start, whole, row_ranges, acc);
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int n = 0; n < 4; n++) {
                        // fmaxf ignores NaN.
                        top[m][0] = fmaxf(top[m][0], fmaxf(acc[m][n][0], acc[m][n][1]));
                        top[m][1] = fmaxf(top[m][1], fmaxf(acc[m][n][2], acc[m][n][3]));
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // Tiles are visited in tie order, so the first of equal scores is kept.
                    if (GD_FAULT(10) ? top[m][half] >= max_score[m][half] : top[m][half] > max_score[m][half]) {
                        max_score[m][half] = top[m][half];
                        max_tile[m][half] = i32(number);
                    }
                }
            }
        });

    CommonOffset offset = unknown_offset();
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            for (u32 r = 0; r < 8; r++) {
                u32 row = first + m * 16 + half * 8 + r;
                if (!at.exists(p, row)) continue;
                Range range = ranges.row[row];
                float top = -GD_INFINITY;
                for (u32 t = 0; t < (GD_FAULT(11) ? 3 : 4); t++)
                    top = fmaxf(top, __shfl_sync(ALL, max_score[m][half], r * 4 + t));
                i32 winner = -1;
                // An infinite score hides the others; such a row is ranked by differences.
                if (finite(top)) {
                    for (u32 t = 0; t < 4; t++) {
                        float score = __shfl_sync(ALL, max_score[m][half], r * 4 + t);
                        i32 tile = __shfl_sync(ALL, max_tile[m][half], r * 4 + t);
                        if (score != top) continue;
                        i32 j = m == 0
                                    ? scoring.template find<0>(tiles, keys, biases, u32(tile), t, half, r, range, p.tie)
                                    : scoring.template find<MT - 1>(tiles, keys, biases, u32(tile), t, half, r, range,
                                                                    p.tie);
                        if (j >= 0 && (winner < 0 || wins_tie(j, winner, p.tie))) winner = j;
                    }
                }
                write_top1(p, at, row, winner, range, offset, q, keys, beta, prior, index, energy, v, threshold, y);
            }
        }
    }
}
