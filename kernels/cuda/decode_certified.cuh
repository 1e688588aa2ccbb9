// Decoding with 8-bit keys: as decode.cuh, but the blocks read a quarter or half of the bytes of a key, as integers
// with a bound of the score's error. A key whose upper bound reaches the greatest lower bound so far becomes a
// candidate of its row; the last block scores the candidates of all blocks that still can win, exactly. Where
// candidates find no room they are scored at once, so that no number of them makes the result another one than that
// of the native scan.
#pragma once
#include "int8_bounds.cuh"
#include "decode.cuh"

// Entries of a warp's list: a tile adds 256 at most.
constexpr u32 SIEVE = 256;

// A candidate: key and row as key * 16 + row.
struct Candidate {
    float upper;
    u32 place;
};

// A number as an integer of the same order; 0 is below all of them.
__device__ __forceinline__ u32 ordered(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float number(u32 x) {
    return x ? __uint_as_float(x ^ (x >> 31 ? 0x80000000u : 0xffffffffu)) : -GD_INFINITY;
}

// What a block shares beside the state of decoding.
struct Sieve {
    Known row[16];
    // The greatest lower bound of every row, ordered.
    u32 bar[16];
};

// The memory of a place between blocks, zeros before and after a launch but for the candidates.
struct Places {
    uint64_t *best;    // [places, 16]
    u32 *lower;        // [places, 16], ordered
    u32 *counter;      // [places, 2]: blocks that have come, candidates
    Candidate *listed; // [places, capacity]
};

// A warp's candidates, and what exact scores have found.
template <class T, int DP> struct Sifted {
    using S = typename Scoring<T>::template Of<DP, 1>;
    const Step<T> &at;
    T *queries;
    const T *k;
    const float4 *known;
    const float *prior;
    float scale;
    Sieve &sieve;
    Candidate *list;
    T *gathered;
    Range own[2];
    u32 count = 0;
    float top[2] = {-GD_INFINITY, -GD_INFINITY};
    i32 key[2] = {-1, -1};

    __device__ __forceinline__ Sifted(const Step<T> &at, T *queries, const T *k, const float4 *known,
                                      const float *prior, float scale, Sieve &sieve, Candidate *list, T *gathered,
                                      const Range *rows)
        : at(at), queries(queries), k(k), known(known), prior(prior), scale(scale), sieve(sieve), list(list),
          gathered(gathered), own{rows[lane_id() / 4], rows[lane_id() / 4 + 8]} {}

    // The rows for exact scores; in f32 one warp stores them first.
    static __device__ __forceinline__ void load(S &scoring, const Step<T> &at, T *queries, bool store) {
        scoring.load_queries(queries, at.p.head_dim, at.p.vector_loads, store,
                             [&](u32 r) { return at.exists(r) ? at.query(r) : nullptr; });
    }

    __device__ __forceinline__ float bar(u32 row) const {
        return number(*const_cast<const volatile u32 *>(&sieve.bar[row]));
    }

    // Raises the bars of the lane's two rows to the greatest of the four lanes that share them.
    __device__ __forceinline__ void raise(const float (&least)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x = least[half];
            x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
            x = fmaxf(x, __shfl_xor_sync(ALL, x, 2));
            u32 row = lane_id() / 4 + 8 * half;
            if (lane_id() % 4 == 0 && x > bar(row)) atomicMax(&sieve.bar[row], ordered(x));
        }
        __syncwarp();
    }

    // Leaves out what a bar has passed.
    __device__ __forceinline__ void tighten() {
        u32 kept = 0;
        __syncwarp();
        for (u32 from = 0; from < count; from += 32) {
            u32 e = from + lane_id();
            Candidate x = e < count ? list[e] : Candidate{0.0f, 0};
            bool stays = e < count && !(x.upper < bar(x.place % 16));
            u32 vote = __ballot_sync(ALL, stays);
            if (stays) list[kept + __popc(vote & ((1u << lane_id()) - 1))] = x;
            kept += __popc(vote);
            __syncwarp();
        }
        count = kept;
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
            auto number = [&](u32 x) { return list[from + min(x, left - 1)].place / 16; };
            gather_rows<T, DP>(gathered, left, p.head_dim, p.vector_loads != 0,
                               [&](u32 x) { return at.key(k, number(x)); });
            float acc[1][NT][4];
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    u32 j = number(n * 8 + 2 * t + e);
                    acc[0][n][e] = acc[0][n][2 + e] = at.with_prior(known[at.bias_at(j)].w, prior, scale, j);
                }
            }
            scoring.template scores<NT>(gathered, 0, acc);
            take_best(acc[0], own, p.tie, top, key, [&](int n, int e) {
                u32 x = n * 8 + 2 * t + e;
                return x < left ? i32(number(x)) : -1;
            });
            raise(top);
        }
    }

    // Room for `more` candidates.
    __device__ __forceinline__ void make_room(u32 more) {
        if (count + more <= SIEVE) return;
        tighten();
        if (count + more <= SIEVE) return;
        if (!GD_FAULT(82)) rescore(0);
        count = 0;
    }
};

