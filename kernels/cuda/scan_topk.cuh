// The scan for several candidates: every row keeps a list in shared memory.
#pragma once
#include "../shared/bounded_list.h"
#include "scan.cuh"

// Entries of a list.
__device__ __forceinline__ u32 list_capacity(u32 candidates) { return candidates > 32 ? 128 : 64; }

// The lists of the 16 rows of a warp. A lane holds the threshold and the number of entries of rows g and g + 8, equal
// in the four lanes that share a row.
struct TopKRows {
    float *lists;
    u32 capacity;
    float threshold[2];
    u32 count[2];

    __device__ __forceinline__ TopKRows(float *lists, u32 capacity) : lists(lists), capacity(capacity) {
        threshold[0] = threshold[1] = -GD_INFINITY;
        count[0] = count[1] = 0;
    }

    // Appends scores above the thresholds; acc has the scores of 32 keys from `start`.
    __device__ __forceinline__ void append(const float (&acc)[4][4], i32 start, const ScanParams &p) {
        u32 lane = lane_id(), g = lane / 4, quad = 0xfu << (lane & 28), below = (1u << lane) - 1;
        float top[2] = {-GD_INFINITY, -GD_INFINITY};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            top[0] = fmaxf(top[0], fmaxf(acc[n][0], acc[n][1]));
            top[1] = fmaxf(top[1], fmaxf(acc[n][2], acc[n][3]));
        }
        // Most groups have no score above a threshold.
        if (!__any_sync(ALL, top[0] > threshold[0] || top[1] > threshold[1])) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 hits[8], total = 0;
#pragma unroll
            for (int x = 0; x < 8; x++) {
                float s = acc[x / 2][2 * half + x % 2];
                hits[x] = __ballot_sync(ALL, s > threshold[half] && s < GD_INFINITY) & quad;
                total += __popc(hits[x]);
            }
            u32 full = __ballot_sync(ALL, count[half] + total > (GD_FAULT(14) ? capacity + 8 : capacity));
            compact_lists(this_thread(), p, lists, half * 8, capacity, full, count[half], threshold[half]);
            List list(lists, half * 8 + g, capacity);
#pragma unroll
            for (int x = 0; x < 8; x++) {
                if (hits[x] >> lane & 1) {
                    u32 to = count[half] + __popc(hits[x] & below);
                    list.score[to] = acc[x / 2][2 * half + x % 2];
                    list.key[to] = start + x / 2 * 8 + i32(2 * (lane % 4)) + x % 2;
                }
                count[half] += __popc(hits[x]);
            }
        }
    }

    // Writes the lists by energy; row 0 is row `first` of the block.
    template <class T>
    __device__ __forceinline__ void write(const ScanParams &p, const QueryBlock &at, const KeyRanges &ranges, u32 first,
                                          const T *q, const Source<T> &keys, const float *beta, const float *prior,
                                          i32 *index, float *energy, const i32 *protected_keys, uint8_t *flags) {
        CommonOffset offset = unknown_offset();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            for (u32 r = 0; r < 8; r++) {
                u32 row = first + half * 8 + r, entries = __shfl_sync(ALL, count[half], r * 4);
                if (!at.exists(p, row)) continue;
                List list(lists, half * 8 + r, capacity);
                write_list(this_thread(), p, at, row, list, entries, ranges.row[row], offset, q, keys.first, beta,
                           prior, index, energy, protected_keys, flags);
            }
        }
    }
};

template <class T, int DP>
__device__ __forceinline__ void scan_topk(const ScanParams &p, const T *q, const T *k, const float *bias,
                                          const float *beta, const float *prior, const i32 *table, i32 *index,
                                          float *energy, const i32 *protected_keys, uint8_t *flags) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = S::KEYS, TILE = KEYS * S::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(KeyRanges, ranges);
    u32 warps = blockDim.x / 32, warp = threadIdx.x / 32, g = lane_id() / 4;
    u32 first = warp * S::ROWS;
    QueryBlock at(this_thread(), p, warps * S::ROWS);
    compute_key_ranges(ranges, p, at, table, warps * S::ROWS);

    unsigned char *after_tiles = shared + 2 * (TILE * sizeof(T) + KEYS * 4);
    S scoring;
    scoring.load_queries(reinterpret_cast<T *>(after_tiles + warp * S::QUERY_BYTES), p.head_dim, p.vector_loads, true,
                         [&](u32 r) { return at.exists(p, first + r) ? query_row(p, at, q, first + r) : nullptr; });
    u32 capacity = list_capacity(p.candidates);
    float *lists = reinterpret_cast<float *>(after_tiles + warps * S::QUERY_BYTES);
    TopKRows rows(lists + size_t(first) * 2 * capacity, capacity);

    Range row_ranges[1][2] = {{ranges.row[first + g], ranges.row[first + g + 8]}};
    WarpRange warp_range(ranges, first, S::ROWS);
    Source<T> keys = {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys, p.head_dim,
                      p.vector_loads != 0};
    u32 bias_head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    const float *biases = bias + (size_t(at.b) * p.bias_heads + bias_head) * p.bias_row;

    for_each_tile<T, DP, KEYS>(reinterpret_cast<T *>(shared), keys, biases, ranges.all, p.tie,
                               [&](u32 number, const T *tile, const float *tile_bias) {
                                   i32 start = i32(number * KEYS);
                                   if (!warp_range.overlaps(start, KEYS)) return;
                                   bool whole = warp_range.covers(start, KEYS);
                                   for (int step = 0; step < KEYS; step += GROUP) {
                                       int group = p.tie == TIE_LAST ? KEYS - GROUP - step : step;
                                       float acc[1][4][4];
                                       group_scores(scoring, tile, tile_bias, group, start, whole, row_ranges, acc);
                                       rows.append(acc[0], start + group, p);
                                   }
                               });

    rows.write(p, at, ranges, first, q, keys, beta, prior, index, energy, protected_keys, flags);
}
