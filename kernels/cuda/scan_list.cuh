// The scan for several candidates: every row keeps a list of 64, or for more than 32 candidates of 128, in shared
// memory. Only scores above that of its K-th entry are appended; when there is no room, the best K stay.
#pragma once
#include "scan.cuh"

// The bit that marks a protected key in a list.
constexpr i32 PROTECTED = 1 << 30;

// Entries of a list.
__device__ __forceinline__ u32 list_room(u32 candidates) { return candidates > 32 ? 128 : 64; }

// The list of a row, one of a warp's.
struct List {
    float *score;
    i32 *key;
    u32 room;

    __device__ __forceinline__ List(float *lists, u32 row, u32 room)
        : score(lists + size_t(row) * 2 * room), key(reinterpret_cast<i32 *>(score + room)), room(room) {}
};

// Whether entry x goes before entry y: by value (rising or falling), then by key.
__device__ __forceinline__ bool ahead(float x, i32 i, float y, i32 j, bool rising, u32 last) {
    if (x != y) return rising ? x < y : x > y;
    return before(i & ~PROTECTED, j & ~PROTECTED, last);
}

// Sorts the first `count` entries, at most 32 EACH, and keeps the first `keep`; by a warp, no NaN among the scores.
template <int EACH>
__device__ __forceinline__ void sort_entries(const List &list, u32 count, u32 keep, bool rising, u32 last) {
    __syncwarp();
    float score[EACH];
    i32 key[EACH];
    u32 rank[EACH] = {};
#pragma unroll
    for (u32 x = 0; x < EACH; x++) {
        u32 e = lane_id() + 32 * x;
        score[x] = e < count ? list.score[e] : 0.0f;
        key[x] = e < count ? list.key[e] : -1;
    }
    for (u32 e = 0; e < count; e++) {
        float s = list.score[e];
        i32 j = list.key[e];
#pragma unroll
        for (u32 x = 0; x < EACH; x++)
            rank[x] += ahead(s, j, score[x], key[x], rising, last);
    }
    if (!GD_FAULT(12)) __syncwarp();
#pragma unroll
    for (u32 x = 0; x < EACH; x++) {
        if (lane_id() + 32 * x < count && rank[x] < keep)
            list.score[rank[x]] = score[x], list.key[rank[x]] = key[x];
    }
    if (!GD_FAULT(13)) __syncwarp();
}
__device__ __forceinline__ void sort_list(const List &list, u32 count, u32 keep, bool rising, u32 last) {
    // Where the room is known to be 64, the other branch is not compiled.
    if (list.room <= 64 || count <= 64)
        sort_entries<2>(list, count, keep, rising, last);
    else
        sort_entries<4>(list, count, keep, rising, last);
}

// Adds the protected keys that the row sees to its `count` candidates and marks them; returns the new count.
__device__ __forceinline__ u32 add_protected(const List &list, u32 count, const ScanParams &p, const i32 *keys,
                                             Range seen) {
    for (u32 x = 0; x < p.protected_slots; x++) {
        i32 j = keys[x];
        bool known = false;
        for (u32 e = lane_id(); e < count; e += 32) {
            if ((list.key[e] & ~PROTECTED) == j) {
                list.key[e] = j | PROTECTED;
                known = true;
            }
        }
        if (j < seen.lo || j >= seen.hi || __any_sync(ALL, known)) continue;
        if (lane_id() == 0) list.key[count] = j | PROTECTED;
        count++;
        __syncwarp();
    }
    return count;
}

// The lists of the 16 rows of a warp. A lane knows of rows g and g + 8 the score that a new entry has to exceed and
// the number of entries, the same in the four lanes that share a row.
struct ListRows {
    float *lists;
    u32 room;
    float bar[2];
    u32 count[2];

    __device__ __forceinline__ ListRows(float *lists, u32 room) : lists(lists), room(room) {
        bar[0] = bar[1] = -GD_INFINITY;
        count[0] = count[1] = 0;
    }

