// Certified scan: 8-bit integer products with error bounds rule out keys that cannot be among the K nearest of a row,
// and only the rest is scored exactly, with the instructions of the native scan. The result is bitwise that of the
// native scan.
//
// A block keeps 32 to 256 quantised query rows in registers and iterates over tiles of 64 keys. Every row has a
// threshold, a lower bound of its K-th greatest score, and a list of the keys whose upper bound reaches the threshold.
// A list without capacity for another group of keys is first pruned by the threshold and, if that frees too few
// entries, rescored exactly. Adversarial data costs time, but never changes the result.
#pragma once
#include "../shared/bounded_list.h"
#include "int8_bounds.cuh"
#include "scan_top1.cuh"

constexpr int CERTIFIED_KEYS = 64;

// Marks a list entry whose score is exact; the score of other entries is an upper bound.
constexpr i32 EXACT = 1 << 29;

// Initial value of the integer accumulators: the bits of 1.5 * 2^23. Integer products are below 127 * 127 * 256 < 2^22,
// so the accumulator read as a float is SHIFT plus the product, and no conversion instruction is needed.
constexpr i32 SHIFT_BITS = 0x4b400000;
constexpr float SHIFT = 12582912.0f;
// Upper bound of the rounding error of SHIFT times a key's scale, relative to that scale and the norm of a row: 0.75
// units of the row's scale, of which the norm has at least 127.
constexpr float SHIFT_ERROR = 0.008f;

// Capacity of a list: one group of keys and the entries that remain after pruning.
__device__ __forceinline__ u32 certified_list_capacity(const ScanParams &p) {
    return p.candidates == 1 && !p.protected_slots ? 40 : 64;
}

// The bound parameters of a key: (scale of its integers, error, norm, upper bound of its bias). A key without a bound
// has error and bias +inf, so that it is scored exactly; a key that is no candidate has bias -inf.
__device__ __forceinline__ float4 key_limits(float4 stats, float bias, float rounded) {
    if (bias == -GD_INFINITY) return {0.0f, 0.0f, 0.0f, -GD_INFINITY};
    // Written so that NaN has no bound either.
    if (!(fabsf(bias) <= MAX_BOUNDED_BIAS && stats.y < GD_INFINITY)) return {0.0f, GD_INFINITY, 0.0f, GD_INFINITY};
    return {stats.x, fmaf(SHIFT_ERROR, stats.x, stats.y), stats.z, fmaf(rounded, fabsf(bias), bias)};
}

// Bound parameters of the keys of a tile in shared memory, in the order of access: scale and bias of all keys, then
// error and norm of all keys.
struct KeyLimits {
    float2 *first;

    __device__ __forceinline__ void store(u32 x, float4 key) const {
        first[x] = {key.x, key.w}, first[CERTIFIED_KEYS + x] = {key.y, key.z};
    }
    __device__ __forceinline__ float4 operator[](u32 x) const {
        float2 scale = first[x], error = first[CERTIFIED_KEYS + x];
        return {scale.x, error.x, error.y, scale.y};
    }
    // Scale and bias of keys x and x + 1, by one 16-byte load; x is even.
    __device__ __forceinline__ float4 pair(u32 x) const { return *reinterpret_cast<const float4 *>(first + x); }
};

// Exact scores of up to BATCH list entries: lane x returns the score of entry min(x, count - 1).
template <class T, int DP> struct Exact {
    static constexpr u32 BATCH = 8;

    static __device__ __forceinline__ float scores(const T *query, const Source<T> &k, const float *bias,
                                                   const i32 *entries, u32 count) {
        using S = Mma<T, DP, 1>;
        u32 lane = lane_id(), t = lane % 4;
        auto key = [&](u32 x) { return u32(entries[min(x, count - 1)] & ~EXACT); };
        const T *row = k.first + size_t(key(lane / 4)) * k.stride;
        float acc[4];
        acc[0] = acc[2] = bias[key(2 * t)], acc[1] = acc[3] = bias[key(2 * t + 1)];
        // The query fills all 16 rows of the matrix product.
#pragma unroll 4
        for (int s = 0; s < DP / 16; s++) {
            u32 d = u32(s) * 16 + 2 * t;
            uint32_t low = S::pair(query, d, k.dim, k.aligned), high = S::pair(query, d + 8, k.dim, k.aligned);
            const uint32_t a[4] = {low, low, high, high};
            mma(acc, a, S::pair(row, d, k.dim, k.aligned), S::pair(row, d + 8, k.dim, k.aligned), T{});
        }
        float even = __shfl_sync(ALL, acc[0], lane / 2 % 4), odd = __shfl_sync(ALL, acc[1], lane / 2 % 4);
        return lane % 2 ? odd : even;
    }
};
template <int DP> struct Exact<float, DP> {
    static constexpr u32 BATCH = 32;

    static __device__ __forceinline__ float scores(const float *query, const Source<float> &k, const float *bias,
                                                   const i32 *entries, u32 count) {
        u32 j = u32(entries[min(lane_id(), count - 1)] & ~EXACT);
        const float *row = k.first + size_t(j) * k.stride;
        float score = bias[j];
#pragma unroll 4
        for (u32 d = 0; d < k.dim; d++)
            score = fmaf(query[d], row[d], score);
        return score;
    }
};

