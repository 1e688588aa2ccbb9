// Shared by all scans: key ranges of the query rows, and the pipelined loop over tiles of keys.
#pragma once
#include "../shared/mask.h"
#include "../shared/query_rows.h"
#include "tile.cuh"

// Greatest number of rows of a block.
constexpr int MAX_ROWS = 256;

// Key ranges of the rows of a block, and their union.
struct KeyRanges {
    Range row[MAX_ROWS];
    Range all;
};

// Computes the ranges of `rows` rows, at most one per thread; ends with a barrier.
__device__ __forceinline__ void compute_key_ranges(KeyRanges &ranges, const ScanParams &p, const QueryBlock &at,
                                                   const i32 *table, u32 rows) {
    if (threadIdx.x == 0) ranges.all = {i32(p.keys), 0};
    __syncthreads();
    if (threadIdx.x < rows) {
        Range r = {0, 0};
        if (at.exists(p, threadIdx.x)) r = visible_keys(p.mask, table, at.b, at.query(p, threadIdx.x));
        ranges.row[threadIdx.x] = r;
        if (r.lo < r.hi) {
            atomicMin(&ranges.all.lo, r.lo);
            atomicMax(&ranges.all.hi, r.hi);
        }
    }
    __syncthreads();
}

// Union (`any`) and intersection (`all`) of the key ranges of a warp's rows.
struct WarpRange {
    Range any, all;

    __device__ __forceinline__ WarpRange(const KeyRanges &ranges, u32 first, u32 rows) {
        any = {0x7fffffff, 0};
        all = {0, 0x7fffffff};
        for (u32 r = lane_id(); r < rows; r += 32) {
            Range x = ranges.row[first + r];
            if (x.lo < x.hi) any = {min(any.lo, x.lo), max(any.hi, x.hi)};
            all = {max(all.lo, x.lo), min(all.hi, x.hi)};
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            any.lo = min(any.lo, __shfl_xor_sync(ALL, any.lo, step));
            any.hi = max(any.hi, __shfl_xor_sync(ALL, any.hi, step));
            all.lo = max(all.lo, __shfl_xor_sync(ALL, all.lo, step));
            all.hi = min(all.hi, __shfl_xor_sync(ALL, all.hi, step));
        }
    }

    __device__ __forceinline__ bool overlaps(i32 first, i32 count) const {
        return first < any.hi && first + count > any.lo;
    }
    __device__ __forceinline__ bool covers(i32 first, i32 count) const {
        return first >= all.lo && first + count <= all.hi;
    }
};

// Calls visit(tile number, its keys, its biases) for every tile in the union of the rows' ranges, in ascending order,
// or in descending order if ties go to the last key. Two stages in `shared`: the next tile is copied with cp.async
// while this one is visited.
template <class T, int DP, int KEYS, class Visit>
__device__ __forceinline__ void for_each_tile(T *shared, const Source<T> &k, const float *bias, Range all, u32 tie,
                                              Visit visit) {
    constexpr int PITCH = DP + 16 / sizeof(T), TILE = KEYS * PITCH;
    float *biases = reinterpret_cast<float *>(shared + 2 * TILE);
    if (all.lo >= all.hi) return;
    i32 from = all.lo / KEYS, to = (all.hi + KEYS - 1) / KEYS;
    auto number = [&](i32 step) { return tie == TIE_LAST ? to - 1 - step : from + step; };
    auto load = [&](i32 step) {
        u32 first = u32(number(step)) * KEYS;
        load_rows<T, DP, KEYS>(shared + step % 2 * TILE, k, first);
        load_bias<KEYS>(biases + step % 2 * KEYS, bias, first);
        copy_commit();
    };
    load(0);
    for (i32 step = 0; step < to - from; step++) {
        if (step + 1 < to - from) {
            load(step + 1);
            if (!GD_FAULT(4)) copy_wait<1>();
        } else {
            if (!GD_FAULT(5)) copy_wait<0>();
        }
        if (!GD_FAULT(6)) __syncthreads();
        int stage = GD_FAULT(7) ? (step + 1) % 2 : step % 2;
        visit(u32(number(step)), shared + stage * TILE, biases + stage * KEYS);
        // The next load overwrites what was just read.
        if (!GD_FAULT(8)) __syncthreads();
    }
}

// Scores of a group of 32 keys, starting at key `group` of the tile; -inf where the key is outside of a row's range.
template <class S, class T, int MT>
__device__ __forceinline__ void group_scores(const S &scoring, const T *keys, const float *bias, int group, i32 first,
                                             bool whole, const Range (&ranges)[MT][2], float (&acc)[MT][4][4]) {
    u32 t = lane_id() % 4;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float2 b = *reinterpret_cast<const float2 *>(bias + group + n * 8 + 2 * t);
            acc[m][n][0] = acc[m][n][2] = b.x;
            acc[m][n][1] = acc[m][n][3] = b.y;
        }
    }
    scoring.scores(keys, group, acc);
    if (whole) return;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                i32 j = first + group + n * 8 + i32(2 * t) + c % 2;
                Range r = ranges[m][c / 2];
                if (GD_FAULT(9) ? (j < r.lo || j > r.hi) : (j < r.lo || j >= r.hi)) acc[m][n][c] = -GD_INFINITY;
            }
        }
    }
}
