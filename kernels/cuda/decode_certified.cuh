// Certified decoding: as decode.cuh, but blocks read the keys as 8-bit integers with error bounds, a quarter or half of
// the bytes. A key whose upper bound reaches the greatest lower bound so far becomes a candidate of its row. The last
// block rescores the candidates of all blocks that can still win. Candidates that exceed a list's capacity are rescored
// immediately, so that the result is always that of the native scan.
#pragma once
#include "int8_bounds.cuh"
#include "decode.cuh"

// Entries of a warp's list: a tile adds 256 at most.
constexpr u32 WARP_CANDIDATES = 256;

// A candidate: key and row as key * 16 + row.
struct Candidate {
    float upper;
    u32 key_and_row;
};

// Maps a float to an integer of the same order, and back. 0, which no float maps to, is below all of them.
__device__ __forceinline__ u32 to_ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(u32 x) {
    return x ? __uint_as_float(x ^ (x >> 31 ? 0x80000000u : 0xffffffffu)) : -GD_INFINITY;
}

// Bounds that the warps of a block share, in addition to DecodeState.
struct SharedBounds {
    Quantization row[16];
    // The greatest lower bound of every row, as to_ordered maps it.
    u32 threshold[16];
};

// Memory that the blocks of a row tile share. All but `candidates` is zero before and after a launch.
struct Workspace {
    uint64_t *winners;     // [row tiles, 16]: packed winners
    u32 *lower;            // [row tiles, 16]: greatest lower bounds, as to_ordered maps them
    u32 *counter;          // [row tiles, 2]: blocks that have arrived, candidates
    Candidate *candidates; // [row tiles, capacity]
};

// The candidates of a warp, and the greatest exact score of every row so far.
template <class T, int DP> struct WarpCandidates {
    using S = typename Scoring<T>::template Of<DP, 1>;
    const DecodeRows<T> &at;
    T *queries;
    const T *k;
    const float4 *stats;
    const float *prior;
    float scale;
    SharedBounds &bounds;
    Candidate *list;
    T *gathered;
    Range row_ranges[2];
    u32 count = 0;
    float top[2] = {-GD_INFINITY, -GD_INFINITY};
    i32 key[2] = {-1, -1};

    __device__ __forceinline__ WarpCandidates(const DecodeRows<T> &at, T *queries, const T *k, const float4 *stats,
                                              const float *prior, float scale, SharedBounds &bounds, Candidate *list,
                                              T *gathered, const Range *rows)
        : at(at), queries(queries), k(k), stats(stats), prior(prior), scale(scale), bounds(bounds), list(list),
          gathered(gathered), row_ranges{rows[lane_id() / 4], rows[lane_id() / 4 + 8]} {}

    // The rows for exact scores; in f32 one warp stores them first.
    static __device__ __forceinline__ void load(S &scoring, const DecodeRows<T> &at, T *queries, bool store) {
        scoring.load_queries(queries, at.p.head_dim, at.p.vector_loads, store,
                             [&](u32 r) { return at.exists(r) ? at.query(r) : nullptr; });
    }

    __device__ __forceinline__ float threshold(u32 row) const {
        return from_ordered(*const_cast<const volatile u32 *>(&bounds.threshold[row]));
    }

    // Raises the thresholds of the lane's two rows to the maximum over the four lanes that share them.
    __device__ __forceinline__ void raise_thresholds(const float (&lower)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = lower[half];
            x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
            x = fmaxf(x, __shfl_xor_sync(ALL, x, 2));
            u32 row = lane_id() / 4 + 8 * half;
            if (lane_id() % 4 == 0 && x > threshold(row)) atomicMax(&bounds.threshold[row], to_ordered(x));
        }
        __syncwarp();
    }

    // Drops candidates whose upper bound is below the threshold of their row.
    __device__ __forceinline__ void prune() {
        u32 remaining = 0;
        __syncwarp();
        for (u32 from = 0; from < count; from += 32) {
            u32 e = from + lane_id();
            Candidate x = e < count ? list[e] : Candidate{0.0f, 0};
            bool remains = e < count && !(x.upper < threshold(x.key_and_row % 16));
            u32 vote = __ballot_sync(ALL, remains);
            if (remains) list[remaining + __popc(vote & ((1u << lane_id()) - 1))] = x;
            remaining += __popc(vote);
            __syncwarp();
        }
        count = remaining;
    }

    // Scores all candidates of the list from `from` on.
    __device__ __forceinline__ void rescore(u32 from) {
        constexpr int KEYS = Gather<T>::KEYS, NT = KEYS / 8;
        u32 t = lane_id() % 4;
        const DecodeParams &p = at.p;
        if (from >= count) return;
        S scoring;
        load(scoring, at, queries, false);
        for (; from < count; from += KEYS) {
            u32 left = min(count - from, u32(KEYS));
            auto number = [&](u32 x) { return list[from + min(x, left - 1)].key_and_row / 16; };
            gather_rows<T, DP>(gathered, left, p.head_dim, p.vector_loads != 0,
                               [&](u32 x) { return at.key(k, number(x)); });
            float acc[1][NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32 j = number(n * 8 + 2 * t + e);
                    acc[0][n][e] = acc[0][n][2 + e] = at.with_prior(stats[at.bias_at(j)].w, prior, scale, j);
                }
            }
            scoring.template scores<NT>(gathered, 0, acc);
            update_top1(acc[0], row_ranges, p.tie, top, key, [&](int n, int e) {
                u32 x = n * 8 + 2 * t + e;
                return x < left ? i32(number(x)) : -1;
            });
            raise_thresholds(top);
        }
    }

    // Ensures capacity for `more` candidates: drops those below the thresholds and, if that frees too few entries,
    // scores all others exactly.
    __device__ __forceinline__ void compact(u32 more) {
        if (count + more <= WARP_CANDIDATES) return;
        prune();
        if (count + more <= WARP_CANDIDATES) return;
        if (!GD_FAULT(82)) rescore(0);
        count = 0;
    }
};