    // Appends what exceeds the bars; acc are the scores of 32 keys from `start` on.
    __device__ __forceinline__ void offer(const float (&acc)[4][4], i32 start, const ScanParams &p) {
        u32 lane = lane_id(), g = lane / 4, quad = 0xfu << (lane & 28), below = (1u << lane) - 1;
        float top[2] = {-GD_INFINITY, -GD_INFINITY};
#pragma unroll
        for (int n = 0; n < 4; n++) {
            top[0] = fmaxf(top[0], fmaxf(acc[n][0], acc[n][1]));
            top[1] = fmaxf(top[1], fmaxf(acc[n][2], acc[n][3]));
        }
        // Most groups improve nothing.
        if (!__any_sync(ALL, top[0] > bar[0] || top[1] > bar[1])) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 hits[8], total = 0;
#pragma unroll
            for (int x = 0; x < 8; x++) {
                float s = acc[x / 2][2 * half + x % 2];
                hits[x] = __ballot_sync(ALL, s > bar[half] && s < GD_INFINITY) & quad;
                total += __popc(hits[x]);
            }
            u32 full = __ballot_sync(ALL, count[half] + total > (GD_FAULT(14) ? room + 8 : room));
            for (; full; full &= ~(0xfu << ((__ffs(full) - 1) & 28))) {
                u32 r = (__ffs(full) - 1) / 4, entries = __shfl_sync(ALL, count[half], r * 4);
                List list(lists, half * 8 + r, room);
                sort_list(list, entries, p.candidates, false, p.last);
                if (g == r) {
                    count[half] = min(entries, p.candidates);
                    if (entries >= p.candidates) bar[half] = list.score[p.candidates - 1];
                }
            }
            List list(lists, half * 8 + g, room);
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
    __device__ __forceinline__ void write(const ScanParams &p, const Block &at, const Seen &seen, u32 first,
                                          const T *q, const Source<T> &keys, const float *beta,
                                          const float *prior, i32 *index, float *energy,
                                          const i32 *protected_keys, uint8_t *flags) {
        u32 lane = lane_id();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            for (u32 r = 0; r < 8; r++) {
                u32 row = first + half * 8 + r, h = at.head(p, row);
                u32 entries = __shfl_sync(ALL, count[half], r * 4);
                if (!at.exists(p, row)) continue;
                List list(lists, half * 8 + r, room);
                sort_list(list, entries, p.candidates, false, p.last);
                entries = min(entries, p.candidates);
                if (p.protected_slots) {
                    size_t places = size_t(at.b % p.protected_batch) * p.protected_heads +
                                    h / (p.q_heads / p.protected_heads);
                    places = places * p.protected_queries + at.query(p, row) % p.protected_queries;
                    entries = add_protected(list, entries, p, protected_keys + places * p.protected_slots,
                                            seen.row[row]);
                }
                // Scores give way to energies, which decide the order.
                const T *query = query_row(p, at, q, row);
                for (u32 e = 0; e < entries; e++) {
                    __syncwarp();
                    i32 j = list.key[e] & ~PROTECTED;
                    float b = p.prior_batch ? prior[prior_at(p, at.b, h) + j] : 0.0f;
                    float x =
                        pair_energy(p.score, beta[h], b, query, keys.first + size_t(j) * keys.stride, p.head_dim);
                    if (lane == 0) list.score[e] = finite(x) ? x : GD_INFINITY;
                }
                sort_list(list, entries, entries, true, p.last);
                size_t out = at.out(p, row) * p.slots;
                for (u32 e = lane; e < p.slots; e += 32) {
                    bool used = e < entries && list.score[e] < GD_INFINITY;
                    index[out + e] = used ? list.key[e] & ~PROTECTED : -1;
                    energy[out + e] = used ? list.score[e] : GD_INFINITY;
                    if (p.protected_slots) flags[out + e] = used && (list.key[e] & PROTECTED) ? 1 : 0;
                }
            }
        }
    }
};

template <class T, int DP>
__device__ __forceinline__ void scan_list(const ScanParams &p, const T *q, const T *k, const float *bias,
                                          const float *beta, const float *prior, const i32 *table, i32 *index,
                                          float *energy, const i32 *protected_keys, uint8_t *flags) {
    using S = typename Scoring<T>::template Of<DP, 1>;
    constexpr int KEYS = S::KEYS, TILE = KEYS * S::PITCH;
    GD_DYNAMIC_SHARED(shared);
    GD_SHARED(Seen, seen);
    u32 warps = blockDim.x / 32, warp = threadIdx.x / 32, g = lane_id() / 4;
    u32 first = warp * S::ROWS;
    Block at(p, warps * S::ROWS);
    fill_seen(seen, p, at, table, warps * S::ROWS);

    unsigned char *behind = shared + 2 * (TILE * sizeof(T) + KEYS * 4);
    S scoring;
    scoring.load_queries(
        reinterpret_cast<T *>(behind + warp * S::QUERY_BYTES), p.head_dim, p.aligned, true,
        [&](u32 r) { return at.exists(p, first + r) ? query_row(p, at, q, first + r) : nullptr; });
    u32 room = list_room(p.candidates);
    float *lists = reinterpret_cast<float *>(behind + warps * S::QUERY_BYTES);
    ListRows rows(lists + size_t(first) * 2 * room, room);

    Range own[1][2] = {{seen.row[first + g], seen.row[first + g + 8]}};
    Reach reach(seen, first, S::ROWS);
    Source<T> keys = {k + size_t(at.b) * p.k_batch + size_t(at.kv) * p.k_head, p.k_row, p.keys, p.head_dim,
                      p.aligned != 0};
    u32 bias_head = p.bias_heads == p.q_heads ? at.h0 : at.kv;
    const float *biases = bias + (size_t(at.b) * p.bias_heads + bias_head) * p.bias_row;

    walk<T, DP, KEYS>(
        reinterpret_cast<T *>(shared), keys, biases, seen.all, p.last,
        [&](u32 number, const T *tile, const float *tile_bias) {
            i32 start = i32(number * KEYS);
            if (!reach.meets(start, KEYS)) return;
            bool whole = reach.whole(start, KEYS);
            for (int step = 0; step < KEYS; step += GROUP) {
                int group = p.last ? KEYS - GROUP - step : step;
                float acc[1][4][4];
                group_scores(scoring, tile, tile_bias, group, start, whole, own, acc);
                rows.offer(acc[0], start + group, p);
            }
        });

    rows.write(p, at, seen, first, q, keys, beta, prior, index, energy, protected_keys, flags);
}
