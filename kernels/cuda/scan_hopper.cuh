// The scan for Hopper, warp-specialised. A block holds 128 MT query rows and three warpgroups: two consumers multiply
// 64 MT rows each with tiles of 128 keys by wgmma; one thread of the producer warpgroup loads the tiles by TMA into a
// ring of stages. A stage has two mbarriers: full (its bytes have arrived) and empty (the eight consumer warps have
// read it).
#pragma once
#include "hopper.cuh"
#include "scan_top1.cuh"
#include "scan_topk.cuh"

// Entries of a list. The stages leave shared memory for lists of 64 entries, and so for at most 32 candidates.
constexpr u32 HOPPER_LIST_CAPACITY = 64;

// Shared memory of a block: queries, then the stages' keys, their biases, the barriers, and the lists of a scan for
// several candidates.
template <int DP, int MT, int STAGES> struct HopperTile {
    static constexpr int KEYS = 128, ROWS = 128 * MT;
    // Columns of 64 elements, the width of a matrix row.
    static constexpr int PARTS = (DP + 63) / 64;
    static constexpr int QUERY_PART = 64 * MATRIX_ROW, KEY_PART = KEYS * MATRIX_ROW;
    static constexpr int QUERIES = ROWS * PARTS * MATRIX_ROW, TILE = PARTS * KEY_PART, BIASES = KEYS * 4;

    unsigned char *queries, *keys;
    float *biases;
    uint64_t *full, *empty;
    float *lists;

    __device__ __forceinline__ explicit HopperTile(unsigned char *shared) {
        uint32_t off = shared_address(shared) % MATRIX_ALIGN;
        queries = shared + (off ? MATRIX_ALIGN - off : 0);
        keys = queries + QUERIES;
        biases = reinterpret_cast<float *>(keys + STAGES * TILE);
        full = reinterpret_cast<uint64_t *>(biases + STAGES * KEYS);
        empty = full + STAGES;
        lists = reinterpret_cast<float *>(empty + STAGES);
    }
};

// The current stage of the ring, and the parity of its phase.
template <int STAGES> struct Ring {
    u32 stage = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Stores the rows of a block in the layout of `matrix`: every 64 rows as consecutive parts of 64 columns. Rows that do
// not exist and columns beyond head_dim are zeros.
template <class T, int DP, int ROWS>
__device__ __forceinline__ void store_queries(unsigned char *to, const ScanParams &p, const QueryBlock &at,
                                              const T *q) {
    constexpr u32 UNITS = DP / 8, PARTS = (DP + 63) / 64;
    for (u32 c = threadIdx.x; c < ROWS * UNITS; c += blockDim.x) {
        u32 row = c / UNITS, unit = c % UNITS, inner = unit % 8;
        float4 x = {0, 0, 0, 0};
        if (at.exists(p, row) && unit * 8 < p.head_dim)
            x = *reinterpret_cast<const float4 *>(query_row(p, at, q, row) + unit * 8);
        if (!GD_FAULT(60)) inner ^= row % 8;
        u32 part = row / 64 * PARTS + unit / 8;
        *reinterpret_cast<float4 *>(to + (part * 64 + row % 64) * MATRIX_ROW + inner * 16) = x;
    }
    if (!GD_FAULT(61)) fence_async();
}

// Sets scores of keys outside of a row's range to -inf; keys first..first + 128.
__device__ __forceinline__ void mask_scores(float (&acc)[16][4], i32 first, const Range (&ranges)[2]) {
    i32 start = first + i32(2 * (lane_id() % 4));
#pragma unroll
    for (int n = 0; n < 16; n++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            i32 j = start + n * 8 + c % 2;
            Range r = ranges[c / 2];
            if (GD_FAULT(62) ? (j < r.lo || j > r.hi) : (j < r.lo || j >= r.hi)) acc[n][c] = -GD_INFINITY;
        }
    }
}

// Running maximum of the 16 rows of a warp: a lane holds the greatest score and its key of rows g and g + 8, equal in
// the four lanes that share a row.
struct Top1Rows {
    float score[2];
    i32 key[2];