template <class T, int DP>
__device__ __forceinline__ void decode_certified(const DecodeParams &p, const T *q, const T *k, const int8_t *codes,
                                                 const float4 *known, const float *beta, const float *prior,
                                                 const i32 *table, const i32 *pages, const T *v, const float *threshold,
                                                 const Places &places, i32 *index, float *energy, T *y) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = 64, PITCH = Integers<DP>::PITCH, TILE = KEYS * PITCH, NT = KEYS / 8 / DECODE_WARPS;
    constexpr int ROWS = 16, GATHERED = Gather<T>::KEYS * S::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(Decoding<ROWS>, state);
    GD_SHARED(Sieve, sieve);
    u32 warp = threadIdx.x / 32, lane = lane_id(), g = lane / 4, t = lane % 4;
    Step<T> at(p, q, pages);
    u32 *lower = places.lower + size_t(at.place) * ROWS, *counter = places.counter + size_t(at.place) * 2;
    Candidate *listed = places.listed + size_t(at.place) * p.candidate_capacity;
    // What blocks before this one have found, if any have.
    if (threadIdx.x < ROWS) sieve.bar[threadIdx.x] = const_cast<volatile u32 *>(lower)[threadIdx.x];
    at.fill(state, table);

    int8_t *tiles = reinterpret_cast<int8_t *>(shared);
    float4 *knowns = reinterpret_cast<float4 *>(tiles + 2 * TILE);
    Candidate *lists = reinterpret_cast<Candidate *>(knowns + 2 * KEYS);
    T *gathered = reinterpret_cast<T *>(lists + DECODE_WARPS * SIEVE);
    int8_t *rows = reinterpret_cast<int8_t *>(gathered + DECODE_WARPS * GATHERED);
    auto row = [&](u32 r) { return at.exists(r) ? at.query(r) : nullptr; };
    T *queries = reinterpret_cast<T *>(rows + 16 * PITCH);
    S scoring;
    Sifted<T, DP>::load(scoring, at, queries, warp == 0);
    quantize_rows<T, DP>(rows, sieve.row, p.head_dim, warp, DECODE_WARPS, row);
    Integers<DP> integers;
    integers.load(rows);
    Known query[2] = {sieve.row[g], sieve.row[g + 8]};
    float rounded = rounding(p.head_dim), coarse = coarseness(sieve.row) + rounded;

    Range own_tiles = at.tiles(state.all, KEYS);
    float scale = (p.score == SCORE_DOT ? 1.0f : 0.5f) / beta[at.h0];
    u32 width = (p.head_dim + 15) / 16 * 16;
    auto load = [&](i32 tile) {
        u32 j = u32(tile) * KEYS, row = at.inside(j), stage = u32(tile) % 2;
        size_t first = at.bias_at(j);
        Source<int8_t> keys = {codes + (first - row) * width, width, at.piece_rows(j), width, true};
        load_rows<int8_t, DP, KEYS>(tiles + stage * TILE, keys, row);
        if (threadIdx.x < KEYS) copy_async(knowns + stage * KEYS + threadIdx.x, known + first + threadIdx.x, 16);
        copy_commit();
    };
    Range own[2] = {state.row[g], state.row[g + 8]};
    Sifted<T, DP> sifted(at, queries, k, known, prior, scale, sieve, lists + warp * SIEVE, gathered + warp * GATHERED,
                         state.row);
    if (own_tiles.lo < own_tiles.hi) load(own_tiles.lo);
    for (i32 tile = own_tiles.lo; tile < own_tiles.hi; tile++) {
        if (tile + 1 < own_tiles.hi) {
            load(tile + 1);
            copy_wait<1>();
        } else {
            copy_wait<0>();
        }
        __syncthreads();
        int first = int(warp) * NT * 8;
        i32 start = tile * KEYS + first;
        const float4 *about = knowns + u32(tile + (GD_FAULT(81) ? 1 : 0)) % 2 * KEYS + first;
        i32 product[NT][4] = {};
        integers.template scores<NT>(tiles + u32(tile) % 2 * TILE, first, product);
        float upper[NT][4], least[2] = {-GD_INFINITY, -GD_INFINITY};
        u32 open = 0;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                u32 x = n * 8 + 2 * t + e;
                i32 j = start + i32(x);
                float4 key = about[x];
                KeyBound bound(key, at.with_prior(key.w, prior, scale, u32(j)), coarse, rounded);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int c = 2 * half + e;
                    float s = query[half].scale * bound.scale, f = float(product[n][c]);
                    upper[n][c] = fmaf(s, f, fmaf(query[half].norm, bound.error, bound.most));
                    Range seen = own[half];
                    bool visible = j >= seen.lo && j < (GD_FAULT(84) ? seen.hi + 1 : seen.hi);
                    if (!visible || !bound.open) continue;
                    open |= 1u << (n * 4 + c);
                    // fmaxf leaves NaN out.
                    least[half] = fmaxf(least[half], fmaf(s, f, fmaf(-query[half].norm, bound.error, bound.least)));
                }
            }
        }
        sifted.raise(least);
        float bar[2] = {sifted.bar(g), sifted.bar(g + 8)};
        u32 hits = 0;