// State of a row in shared memory while its list is pruned or rescored.
struct RowState {
    float threshold, norm;
    u32 count, scored, overflowed; // `overflowed`: an exact score was +inf
};

// The query rows of a warp. With g = lane / 4, a lane holds key range, scale, norm, threshold and list length of rows g
// and g + 8 of every 16, equal in the four lanes that share a row.
template <class T, int DP, int MT> struct CertifiedRows {
    static constexpr int ROWS = 16 * MT;
    const ScanParams &p;
    const QueryBlock &at;
    const T *q;
    Source<T> keys;
    const float *bias;
    const float4 *stats;
    float *lists;
    RowState *rows;
    u32 first, capacity;
    // `coarse`: greatest ratio of quantisation error to norm among the rows, plus the relative rounding error;
    // multiplies the norm of a key. `rounded`: the relative rounding error alone; multiplies its bias.
    float coarse, rounded;
    Integers<DP> integers[MT];
    Range ranges_of_row[MT][2];
    float scale[MT][2], norm[MT][2], threshold[MT][2];
    u32 count[MT][2];

    __device__ __forceinline__ CertifiedRows(const ScanParams &p, const QueryBlock &at, const T *q,
                                             const Source<T> &keys, const float *bias, const float4 *stats,
                                             float *lists, RowState *rows, u32 first, u32 capacity)
        : p(p), at(at), q(q), keys(keys), bias(bias), stats(stats), lists(lists), rows(rows), first(first),
          capacity(capacity), rounded(rounding(p.head_dim)) {}

    // Quantises the rows by way of `staging`, shared memory for 16 rows.
    __device__ __forceinline__ void load(int8_t *staging, const KeyRanges &ranges) {
        u32 g = lane_id() / 4;
        float ratio = 0;
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                for (u32 r = 0; r < 8; r++) {
                    u32 x = half * 8 + r, row = first + m * 16 + x;
                    const T *query = at.exists(p, row) ? query_row(p, at, q, row) : nullptr;
                    Quantization key_stats =
                        quantize_row(query, query ? p.head_dim : 0, staging + x * Integers<DP>::PITCH, DP);
                    if (key_stats.norm > 0 && finite(key_stats.error))
                        ratio = fmaxf(ratio, key_stats.error / key_stats.norm * (1.0f + 1e-6f));
                    if (r == (GD_FAULT(144) ? (g ^ 1) : g)) scale[m][half] = key_stats.scale;
                    if (r == g) norm[m][half] = key_stats.norm;
                }
                ranges_of_row[m][half] = ranges.row[first + m * 16 + half * 8 + g];
                // A row without keys has no candidates: its threshold is +inf.
                threshold[m][half] = ranges_of_row[m][half].lo < ranges_of_row[m][half].hi ? -GD_INFINITY : GD_INFINITY;
                count[m][half] = 0;
            }
            __syncwarp();
            integers[m].load(staging);
            __syncwarp();
        }
        coarse = ratio + rounded;
        for (u32 r = lane_id(); r < ROWS; r += 32)
            rows[r].scored = rows[r].overflowed = 0;
    }

    __device__ __forceinline__ float error(float4 key) const {
        float e = fmaf(coarse, key.z, key.y);
        return GD_FAULT(140) ? 0.1f * e : e;
    }

    // Lower bound of a score from its upper bound; NaN or -inf where there is none.
    __device__ __forceinline__ float lower_bound(float upper, float4 key, float norm) const {
        return fmaf(-2.0f * norm, error(key), upper) - 2.01f * rounded * fabsf(key.w);
    }

    // Integer products of all rows with 32 keys, offset by SHIFT_BITS.
    __device__ __forceinline__ void products(const int8_t *tile, int group, i32 (&product)[MT][4][4]) const {
        constexpr int PITCH = Integers<DP>::PITCH;
        u32 lane = lane_id();
        // As in Integers::scores, for all matrices of rows at once.
        const int8_t *from = tile + (group + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
#pragma unroll
        for (int s = 0; s < DP / 32; s++) {
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                uint32_t b[4];
                load_matrices(b, from + n * 8 * PITCH + s * 32);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    if (s == 0) {
                        mma_from(product[m][n], integers[m].a[s], b[0], b[1], SHIFT_BITS);
                        mma_from(product[m][n + 1], integers[m].a[s], b[2], b[3], SHIFT_BITS);
                    } else {
                        mma(product[m][n], integers[m].a[s], b[0], b[1]);
                        mma(product[m][n + 1], integers[m].a[s], b[2], b[3]);
                    }
                }
            }
        }
    }

    // Processes a group of 32 keys whose first is key `start` and whose errors and norms are at most `widest`. Most
    // keys are rejected here, by two operations per score and one comparison with the threshold minus the widest error
    // bound of the group. Key ranges are checked only for the rest.
    __device__ __forceinline__ void score_group(const int8_t *tile, KeyLimits limits, float2 widest, int group,
                                                i32 start) {
        u32 t = lane_id() % 4;
        i32 product[MT][4][4];
        products(tile, group, product);
        float score[MT][4][4], reach[MT][2], width = error({0.0f, widest.x, widest.y, 0.0f});
        bool hit[MT] = {};
#pragma unroll
        for (int x = 0; x < 2 * MT; x++)
            reach[x / 2][x % 2] = fmaf(-norm[x / 2][x % 2], width, threshold[x / 2][x % 2]);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float4 pair = limits.pair(group + n * 8 + 2 * t);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float key_scale = e ? pair.z : pair.x, upper_bias = e ? pair.w : pair.y, shift = -SHIFT * key_scale;
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        int c = 2 * half + e;
                        float f = fmaf(key_scale, __uint_as_float(u32(product[m][n][c])), shift);
                        score[m][n][c] = fmaf(scale[m][half], f, upper_bias);
                        // Written so that NaN is a hit.
                        hit[m] |= !(score[m][n][c] < reach[m][half]);
                    }
                }
            }
        }
        u32 full = 0;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            if (!__any_sync(ALL, hit[m])) continue;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                bool group_hit = false;