    __device__ __forceinline__ Top1Rows() {
        score[0] = score[1] = -GD_INFINITY;
        key[0] = key[1] = -1;
    }

    // Updates the maxima with the scores of keys first..first + 128. Most tiles improve no row of a warp, so the key of
    // a maximum is searched only if one does.
    __device__ __forceinline__ void update(const float (&acc)[16][4], i32 first, const ScanParams &p) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = -GD_INFINITY;
#pragma unroll
            for (int n = 0; n < 16; n++)
                // fmaxf ignores NaN.
                top = fmaxf(top, fmaxf(acc[n][2 * half], acc[n][2 * half + 1]));
            // Tiles are visited in tie order, so the first of equal scores is kept.
            if (!__any_sync(ALL, GD_FAULT(63) ? top >= score[half] : top > score[half])) continue;
            uint32_t equal = 0;
#pragma unroll
            for (int x = 0; x < 32; x++)
                equal |= acc[x / 2][2 * half + x % 2] == top ? 1u << x : 0u;
            // If all scores are -inf, the key is not used.
            i32 x = p.tie == TIE_LAST ? 31 - __clz(equal) : __ffs(equal) - 1;
            i32 j = first + x / 2 * 8 + i32(2 * (lane_id() % 4)) + x % 2;
#pragma unroll
            for (int step = 1; step < (GD_FAULT(64) ? 2 : 4); step *= 2) {
                float s = __shfl_xor_sync(ALL, top, step);
                i32 other = __shfl_xor_sync(ALL, j, step);
                if (s > top || (s == top && wins_tie(other, j, p.tie))) top = s, j = other;
            }
            if (GD_FAULT(63) ? top >= score[half] : top > score[half]) score[half] = top, key[half] = j;
        }
    }
};

// The lists of the same rows.
struct HopperTopKRows : TopKRows {
    using TopKRows::TopKRows;

    __device__ __forceinline__ void update(const float (&acc)[16][4], i32 first, const ScanParams &p) {
        float top[2] = {-GD_INFINITY, -GD_INFINITY};
#pragma unroll
        for (int n = 0; n < 16; n++) {
            top[0] = fmaxf(top[0], fmaxf(acc[n][0], acc[n][1]));
            top[1] = fmaxf(top[1], fmaxf(acc[n][2], acc[n][3]));
        }
        if (!__any_sync(ALL, top[0] > threshold[0] || top[1] > threshold[1])) return;
        // Group by group in tie order. Registers cannot be indexed at run time, so every group is selected explicitly.
#pragma unroll 1
        for (int x = 0; x < (GD_FAULT(75) ? 3 : 4); x++) {
            int group = p.tie == TIE_LAST ? 3 - x : x;
            float part[4][4];
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++)
                    part[n][c] = group < 2 ? (group == 0 ? acc[n][c] : acc[4 + n][c])
                                           : (group == 2 ? acc[8 + n][c] : acc[12 + n][c]);
            }
            append(part, first + GROUP * group, p);
        }
    }
};

// Loads the tiles of a block, one after the other; by one thread. number(i) is the i-th of `count` tiles.
template <int DP, int MT, int STAGES, class Number>
__device__ __forceinline__ void load_tiles(const HopperTile<DP, MT, STAGES> &tile, const TensorMap &map,
                                           const ScanParams &p, const QueryBlock &at, const float *biases, i32 count,
                                           Number number) {
    using Tile = HopperTile<DP, MT, STAGES>;
    Ring<STAGES> ring;
    for (i32 i = 0; i < count; i++, ring.next()) {
        u32 s = ring.stage, first = u32(number(i)) * Tile::KEYS;
        // Beyond the last bias, the masks hide all keys.
        u32 bias_bytes = min(p.bias_row - first, u32(Tile::KEYS)) * 4;
        if (!GD_FAULT(65)) barrier_wait(&tile.empty[s], ring.parity ^ 1);
        if (GD_FAULT(66))
            barrier_arrive(&tile.full[s]);
        else
            barrier_expect(&tile.full[s], Tile::TILE + (GD_FAULT(67) ? 0 : bias_bytes));
#pragma unroll
        for (int part = 0; part < Tile::PARTS; part++)
            copy_box(tile.keys + s * Tile::TILE + part * Tile::KEY_PART, map, part * 64, i32(first), i32(at.kv),
                     i32(at.b), &tile.full[s]);
        copy_bulk(tile.biases + s * Tile::KEYS, biases + first, bias_bytes, &tile.full[s]);
    }
}

