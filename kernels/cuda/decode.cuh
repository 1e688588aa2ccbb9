// Decoding: a few queries against a long cache, with the keys of a row split over several blocks (split-K). Within a
// block every warp scores its own keys of a tile. Each block merges its winner of every row into the workspace by a
// 64-bit atomic maximum, and the last block of a row tile writes index, energy and value row. Scores, and therefore
// results, are bitwise those of the scan.
#pragma once
#include "../shared/mask.h"
#include "../shared/query_rows.h"
#include "tile.cuh"

// Warps of a block.
constexpr int DECODE_WARPS = 4;

// Packs a score and its key into one integer whose order is that of the candidates: by score, then by the tie rule. The
// score must be finite. 0, which no candidate packs to, stands for none.
__device__ __forceinline__ uint64_t pack_candidate(float score, i32 key, u32 tie) {
    u32 bits = __float_as_uint(score + 0.0f);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 32 | (tie == TIE_LAST ? u32(key) : ~u32(key));
}

// Updates the running maxima of a lane's rows g and g + 8 with its scores; number(n, e) is the key of column 2t + e of
// group n.
template <int NT, class Number>
__device__ __forceinline__ void update_top1(const float (&acc)[NT][4], const Range (&row_ranges)[2], u32 tie,
                                            float (&top)[2], i32 (&key)[2], Number number) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int c = 0; c < 4; c++) {
            i32 j = number(n, c % 2);
            float s = acc[n][c], &greatest = top[c / 2];
            i32 &current = key[c / 2];
            bool open = j >= row_ranges[c / 2].lo && j < row_ranges[c / 2].hi && s < GD_INFINITY;
            if (open && (s > greatest || (s == greatest && current >= 0 && wins_tie(j, current, tie))))
                greatest = s, current = j;
        }
    }
}

// Shared state of a block: key ranges of its rows, their union, and the packed winner of every warp and row.
template <int ROWS> struct DecodeState {
    Range row[ROWS];
    Range all;
    uint64_t winners[DECODE_WARPS][ROWS];
    u32 arrived;
};

// The rows of a block, and the addresses of the keys of their KV head.
template <class T> struct DecodeRows {
    static constexpr int ROWS = 16;
    const DecodeParams &p;
    const T *q;
    const i32 *pages;
    u32 split, row_tile, first, b, h0, kv;

    __device__ __forceinline__ DecodeRows(const DecodeParams &p, const T *q, const i32 *pages)
        : p(p), q(q), pages(pages) {
        u32 groups_per_batch = p.q_heads / p.pack;
        split = blockIdx.x % p.splits, row_tile = blockIdx.x / p.splits;
        first = row_tile % p.row_tiles * ROWS, b = row_tile / p.row_tiles / groups_per_batch;
        h0 = row_tile / p.row_tiles % groups_per_batch * p.pack, kv = h0 / (p.q_heads / p.kv_heads);
    }
    __device__ __forceinline__ bool exists(u32 r) const { return first + r < p.queries * p.pack; }
    __device__ __forceinline__ u32 head(u32 r) const { return h0 + (first + r) % p.pack; }
    __device__ __forceinline__ const T *query(u32 r) const {
        return q + size_t(b) * p.q_batch + size_t(head(r)) * p.q_head + size_t((first + r) / p.pack) * p.q_row;
    }
    // The page of key j (without pages: the batch entry), and the key's row in it. An invalid entry of the block table
    // is clamped to the last page, so that an unchecked table cannot cause an access outside of the cache.
    __device__ __forceinline__ u32 page(u32 j) const {
        return p.page_keys ? min(u32(pages[size_t(b) * p.table_row + j / p.page_keys]), p.pages - 1) : b;
    }
    __device__ __forceinline__ u32 page_offset(u32 j) const { return p.page_keys ? j % p.page_keys : j; }
    // The index of key j in the biases of all pages.
    __device__ __forceinline__ size_t bias_at(u32 j) const {
        return (size_t(page(j)) * p.kv_heads + kv) * p.bias_row + page_offset(j);
    }
    __device__ __forceinline__ const T *key(const T *k, u32 j) const {
        return k + size_t(page(j)) * p.k_batch + size_t(kv) * p.k_head + size_t(page_offset(j)) * p.k_row;
    }
    // Number of valid rows in the page of key j.
    __device__ __forceinline__ u32 page_rows(u32 j) const {
        return p.page_keys ? min(p.page_keys, p.keys - j + page_offset(j)) : p.keys;
    }
    // A bias with the prior of a key.
    __device__ __forceinline__ float with_prior(float bias, const float *prior, float scale, u32 j) const {
        return p.prior_batch && j < p.keys ? fmaf(prior[prior_offset(p, b, h0) + j], scale, bias) : bias;
    }

    // Computes the key ranges of the rows; ends with a barrier.
    __device__ __forceinline__ void fill(DecodeState<ROWS> &state, const i32 *table) const {
        if (threadIdx.x == 0) state.all = {i32(p.keys), 0};
        __syncthreads();
        if (threadIdx.x < ROWS) {
            Range r = {0, 0};
            if (exists(threadIdx.x)) r = visible_keys(p.mask, table, b, (first + threadIdx.x) / p.pack);
            state.row[threadIdx.x] = r;
            if (r.lo < r.hi) {
                atomicMin(&state.all.lo, r.lo);
                atomicMax(&state.all.hi, r.hi);
            }
        }
        __syncthreads();
    }

    // The range of tiles of `size` keys that this block scans.
    __device__ __forceinline__ Range tiles(Range all, i32 size) const {
        i32 from = all.lo / size, count = max((all.hi + size - 1) / size - from, 0);
        i32 share = (count + i32(p.splits) - 1) / i32(p.splits);
        return {from + min(share * i32(split), count), from + min(share * i32(split + 1), count)};
    }
};