template <class T, int DP>
__device__ __forceinline__ void decode_certified(const DecodeParams &p, const T *q, const T *k, const int8_t *codes,
                                                 const float4 *stats, const float *beta, const float *prior,
                                                 const i32 *table, const i32 *pages, const T *v, const float *threshold,
                                                 const Workspace &workspace, i32 *index, float *energy, T *y) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = 64, PITCH = Integers<DP>::PITCH, TILE = KEYS * PITCH, NT = KEYS / 8 / DECODE_WARPS;
    constexpr int ROWS = 16, GATHERED = Gather<T>::KEYS * S::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(DecodeState<ROWS>, state);
    GD_SHARED(SharedBounds, bounds);
    u32 warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    DecodeRows<T> at(p, q, pages);
    u32 *lower = workspace.lower + size_t(at.row_tile) * ROWS, *counter = workspace.counter + size_t(at.row_tile) * 2;
    Candidate *candidates = workspace.candidates + size_t(at.row_tile) * p.candidate_capacity;
    // Lower bounds that earlier blocks have published.
    if (threadIdx.x < ROWS) bounds.threshold[threadIdx.x] = const_cast<volatile u32 *>(lower)[threadIdx.x];
    at.fill(state, table);

    int8_t *tiles = reinterpret_cast<int8_t *>(shared);
    float4 *tile_stats = reinterpret_cast<float4 *>(tiles + 2 * TILE);
    Candidate *lists = reinterpret_cast<Candidate *>(tile_stats + 2 * KEYS);
    T *gathered = reinterpret_cast<T *>(lists + DECODE_WARPS * WARP_CANDIDATES);
    int8_t *rows = reinterpret_cast<int8_t *>(gathered + DECODE_WARPS * GATHERED);
    auto row = [&](u32 r) { return at.exists(r) ? at.query(r) : nullptr; };
    T *queries = reinterpret_cast<T *>(rows + 16 * PITCH);
    S scoring;
    WarpCandidates<T, DP>::load(scoring, at, queries, warp == 0);
    quantize_rows<T, DP>(rows, bounds.row, p.head_dim, warp, DECODE_WARPS, row);
    Integers<DP> integers;
    integers.load(rows);
    Quantization query[2] = {bounds.row[g], bounds.row[g + 8]};
    float rounded = rounding(p.head_dim), coarse = coarseness(bounds.row) + rounded;

    Range block_tiles = at.tiles(state.all, KEYS);
    float scale = (p.score == SCORE_DOT ? 1.0f : 0.5f) / beta[at.h0];
    u32 width = (p.head_dim + 15) / 16 * 16;
    auto load = [&](i32 tile) {
        u32 j = u32(tile) * KEYS, row = at.page_offset(j), stage = u32(tile) % 2;
        size_t first = at.bias_at(j);
        Source<int8_t> keys = {codes + (first - row) * width, width, at.page_rows(j), width, true};
        load_rows<int8_t, DP, KEYS>(tiles + stage * TILE, keys, row);
        if (threadIdx.x < KEYS) copy_async(tile_stats + stage * KEYS + threadIdx.x, stats + first + threadIdx.x, 16);
        copy_commit();
    };
    Range row_ranges[2] = {state.row[g], state.row[g + 8]};
    WarpCandidates<T, DP> warp_candidates(at, queries, k, stats, prior, scale, bounds, lists + warp * WARP_CANDIDATES,
                                          gathered + warp * GATHERED, state.row);
    if (block_tiles.lo < block_tiles.hi) load(block_tiles.lo);
    for (i32 tile = block_tiles.lo; tile < block_tiles.hi; tile++) {
        if (tile + 1 < block_tiles.hi) {
            load(tile + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        int first = int(warp) * NT * 8;
        i32 start = tile * KEYS + first;
        const float4 *key_stats = tile_stats + u32(tile + (GD_FAULT(81) ? 1 : 0)) % 2 * KEYS + first;
        i32 product[NT][4] = {};
        integers.template scores<NT>(tiles + u32(tile) % 2 * TILE, first, product);
        float upper[NT][4], greatest_lower[2] = {-GD_INFINITY, -GD_INFINITY};
        u32 open = 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 x = n * 8 + 2 * t + e;
                i32 j = start + i32(x);
                float4 key = key_stats[x];
                KeyBound bound(key, at.with_prior(key.w, prior, scale, u32(j)), coarse, rounded);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int c = 2 * half + e;
                    float s = query[half].scale * bound.scale, f = float(product[n][c]);
                    upper[n][c] = fmaf(s, f, fmaf(query[half].norm, bound.error, bound.upper_bias));
                    Range range = row_ranges[half];
                    bool visible = j >= range.lo && j < (GD_FAULT(84) ? range.hi + 1 : range.hi);
                    if (!visible || !bound.allowed) continue;
                    open |= 1u << (n * 4 + c);
                    // fmaxf ignores NaN.
                    float lower_bound = fmaf(s, f, fmaf(-query[half].norm, bound.error, bound.lower_bias));
                    greatest_lower[half] = fmaxf(greatest_lower[half], lower_bound);
                }
            }
        }
        warp_candidates.raise_thresholds(greatest_lower);
        float threshold[2] = {warp_candidates.threshold(g), warp_candidates.threshold(g + 8)};
        u32 hits = 0;