// Passes rows[m] the scores of the 16 rows that a warp has of the m-th 64 rows of its warpgroup, tile by tile. All
// warps of a warpgroup take part in every wgmma; tiles outside of the warpgroup's key range are released without being
// read. While one accumulator is searched, wgmma writes the other.
template <class T, int DP, int MT, int STAGES, class Number, class Rows>
__device__ __forceinline__ void scan_tiles(const HopperTile<DP, MT, STAGES> &tile, const ScanParams &p,
                                           const KeyRanges &ranges, u32 group, i32 from, i32 to, Number number,
                                           Rows (&rows)[MT]) {
    using Tile = HopperTile<DP, MT, STAGES>;
    constexpr i32 KEYS = Tile::KEYS;
    u32 g = lane_id() / 4, t = lane_id() % 4, first = group * 64 * MT;
    Range row_ranges[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            row_ranges[m][half] = ranges.row[first + m * 64 + threadIdx.x / 32 % 4 * 16 + half * 8 + g];
    }
    WarpRange warp_range(ranges, first, 64 * MT);
    // The steps whose tiles overlap the key range of the warpgroup.
    bool any = warp_range.any.lo < warp_range.any.hi;
    i32 lo = any ? warp_range.any.lo / KEYS : from, hi = any ? (warp_range.any.hi + KEYS - 1) / KEYS : from;
    // Broadcast, so that the compiler knows the values to be uniform in the warp.
    i32 begin = __shfl_sync(ALL, p.tie == TIE_LAST ? to - hi : lo - from, 0);
    i32 end = __shfl_sync(ALL, p.tie == TIE_LAST ? to - lo : hi - from, 0);

    Ring<STAGES> ring;
    auto await = [&] { barrier_wait(&tile.full[ring.stage], GD_FAULT(68) ? ring.parity ^ 1 : ring.parity); };
    auto release = [&](u32 stage) {
        __syncwarp();
        if (lane_id() == 0) barrier_arrive(&tile.empty[stage]);
    };
    auto skip = [&](i32 i, i32 until) {
        for (; i < until; i++, ring.next()) {
            await();
            release(ring.stage);
        }
    };
    auto multiply = [&](float (&acc)[16][4], int m, u32 stage) {
        const float *biases = tile.biases + (GD_FAULT(69) ? (stage + 1) % STAGES : stage) * KEYS + 2 * t;
#pragma unroll
        for (int n = 0; n < 16; n++) {
            float2 b = *reinterpret_cast<const float2 *>(biases + n * 8);
            acc[n][0] = acc[n][2] = b.x;
            acc[n][1] = acc[n][3] = b.y;
        }
        uint64_t q = matrix(tile.queries + (group * MT + u32(m)) * (Tile::PARTS * Tile::QUERY_PART));
        uint64_t k = matrix(tile.keys + stage * Tile::TILE);
        if (!GD_FAULT(70)) wgmma_fence(acc);
#pragma unroll
        for (int s = 0; s < DP / 16; s++) {
            // In units of 16 bytes.
            int column = s % 4 * (GD_FAULT(71) ? 1 : 2);
            wgmma(acc, q + (s / 4 * Tile::QUERY_PART >> 4) + column, k + (s / 4 * Tile::KEY_PART >> 4) + column, T{});
        }
        wgmma_commit();
    };
    auto search = [&](float (&acc)[16][4], int m, i32 i) {
        i32 start = number(i) * KEYS;
        if (!warp_range.covers(start, KEYS)) mask_scores(acc, start, row_ranges[m]);
        rows[m].update(acc, start, p);
    };

    skip(0, begin);
    if constexpr (MT == 2) {
        float upper[16][4], lower[16][4];
        if (begin < end) {
            await();
            multiply(upper, 0, ring.stage);
            wgmma_wait<0>(upper);
            // No product is in flight across iterations: the compiler would insert a wait for it.
            for (i32 i = begin; i < end - 1; i++) {
                u32 stage = ring.stage;
                multiply(lower, 1, stage);
                search(upper, 0, i);
                ring.next();
                await();
                if (GD_FAULT(72)) release(stage);
                multiply(upper, 0, ring.stage);
                if (GD_FAULT(73))
                    wgmma_wait<2>(lower);
                else
                    wgmma_wait<1>(lower);
                if (!GD_FAULT(72)) release(stage);
                search(lower, 1, i);
                wgmma_wait<0>(upper);
            }
            multiply(lower, 1, ring.stage);
            search(upper, 0, end - 1);
            wgmma_wait<0>(lower);
            release(ring.stage);
            ring.next();
            search(lower, 1, end - 1);
        }
    } else {
        for (i32 i = begin; i < end; i++, ring.next()) {
            float acc[16][4];
            await();
            multiply(acc, 0, ring.stage);
            wgmma_wait<0>(acc);
            release(ring.stage);
            search(acc, 0, i);
        }
    }
    skip(end, to - from);
}