// Merges the winner of every row over the warps and into the workspace; ends with a barrier.
template <int ROWS>
__device__ __forceinline__ void merge_top1(DecodeState<ROWS> &state, const float (&top)[2], const i32 (&key)[2],
                                           u32 tie, uint64_t *rows) {
    u32 warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint64_t code = key[half] >= 0 ? pack_candidate(top[half], key[half], tie) : 0;
#pragma unroll
        for (int step = 1; step < (GD_FAULT(18) ? 2 : 4); step *= 2) {
            uint64_t high = __shfl_xor_sync(ALL, u32(code >> 32), step), low = __shfl_xor_sync(ALL, u32(code), step);
            uint64_t other = high << 32 | low;
            code = other > code ? other : code;
        }
        if (t == 0) state.winners[warp][half * 8 + g] = code;
    }
    if (!GD_FAULT(19)) __syncthreads();
    if (threadIdx.x < ROWS) {
        uint64_t code = 0;
        for (int w = 0; w < DECODE_WARPS; w++)
            code = state.winners[w][threadIdx.x] > code ? state.winners[w][threadIdx.x] : code;
        if (code) atomicMax(reinterpret_cast<unsigned long long *>(rows + threadIdx.x), (unsigned long long)(code));
        __threadfence();
    }
    __syncthreads();
}

// Whether this block is the last of its row tile to arrive. The results of the other blocks are then visible to it.
template <int ROWS> __device__ __forceinline__ bool is_last_block(DecodeState<ROWS> &state, u32 *counter, u32 splits) {
    if (threadIdx.x == 0) state.arrived = atomicAdd(counter, 1u);
    __syncthreads();
    if (state.arrived != (GD_FAULT(20) ? 0 : splits - 1)) return false;
    __threadfence();
    return true;
}

// The keys of a KV head in a cache.
template <class T> struct CachedRows {
    const DecodeRows<T> &at;
    const T *k;

    __device__ __forceinline__ const T *row(u32 j) const { return at.key(k, j); }
};