#pragma unroll
        for (int x = 0; x < NT * 4; x++)
            if (open >> x & 1 && !(upper[x / 4][x % 4] < threshold[x % 4 / 2])) hits |= 1u << x;
        if (__any_sync(ALL, hits != 0)) {
            u32 total = 0;
#pragma unroll
            for (int x = 0; x < NT * 4; x++)
                total += __popc(__ballot_sync(ALL, hits >> x & 1));
            warp_candidates.compact(total);
#pragma unroll
            for (int x = 0; x < NT * 4; x++) {
                u32 vote = __ballot_sync(ALL, hits >> x & 1);
                u32 j = u32(start) + x / 4 * 8 + 2 * t + x % 2;
                if (hits >> x & 1)
                    warp_candidates.list[warp_candidates.count + __popc(vote & ((1u << lane) - 1))] = {
                        upper[x / 4][x % 4], j * 16 + g + (x % 4 / 2) * 8};
                warp_candidates.count += __popc(vote);
            }
        }
        __syncthreads();
    }

    // Exchanges thresholds with the other blocks of the row tile.
    if (threadIdx.x < ROWS) {
        u32 block_bound = bounds.threshold[threadIdx.x];
        u32 published = atomicMax(lower + threadIdx.x, block_bound);
        bounds.threshold[threadIdx.x] = max(block_bound, published);
    }
    __syncthreads();
    warp_candidates.prune();
    u32 to = lane == 0 && warp_candidates.count ? atomicAdd(counter + 1, warp_candidates.count) : 0;
    to = __shfl_sync(ALL, to, 0);
    u32 fit = to < p.candidate_capacity ? min(p.candidate_capacity - to, warp_candidates.count) : 0;
    for (u32 e = lane; e < fit; e += 32)
        candidates[to + e] = warp_candidates.list[e];
    if (!GD_FAULT(85)) warp_candidates.rescore(fit);
    // Publishes thresholds that exact scores have raised.
    if (lane < ROWS) atomicMax(lower + lane, *const_cast<volatile u32 *>(&bounds.threshold[lane]));
    __threadfence();
    uint64_t *winners = workspace.winners + size_t(at.row_tile) * ROWS;
    merge_top1(state, warp_candidates.top, warp_candidates.key, p.tie, winners);
    if (!is_last_block(state, counter, p.splits)) return;

    if (threadIdx.x < ROWS) bounds.threshold[threadIdx.x] = const_cast<volatile u32 *>(lower)[threadIdx.x];
    __syncthreads();
    u32 total = const_cast<volatile u32 *>(counter)[1];
    if (total > p.candidate_capacity) total = p.candidate_capacity;
    warp_candidates.count = 0;
    for (u32 from = warp * 32; from < total; from += 32 * DECODE_WARPS) {
        const volatile Candidate &x = candidates[min(from + lane, total - 1)];
        Candidate one = {x.upper, x.key_and_row};
        bool remains = from + lane < total && !(one.upper < warp_candidates.threshold(one.key_and_row % 16));
        u32 vote = __ballot_sync(ALL, remains);
        warp_candidates.compact(__popc(vote));
        if (remains) warp_candidates.list[warp_candidates.count + __popc(vote & ((1u << lane) - 1))] = one;
        warp_candidates.count += __popc(vote);
    }
    warp_candidates.prune();
    warp_candidates.rescore(0);
    merge_top1(state, warp_candidates.top, warp_candidates.key, p.tie, winners);
    write_winners(at, state, k, beta, prior, v, threshold, winners, index, energy, y);
    if (threadIdx.x < ROWS) winners[threadIdx.x] = 0, lower[threadIdx.x] = 0;
    if (threadIdx.x < 2) counter[threadIdx.x] = 0;
}