// Runs a block: the producer loads tiles, and both consumer warpgroups call consume(tile, block, ranges, first row,
// keys, scan), where scan(rows) passes them all scores.
template <class T, int DP, int MT, int STAGES, class Consume>
__device__ __forceinline__ void hopper_block(const ScanParams &p, const TensorMap &map, const T *q, const T *k,
                                             const float *bias, const i32 *table, Consume consume) {
    using Tile = HopperTile<DP, MT, STAGES>;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(KeyRanges, ranges);
    Tile tile(shared);
    QueryBlock at(this_thread(), p, Tile::ROWS);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            barrier_init(&tile.full[s], 1);
            barrier_init(&tile.empty[s], 8);
        }
        barrier_fence();
    }
    store_queries<T, DP, Tile::ROWS>(tile.queries, p, at, q);
    compute_key_ranges(ranges, p, at, table, Tile::ROWS);

    u32 bias_head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    const float *biases = bias + (size_t(at.b) * p.bias_heads + bias_head) * p.bias_row;
    bool any = ranges.all.lo < ranges.all.hi;
    i32 from = any ? ranges.all.lo / Tile::KEYS : 0, to = any ? (ranges.all.hi + Tile::KEYS - 1) / Tile::KEYS : 0;
    auto number = [&](i32 i) { return p.tie == TIE_LAST ? to - 1 - i : from + i; };
    u32 group = __shfl_sync(ALL, threadIdx.x / 128, 0);

    if (group == 2) {
        // The producer needs few registers; the consumers get the others.
        if (!GD_FAULT(74) || threadIdx.x / 32 != 11) registers_drop<24>();
        if (threadIdx.x == 256) load_tiles(tile, map, p, at, biases, to - from, number);
    } else {
        registers_raise<240>();
        Source<T> keys = {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys, p.head_dim, true};
        // The first of the 16 rows that this warp has of every 64.
        u32 first = group * 64 * MT + threadIdx.x / 32 % 4 * 16;
        consume(tile, at, ranges, first, keys,
                [&](auto &rows) { scan_tiles<T>(tile, p, ranges, group, from, to, number, rows); });
    }
}