// Writes index, energy and value row of the winners; ends with a barrier.
template <class T>
__device__ __forceinline__ void write_winners(const DecodeRows<T> &at, const DecodeState<DecodeRows<T>::ROWS> &state,
                                              const T *k, const float *beta, const float *prior, const T *v,
                                              const float *threshold, const uint64_t *rows, i32 *index, float *energy,
                                              T *y) {
    const DecodeParams &p = at.p;
    CommonOffset offset = unknown_offset();
    for (u32 r = threadIdx.x / 32; r < at.ROWS; r += DECODE_WARPS) {
        if (!at.exists(r)) continue;
        uint64_t code = *reinterpret_cast<const volatile uint64_t *>(rows + r);
        i32 winner = code ? i32(p.tie == TIE_LAST ? u32(code) : ~u32(code)) : -1;
        u32 h = at.head(r);
        CachedRows<T> keys = {at, k};
        float e = admit_winner(this_thread(), p, at.b, h, winner, at.query(r), keys, state.row[r], offset, beta,
                               prior, threshold);
        u32 j = u32(max(winner, 0));
        size_t out = (size_t(at.b) * p.q_heads + h) * p.queries + (at.first + r) / p.pack;
        const T *value =
            v + size_t(at.page(j)) * p.v_batch + size_t(at.kv) * p.v_head + size_t(at.page_offset(j)) * p.v_row;
        write_winner(this_thread(), out, winner, e, value, p.value_dim, index, energy, y);
    }
    __syncthreads();
}

template <class T, int DP>
__device__ __forceinline__ void decode(const DecodeParams &p, const T *q, const T *k, const float *bias,
                                       const float *beta, const float *prior, const i32 *table, const i32 *pages,
                                       const T *v, const float *threshold, uint64_t *winners, u32 *counter, i32 *index,
                                       float *energy, T *y) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = S::KEYS, TILE = KEYS * S::PITCH, NT = KEYS / 8 / DECODE_WARPS, ROWS = DecodeRows<T>::ROWS;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(DecodeState<ROWS>, state);
    u32 warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4;
    DecodeRows<T> at(p, q, pages);
    at.fill(state, table);

    T *tiles = reinterpret_cast<T *>(shared);
    float *biases = reinterpret_cast<float *>(tiles + 2 * TILE);
    // Every warp holds all rows.
    S scoring;
    scoring.load_queries(reinterpret_cast<T *>(biases + 2 * KEYS), p.head_dim, p.vector_loads, warp == 0,
                         [&](u32 r) { return at.exists(r) ? at.query(r) : nullptr; });

    Range block_tiles = at.tiles(state.all, KEYS);
    float scale = (p.score == SCORE_DOT ? 1.0f : 0.5f) / beta[at.h0];
    auto load = [&](i32 tile) {
        u32 j = u32(tile) * KEYS, row = at.page_offset(j), stage = u32(tile) % 2;
        Source<T> keys = {at.key(k, j) - size_t(row) * p.k_row, p.k_row, at.page_rows(j), p.head_dim,
                          p.vector_loads != 0};
        load_rows<T, DP, KEYS>(tiles + stage * TILE, keys, row);
        load_bias<KEYS>(biases + stage * KEYS, bias, at.bias_at(j));
        copy_commit();
    };
    float top[2] = {-GD_INFINITY, -GD_INFINITY};
    i32 key[2] = {-1, -1};
    Range row_ranges[2] = {state.row[g], state.row[g + 8]};
    if (block_tiles.lo < block_tiles.hi) load(block_tiles.lo);
    for (i32 tile = block_tiles.lo; tile < block_tiles.hi; tile++) {
        if (tile + 1 < block_tiles.hi) {
            load(tile + 1);
            if (!GD_FAULT(16)) copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        if (!GD_FAULT(17)) __syncthreads();
        const T *keys = tiles + u32(tile) % 2 * TILE;
        const float *norms = biases + u32(tile) % 2 * KEYS + warp * NT * 8;
        i32 start = tile * KEYS + i32(warp) * NT * 8;
        float acc[1][NT][4];
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 x = n * 8 + 2 * t + e;
                acc[0][n][e] = acc[0][n][2 + e] = at.with_prior(norms[x], prior, scale, u32(start) + x);
            }
        }
        scoring.template scores<NT>(keys, warp * NT * 8, acc);
        update_top1(acc[0], row_ranges, p.tie, top, key, [&](int n, int e) { return start + n * 8 + i32(2 * t) + e; });
        __syncthreads();
    }

    uint64_t *rows = winners + size_t(at.row_tile) * ROWS;
    merge_top1(state, top, key, p.tie, rows);
    if (!is_last_block(state, counter + at.row_tile, p.splits)) return;
    write_winners(at, state, k, beta, prior, v, threshold, rows, index, energy, y);
    // The workspace is zero again for the next launch.
    if (threadIdx.x < ROWS) rows[threadIdx.x] = 0;
    if (threadIdx.x == 0) counter[at.row_tile] = 0;
}