#pragma unroll
                for (int c = 0; c < 4; c++)
                    group_hit |= !(score[m][n][c] < reach[m][c / 2]);
                if (__any_sync(ALL, group_hit)) append(m, score[m][n], limits, group + n * 8, start + n * 8);
            }
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (count[m][half] + GROUP > capacity) full |= 1u << (m * 16 + half * 8 + lane_id() / 4);
        }
        if (__any_sync(ALL, full != 0)) compact(full);
    }

    // Appends those of 8 keys, from key `tile_key` of the tile, whose upper bound reaches the threshold of a row with
    // the key in its range. The lists have capacity for all of them.
    __device__ __forceinline__ void append(int m, const float (&score)[4], KeyLimits limits, u32 tile_key, i32 start) {
        u32 t = lane_id() % 4, hits = 0;
        float upper[4], lower[2] = {-GD_INFINITY, -GD_INFINITY};
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float4 key = limits[tile_key + 2 * t + c % 2];
            i32 j = start + i32(2 * t) + c % 2;
            Range range = ranges_of_row[m][c / 2];
            upper[c] = fmaf(norm[m][c / 2], error(key), score[c]);
            bool visible = j >= range.lo && j < (GD_FAULT(148) ? range.hi + 1 : range.hi) && key.w > -GD_INFINITY;
            if (!visible || upper[c] < threshold[m][c / 2]) continue;
            hits |= 1u << c;
            // fmaxf ignores NaN.
            lower[c / 2] = fmaxf(lower[c / 2], lower_bound(upper[c], key, norm[m][c / 2]));
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // With several candidates, the threshold follows from the whole list alone.
            if (p.candidates == 1) {
                float x = lower[half];
                x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
                x = fmaxf(x, __shfl_xor_sync(ALL, x, 2));
                if (GD_FAULT(145)) x = __shfl_xor_sync(ALL, x, 4);
                threshold[m][half] = fmaxf(threshold[m][half], x);
            }
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (upper[2 * half + e] < threshold[m][half]) hits &= ~(1u << (2 * half + e));
            u32 own = __popc(hits >> (2 * half) & 3);
            u32 one = __shfl_xor_sync(ALL, own, 1), two = __shfl_xor_sync(ALL, own + one, 2);
            u32 to = count[m][half] + (t & 1 ? one : 0) + (t & 2 ? two : 0);
            count[m][half] += own + one + two;
            List list(lists, m * 16 + half * 8 + lane_id() / 4, capacity);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!(hits >> (2 * half + e) & 1)) continue;
                list.score[to] = upper[2 * half + e], list.key[to] = start + i32(2 * t) + e;
                to++;
            }
        }
    }

    // Moves thresholds and list lengths to shared memory, and back.
    __device__ __forceinline__ void store_state() {
        if (lane_id() % 4 == 0) {
#pragma unroll
            for (int x = 0; x < 2 * MT; x++) {
                RowState &row = rows[x * 8 + lane_id() / 4];
                row.threshold = threshold[x / 2][x % 2], row.norm = norm[x / 2][x % 2], row.count = count[x / 2][x % 2];
            }
        }
        __syncwarp();
    }
    __device__ __forceinline__ void load_state() {
        __syncwarp();
#pragma unroll
        for (int x = 0; x < 2 * MT; x++) {
            const RowState &row = rows[x * 8 + lane_id() / 4];
            threshold[x / 2][x % 2] = row.threshold, count[x / 2][x % 2] = row.count;
        }
        __syncwarp();
    }

    // Prunes, and if necessary rescores, the lists whose bits are set in some lane's `full`.
    __device__ __forceinline__ void compact(u32 full) {
        store_state();
        for (u32 r = 0; r < ROWS; r++) {
            if (!__any_sync(ALL, full >> r & 1)) continue;
            prune(r);
            if (rows[r].count + GROUP <= capacity) continue;
            if (GD_FAULT(143)) {
                __syncwarp();
                rows[r].count = 0;
            } else {
                rescore(r);
            }
        }
        load_state();
    }

    // Raises the threshold of row r to the K-th greatest lower bound of its list, and drops entries below it.
    __device__ __forceinline__ void prune(u32 r) {
        List list(lists, r, capacity);
        u32 lane = lane_id(), entries = rows[r].count;
        float threshold = rows[r].threshold, norm = rows[r].norm;
        float score[2], low[2];
        i32 key[2];
#pragma unroll
        for (int x = 0; x < 2; x++) {
            u32 e = lane + 32 * x;
            score[x] = e < entries ? list.score[e] : -GD_INFINITY;
            key[x] = e < entries ? list.key[e] : 0;
        }
        if (p.candidates > 1 && entries >= p.candidates) {
            u32 rank[2] = {0, 0};
#pragma unroll
            for (int x = 0; x < 2; x++) {
                low[x] = score[x];
                if (lane + 32 * x < entries && !(key[x] & EXACT)) {
                    float bound = lower_bound(score[x], key_limits(stats[key[x]], bias[key[x]], rounded), norm);
                    low[x] = bound > -GD_INFINITY ? bound : -GD_INFINITY;
                }
            }
            for (u32 e = 0; e < entries; e++) {
                float other = __shfl_sync(ALL, e < 32 ? low[0] : low[1], e % 32);
#pragma unroll
                for (int x = 0; x < 2; x++)
                    rank[x] += other > low[x] || (other == low[x] && e < lane + 32 * x);
            }
#pragma unroll
            for (int x = 0; x < 2; x++) {
                u32 vote = __ballot_sync(ALL, lane + 32 * x < entries && rank[x] == p.candidates - 1);
                float bound = __shfl_sync(ALL, low[x], vote ? first_bit(vote) : 0);
                if (vote) threshold = fmaxf(threshold, bound);
            }
        }
        __syncwarp();
        u32 remaining = 0;
#pragma unroll
        for (int x = 0; x < 2; x++) {
            bool remains = lane + 32 * x < entries && !(score[x] < threshold);
            u32 vote = __ballot_sync(ALL, remains), to = remaining + __popc(vote & ((1u << lane) - 1));
            if (remains) list.score[to] = score[x], list.key[to] = key[x];
            remaining += __popc(vote);
        }
        if (lane == 0) rows[r].count = remaining, rows[r].threshold = threshold;
        __syncwarp();
    }

    // Scores the list of row r exactly and keeps the K greatest.
    __device__ __forceinline__ void rescore(u32 r) {
        using E = Exact<T, DP>;
        List list(lists, r, capacity);
        u32 lane = lane_id(), entries = rows[r].count, from = 0;
        // Exact entries come first, since they were in the list before the others were appended.
#pragma unroll
        for (u32 x = 0; x < 64; x += 32)
            from += __popc(__ballot_sync(ALL, lane + x < entries && list.key[lane + x] & EXACT));
        const T *query = query_row(p, at, q, first + r);
        u32 scored = entries - from;
        bool overflowed = false;
        for (; from < entries; from += E::BATCH) {
            u32 left = min(entries - from, E::BATCH);
            float s = E::scores(query, keys, bias, list.key + from, left);
            overflowed |= lane < left && s == GD_INFINITY;
            __syncwarp();
            if (lane < left) {
                // NaN and infinite scores belong to no candidate.
                list.score[from + lane] = finite(s) ? s : -GD_INFINITY;
                list.key[from + lane] |= EXACT;
            }
            __syncwarp();
        }
        bool any_overflow = __any_sync(ALL, overflowed);
        sort_entries<2>(this_thread(), list, entries, p.candidates, false, p.tie);
        entries = min(entries, p.candidates);
        entries = u32(__popc(__ballot_sync(ALL, lane < entries && list.score[lane] > -GD_INFINITY)));
        if (lane == 0) {
            RowState &row = rows[r];
            row.count = entries, row.scored += scored, row.overflowed |= any_overflow;
            if (entries >= p.candidates) row.threshold = fmaxf(row.threshold, list.score[p.candidates - 1]);
        }
        __syncwarp();
    }
};