#pragma unroll
        for (int x = 0; x < NT * 4; x++)
            if (open >> x & 1 && !(upper[x / 4][x % 4] < bar[x % 4 / 2])) hits |= 1u << x;
        if (__any_sync(ALL, hits != 0)) {
            u32 total = 0;
#pragma unroll
            for (int x = 0; x < NT * 4; x++)
                total += __popc(__ballot_sync(ALL, hits >> x & 1));
            sifted.make_room(total);
#pragma unroll
            for (int x = 0; x < NT * 4; x++) {
                u32 vote = __ballot_sync(ALL, hits >> x & 1);
                u32 j = u32(start) + x / 4 * 8 + 2 * t + x % 2;
                if (hits >> x & 1)
                    sifted.list[sifted.count + __popc(vote & ((1u << lane) - 1))] = {upper[x / 4][x % 4],
                                                                                     j * 16 + g + (x % 4 / 2) * 8};
                sifted.count += __popc(vote);
            }
        }
        __syncthreads();
    }

    // The bars of all warps go to the other blocks, and theirs come back.
    if (threadIdx.x < ROWS) {
        u32 mine = sieve.bar[threadIdx.x];
        u32 theirs = atomicMax(lower + threadIdx.x, mine);
        sieve.bar[threadIdx.x] = max(mine, theirs);
    }
    __syncthreads();
    sifted.tighten();
    u32 to = lane == 0 && sifted.count ? atomicAdd(counter + 1, sifted.count) : 0;
    to = __shfl_sync(ALL, to, 0);
    u32 fit = to < p.candidate_capacity ? min(p.candidate_capacity - to, sifted.count) : 0;
    for (u32 e = lane; e < fit; e += 32)
        listed[to + e] = sifted.list[e];
    if (!GD_FAULT(85)) sifted.rescore(fit);
    // What exact scores have raised.
    if (lane < ROWS) atomicMax(lower + lane, *const_cast<volatile u32 *>(&sieve.bar[lane]));
    __threadfence();
    uint64_t *best = places.best + size_t(at.place) * ROWS;
    enter_best(state, sifted.top, sifted.key, p.tie, best);
    if (!last_to_come(state, counter, p.splits)) return;

    if (threadIdx.x < ROWS) sieve.bar[threadIdx.x] = const_cast<volatile u32 *>(lower)[threadIdx.x];
    __syncthreads();
    u32 total = const_cast<volatile u32 *>(counter)[1];
    if (total > p.candidate_capacity) total = p.candidate_capacity;
    sifted.count = 0;
    for (u32 from = warp * 32; from < total; from += 32 * DECODE_WARPS) {
        const volatile Candidate &x = listed[min(from + lane, total - 1)];
        Candidate one = {x.upper, x.place};
        bool stays = from + lane < total && !(one.upper < sifted.bar(one.place % 16));
        u32 vote = __ballot_sync(ALL, stays);
        sifted.make_room(__popc(vote));
        if (stays) sifted.list[sifted.count + __popc(vote & ((1u << lane) - 1))] = one;
        sifted.count += __popc(vote);
    }
    sifted.tighten();
    sifted.rescore(0);
    enter_best(state, sifted.top, sifted.key, p.tie, best);
    write_winners(at, k, beta, prior, v, threshold, best, index, energy, y);
    if (threadIdx.x < ROWS) best[threadIdx.x] = 0, lower[threadIdx.x] = 0;
    if (threadIdx.x < 2) counter[threadIdx.x] = 0;
}
