// Decoding: a few queries against a long cache. The keys of a row are split over blocks; inside a block every
// warp takes its own keys of a tile. Each block enters its best key of every row by an integer maximum, and
// the last one to come writes index, energy and value row. The scores are those of the scan, and so is the
// result.
#pragma once
#include "../shared/mask.h"
#include "tile.cuh"

// Warps of a block.
constexpr int DECODE_WARPS = 4;

// Score and key as one number that is greater for the better: 0 for none. Needs a finite score.
__device__ __forceinline__ uint64_t ranked(float score, i32 key, u32 last) {
    u32 bits = __float_as_uint(score + 0.0f);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 32 | (last ? u32(key) : ~u32(key));
}

// What a block shares.
template <int ROWS> struct Decoding {
    Range row[ROWS];
    Range all;
    uint64_t best[DECODE_WARPS][ROWS];
    u32 arrived;
};

template <class T, int DP>
__device__ __forceinline__ void decode(const DecodeParams &p, const T *q, const T *k, const float *bias,
                                       const float *beta, const float *prior, const i32 *table,
                                       const i32 *pages, const T *v, const float *threshold, uint64_t *best,
                                       u32 *counter, i32 *index, float *energy, T *y) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = S::KEYS, TILE = KEYS * S::PITCH, NT = KEYS / 8 / DECODE_WARPS, ROWS = 16;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(Decoding<ROWS>, state);
    u32 warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    u32 split = blockIdx.x % p.splits, place = blockIdx.x / p.splits;
    u32 first = place % p.row_tiles * ROWS, each = p.q_heads / p.pack, b = place / p.row_tiles / each;
    u32 h0 = place / p.row_tiles % each * p.pack, kv = h0 / (p.q_heads / p.kv_heads);
    auto exists = [&](u32 r) { return first + r < p.queries * p.pack; };
    auto head = [&](u32 r) { return h0 + (first + r) % p.pack; };
    auto query = [&](u32 r) {
        return q + size_t(b) * p.q_batch + size_t(head(r)) * p.q_head +
               size_t((first + r) / p.pack) * p.q_row;
    };
    // The page of a key, or the batch entry, and the key's row in it.
    auto piece = [&](u32 j) {
        return p.page_keys ? u32(pages[size_t(b) * p.table_row + j / p.page_keys]) : b;
    };
    auto inside = [&](u32 j) { return p.page_keys ? j % p.page_keys : j; };

    if (threadIdx.x == 0) state.all = {i32(p.keys), 0};
    __syncthreads();
    if (threadIdx.x < ROWS) {
        Range r = {0, 0};
        if (exists(threadIdx.x)) r = visible(p.mask, table, b, (first + threadIdx.x) / p.pack);
        state.row[threadIdx.x] = r;
        if (r.lo < r.hi) {
            atomicMin(&state.all.lo, r.lo);
            atomicMax(&state.all.hi, r.hi);
        }
    }
    __syncthreads();

    T *tiles = reinterpret_cast<T *>(shared);
    float *biases = reinterpret_cast<float *>(tiles + 2 * TILE);
    // Every warp holds all rows.
    S scoring;
    scoring.load_queries(reinterpret_cast<T *>(biases + 2 * KEYS), p.head_dim, p.aligned, warp == 0,
                         [&](u32 r) { return exists(r) ? query(r) : nullptr; });

    i32 from = state.all.lo / KEYS, count = max((state.all.hi + KEYS - 1) / KEYS - from, 0);
    i32 share = (count + i32(p.splits) - 1) / i32(p.splits);
    i32 begin = from + min(share * i32(split), count), end = from + min(share * i32(split + 1), count);
    float scale = (p.score ? 1.0f : 0.5f) / beta[h0];
    auto load = [&](i32 tile) {
        u32 j = u32(tile) * KEYS, row = inside(j), stage = u32(tile) % 2;
        Source<T> keys = {k + size_t(piece(j)) * p.k_batch + size_t(kv) * p.k_head, p.k_row,
                          p.page_keys ? min(p.page_keys, p.keys - j + row) : p.keys, p.head_dim,
                          p.aligned != 0};
        load_rows<T, DP, KEYS>(tiles + stage * TILE, keys, row);
        const float *norms = bias + (size_t(piece(j)) * p.kv_heads + kv) * p.bias_row;
        load_bias<KEYS>(biases + stage * KEYS, norms, row);
        copy_commit();
    };
    float top[2] = {-GD_INFINITY, -GD_INFINITY};
    i32 key[2] = {-1, -1};
    Range own[2] = {state.row[g], state.row[g + 8]};
    if (begin < end) load(begin);
    for (i32 tile = begin; tile < end; tile++) {
        if (tile + 1 < end) {
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
                float x = norms[n * 8 + 2 * t + e];
                u32 j = u32(start) + n * 8 + 2 * t + e;
                if (p.prior_batch && j < p.keys) x = fmaf(prior[prior_at(p, b, h0) + j], scale, x);
                acc[0][n][e] = acc[0][n][2 + e] = x;
            }
        }
        scoring.template scores<NT>(keys, warp * NT * 8, acc);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                i32 j = start + n * 8 + i32(2 * t) + c % 2;
                float s = acc[0][n][c], &most = top[c / 2];
                i32 &held = key[c / 2];
                bool open = j >= own[c / 2].lo && j < own[c / 2].hi && s < GD_INFINITY;
                if (open && (s > most || (s == most && held >= 0 && before(j, held, p.last))))
                    most = s, held = j;
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint64_t code = key[half] >= 0 ? ranked(top[half], key[half], p.last) : 0;
#pragma unroll
        for (int step = 1; step < (GD_FAULT(18) ? 2 : 4); step *= 2) {
            uint64_t high = __shfl_xor_sync(ALL, u32(code >> 32), step),
                     low = __shfl_xor_sync(ALL, u32(code), step);
            uint64_t other = high << 32 | low;
            code = other > code ? other : code;
        }
        if (t == 0) state.best[warp][half * 8 + g] = code;
    }
    if (!GD_FAULT(19)) __syncthreads();
    uint64_t *rows = best + size_t(place) * ROWS;
    if (threadIdx.x < ROWS) {
        uint64_t code = 0;
        for (int w = 0; w < DECODE_WARPS; w++)
            code = state.best[w][threadIdx.x] > code ? state.best[w][threadIdx.x] : code;
        if (code)
            atomicMax(reinterpret_cast<unsigned long long *>(rows + threadIdx.x), (unsigned long long)(code));
        __threadfence();
    }
    __syncthreads();
    if (threadIdx.x == 0) state.arrived = atomicAdd(counter + place, 1u);
    __syncthreads();
    if (state.arrived != (GD_FAULT(20) ? 0 : p.splits - 1)) return;
    __threadfence();
    for (u32 r = warp; r < ROWS; r += DECODE_WARPS) {
        if (!exists(r)) continue;
        uint64_t code = *reinterpret_cast<volatile uint64_t *>(rows + r);
        i32 winner = code ? i32(p.last ? u32(code) : ~u32(code)) : -1;
        u32 h = head(r);
        float e = GD_INFINITY;
        if (winner >= 0) {
            const T *row = k + size_t(piece(winner)) * p.k_batch + size_t(kv) * p.k_head +
                           size_t(inside(winner)) * p.k_row;
            float x = p.prior_batch ? prior[prior_at(p, b, h) + winner] : 0.0f;
            e = pair_energy(p.score, beta[h], x, query(r), row, p.head_dim);
            bool admitted = finite(e) && !(threshold && e > threshold[h]);
            if (!admitted) winner = -1, e = GD_INFINITY;
        }
        size_t out = (size_t(b) * p.q_heads + h) * p.queries + (first + r) / p.pack;
        if (lane == 0) index[out] = winner, energy[out] = e;
        u32 j = u32(max(winner, 0));
        const T *value =
            v + size_t(piece(j)) * p.v_batch + size_t(kv) * p.v_head + size_t(inside(j)) * p.v_row;
        for (u32 d = lane; d < p.value_dim; d += 32)
            y[out * p.value_dim + d] = winner >= 0 ? value[d] : T{};
    }
    // The workspace is zero again for the next launch.
    __syncthreads();
    if (threadIdx.x < ROWS) rows[threadIdx.x] = 0;
    if (threadIdx.x == 0) counter[place] = 0;
}