template <class T, int DP, int MT>
__device__ __forceinline__ void
scan_certified(const CertifiedParams &params, const T *q, const T *k, const float *bias, const int8_t *codes,
               const float4 *stats, const float *beta, const float *prior, const i32 *table, i32 *index, float *energy,
               const T *v, const float *threshold, T *y, const i32 *protected_keys, uint8_t *flags, u32 *rescored) {
    using S = CertifiedRows<T, DP, MT>;
    const ScanParams &p = params.scan;
    constexpr int KEYS = CERTIFIED_KEYS, TILE = KEYS * Integers<DP>::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(KeyRanges, ranges);
    // Greatest error and norm among the keys of every group, for both stages.
    GD_SHARED(float2[2][KEYS / GROUP], widest);
    u32 warps = blockDim.x / 32, warp = threadIdx.x / 32;
    QueryBlock at(this_thread(), p, warps * S::ROWS);
    compute_key_ranges(ranges, p, at, table, warps * S::ROWS);

    int8_t *tiles = reinterpret_cast<int8_t *>(shared);
    float2 *tile_limits = reinterpret_cast<float2 *>(tiles + 2 * TILE);
    auto limits = [&](i32 tile) { return KeyLimits{tile_limits + tile % 2 * 2 * KEYS}; };
    float *lists = reinterpret_cast<float *>(tile_limits + 4 * KEYS);
    u32 capacity = certified_list_capacity(p), first = warp * S::ROWS;
    RowState *rows = reinterpret_cast<RowState *>(lists + size_t(warps) * S::ROWS * 2 * capacity);
    Source<T> keys = {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys, p.head_dim,
                      p.vector_loads != 0};
    u32 bias_head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    size_t sequence = size_t(at.b) * p.kv_heads + at.kv;
    const float *biases = bias + (size_t(at.b) * p.bias_heads + bias_head) * p.bias_row;
    const float4 *key_stats = stats + sequence * params.capacity;
    S rows_of_warp(p, at, q, keys, biases, key_stats, lists + size_t(first) * 2 * capacity, rows + first, first,
                   capacity);
    // The staging rows of at most 8 warps fit where the tiles will be loaded.
    rows_of_warp.load(tiles + warp * 16 * Integers<DP>::PITCH, ranges);
    __syncthreads();

    u32 width = (p.head_dim + 15) / 16 * 16;
    Source<int8_t> integers = {codes + sequence * params.capacity * width, width, p.keys, width, true};
    WarpRange warp_range(ranges, first, S::ROWS);
    float4 next_stats = {};
    float next_bias = 0;
    // The next tile is copied asynchronously while this one is processed; its bound parameters wait in registers.
    auto load = [&](i32 tile) {
        u32 j = u32(tile) * KEYS;
        load_rows<int8_t, DP, KEYS>(tiles + tile % 2 * TILE, integers, j);
        copy_commit();
        if (threadIdx.x < KEYS) next_stats = key_stats[j + threadIdx.x], next_bias = biases[j + threadIdx.x];
    };
    auto store_limits = [&](i32 tile) {
        // One warp per group of keys.
        if (threadIdx.x >= KEYS) return;
        float4 key = key_limits(next_stats, next_bias, rows_of_warp.rounded);
        limits(tile).store(threadIdx.x, key);
        float2 largest = {key.y, key.z};
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            largest.x = fmaxf(largest.x, __shfl_xor_sync(ALL, largest.x, step));
            largest.y = fmaxf(largest.y, __shfl_xor_sync(ALL, largest.y, step));
        }
        if (lane_id() == 0) widest[tile % 2][warp] = largest;
    };
    i32 from = ranges.all.lo / KEYS, to = ranges.all.lo < ranges.all.hi ? (ranges.all.hi + KEYS - 1) / KEYS : from;
    if (from < to) load(from), store_limits(from);
    for (i32 tile = from; tile < to; tile++) {
        if (tile + 1 < to) {
            load(tile + 1);
            if (!GD_FAULT(141)) copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        if (!GD_FAULT(149)) __syncthreads();
        i32 start = tile * KEYS;
        if (warp_range.overlaps(start, KEYS)) {
            const int8_t *tile_keys = tiles + (GD_FAULT(142) ? tile + 1 : tile) % 2 * TILE;
            KeyLimits key_stats = limits(GD_FAULT(146) ? tile + 1 : tile);
            for (int group = 0; group < KEYS; group += GROUP)
                rows_of_warp.score_group(tile_keys, key_stats, widest[tile % 2][group / GROUP], group, start + group);
        }
        if (tile + 1 < to) store_limits(tile + 1);
        // The next copy overwrites the stage that was just read.
        if (!GD_FAULT(150)) __syncthreads();
    }

    rows_of_warp.store_state();
    CommonOffset offset = unknown_offset();
    for (u32 r = 0; r < u32(S::ROWS); r++) {
        u32 row = first + r;
        if (!at.exists(p, row)) continue;
        Range range = ranges.row[row];
        rows_of_warp.prune(r);
        if (!GD_FAULT(147)) rows_of_warp.rescore(r);
        List list(rows_of_warp.lists, r, capacity);
        u32 entries = rows_of_warp.rows[r].count, scored = rows_of_warp.rows[r].scored;
        if (lane_id() < entries) list.key[lane_id()] &= ~EXACT;
        __syncwarp();
        size_t out = at.output_row(p, row);
        if (p.candidates == 1 && !p.protected_slots) {
            i32 winner = entries ? list.key[0] : -1;
            // An infinite score hides the others; such a row is ranked by differences.
            if (rows_of_warp.rows[r].overflowed) {
                winner = -1;
                scored = u32(range.hi - range.lo);
            }
            write_top1(p, at, row, winner, range, offset, q, keys, beta, prior, index, energy, v, threshold, y);
        } else {
            write_list(this_thread(), p, at, row, list, entries, range, offset, q, keys.first, beta, prior, index,
                       energy, protected_keys, flags);
        }
        if (lane_id() == 0) rescored[2 * out] = scored, rescored[2 * out + 1] = u32(range.hi - range.lo);
    }
}

#define SCAN_CERTIFIED(T, D, MT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 1) scan_certified_##T##_d##D##_sm80(                             \
        CertifiedParams p, const T *q, const T *k, const float *bias, const int8_t *codes, const float4 *stats,        \
        const float *beta, const float *prior, const i32 *table, i32 *index, float *energy, const T *v,                \
        const float *threshold, T *y, const i32 *protected_keys, uint8_t *flags, u32 *rescored) {                      \
        scan_certified<T, D, MT>(p, q, k, bias, codes, stats, beta, prior, table, index, energy, v, threshold, y,      \
                                 protected_keys, flags, rescored);                                                     \
    }                                                                                                                  \
    GD_REGISTER(scan_certified_##T##_d##D##_sm80)

#define SCANS_CERTIFIED(T)                                                                                             \
    SCAN_CERTIFIED(T, 32, 2)                                                                                           \
    SCAN_CERTIFIED(T, 64, 2)                                                                                           \
    SCAN_CERTIFIED(T, 96, 2)                                                                                           \
    SCAN_CERTIFIED(T, 128, 2)                                                                                          \
    SCAN_CERTIFIED(T, 192, 1)                                                                                          \
    SCAN_CERTIFIED(T, 256, 1)