template <class T, int DP, int MT, int STAGES>
__device__ __forceinline__ void scan_top1_hopper(const ScanParams &p, const TensorMap &map, const T *q, const T *k,
                                                 const float *bias, const float *beta, const float *prior,
                                                 const i32 *table, i32 *index, float *energy, const T *v,
                                                 const float *threshold, T *y) {
    hopper_block<T, DP, MT, STAGES>(
        p, map, q, k, bias, table,
        [&](const auto &, const QueryBlock &at, const KeyRanges &ranges, u32 first, const Source<T> &keys, auto scan) {
            Top1Rows rows[MT];
            scan(rows);
            CommonOffset offset = unknown_offset();
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    for (u32 r = 0; r < 8; r++) {
                        float score = __shfl_sync(ALL, rows[m].score[half], r * 4);
                        i32 winner = __shfl_sync(ALL, rows[m].key[half], r * 4);
                        u32 row = first + m * 64 + half * 8 + r;
                        if (!at.exists(p, row)) continue;
                        // An infinite score hides the others; such a row is ranked by differences.
                        if (score == GD_INFINITY) winner = -1;
                        write_top1(p, at, row, winner, ranges.row[row], offset, q, keys, beta, prior, index, energy, v,
                                   threshold, y);
                    }
                }
            }
        });
}

template <class T, int DP, int STAGES>
__device__ __forceinline__ void scan_topk_hopper(const ScanParams &p, const TensorMap &map, const T *q, const T *k,
                                                 const float *bias, const float *beta, const float *prior,
                                                 const i32 *table, i32 *index, float *energy, const i32 *protected_keys,
                                                 uint8_t *flags) {
    hopper_block<T, DP, 1, STAGES>(
        p, map, q, k, bias, table,
        [&](const auto &tile, const QueryBlock &at, const KeyRanges &ranges, u32 first, const Source<T> &keys,
            auto scan) {
            HopperTopKRows rows[1] = {
                HopperTopKRows(tile.lists + size_t(first) * 2 * HOPPER_LIST_CAPACITY, HOPPER_LIST_CAPACITY)};
            scan(rows);
            rows[0].write(p, at, ranges, first, q, keys, beta, prior, index, energy, protected_keys, flags);
        });
}

#define SCAN_TOP1_HOPPER(T, D, MT, STAGES)                                                                             \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
        scan_top1_##T##_d##D##_sm90a(ScanParams p, const __grid_constant__ TensorMap map, const T *q, const T *k,      \
                                     const float *bias, const float *beta, const float *prior, const i32 *table,       \
                                     i32 *index, float *energy, const T *v, const float *threshold, T *y) {            \
        scan_top1_hopper<T, D, MT, STAGES>(p, map, q, k, bias, beta, prior, table, index, energy, v, threshold, y);    \
    }                                                                                                                  \
    GD_REGISTER(scan_top1_##T##_d##D##_sm90a)

#define SCAN_TOPK_HOPPER(T, D, STAGES)                                                                                 \
    extern "C" __global__ void __launch_bounds__(384, 1)                                                               \
        scan_topk_##T##_d##D##_sm90a(ScanParams p, const __grid_constant__ TensorMap map, const T *q, const T *k,      \
                                     const float *bias, const float *beta, const float *prior, const i32 *table,       \
                                     i32 *index, float *energy, const i32 *protected_keys, uint8_t *flags) {           \
        scan_topk_hopper<T, D, STAGES>(p, map, q, k, bias, beta, prior, table, index, energy, protected_keys, flags);  \
    }                                                                                                                  \
    GD_REGISTER(scan_topk_##T##_d##D##_sm90a)

// With stages of head_dim 256 no shared memory is left for lists.
#define SCANS_HOPPER(T)                                                                                                \
    SCAN_TOP1_HOPPER(T, 32, 2, 4)                                                                                      \
    SCAN_TOP1_HOPPER(T, 64, 2, 4)                                                                                      \
    SCAN_TOP1_HOPPER(T, 96, 2, 4)                                                                                      \
    SCAN_TOP1_HOPPER(T, 128, 2, 4)                                                                                     \
    SCAN_TOP1_HOPPER(T, 192, 2, 2)                                                                                     \
    SCAN_TOP1_HOPPER(T, 256, 1, 2)                                                                                     \
    SCAN_TOPK_HOPPER(T, 32, 3)                                                                                         \
    SCAN_TOPK_HOPPER(T, 64, 3)                                                                                         \
    SCAN_TOPK_HOPPER(T, 96, 3)                                                                                         \
    SCAN_TOPK_HOPPER(T, 128, 3)                                                                                        \
    SCAN_TOPK_HOPPER(T, 192, 2)
