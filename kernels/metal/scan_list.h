// The scan for several candidates: every row keeps a list of 64 in threadgroup memory. Only scores above that
// of its K-th entry are appended; when there is no room, the best K stay.
#pragma once
#include "scan.h"

// Entries of a list, and the bit that marks a protected key in it.
constexpr constant u32 LIST = 64;
constexpr constant i32 PROTECTED = 1 << 30;

// The list of a row.
struct List {
    threadgroup float *score;
    threadgroup i32 *key;

    List(threadgroup float *lists, u32 row)
        : score(lists + row * 2 * LIST),
          key(reinterpret_cast<threadgroup i32 *>(lists + (row * 2 + 1) * LIST)) {}
};

// Whether entry x goes before entry y: by value (rising or falling), then by key.
INLINE bool ahead(float x, i32 i, float y, i32 j, bool rising, u32 last) {
    if (x != y) return rising ? x < y : x > y;
    return before(i & ~PROTECTED, j & ~PROTECTED, last);
}

// Sorts the first `count` entries and keeps the first `keep`; by a simdgroup, no NaN among the scores.
INLINE void sort_list(Thread me, List list, u32 count, u32 keep, bool rising, u32 last) {
    warp_barrier();
    float score[2];
    i32 key[2];
    u32 rank[2] = {0, 0};
    for (u32 x = 0; x < 2; x++) {
        u32 e = me.lane() + 32 * x;
        score[x] = e < count ? list.score[e] : 0.0f;
        key[x] = e < count ? list.key[e] : -1;
    }
    for (u32 e = 0; e < count; e++) {
        float s = list.score[e];
        i32 j = list.key[e];
        for (u32 x = 0; x < 2; x++)
            rank[x] += ahead(s, j, score[x], key[x], rising, last);
    }
    if (!GD_FAULT(108)) warp_barrier();
    for (u32 x = 0; x < 2; x++) {
        if (me.lane() + 32 * x < count && rank[x] < keep)
            list.score[rank[x]] = score[x], list.key[rank[x]] = key[x];
    }
    if (!GD_FAULT(109)) warp_barrier();
}

// Adds the protected keys that the row sees to its `count` candidates and marks them; returns the new count.
INLINE u32 add_protected(Thread me, List list, u32 count, constant ScanParams &p, const device i32 *keys,
                         Range seen) {
    for (u32 x = 0; x < p.protected_slots; x++) {
        i32 j = keys[x];
        bool known = false;
        for (u32 e = me.lane(); e < count; e += 32) {
            if ((list.key[e] & ~PROTECTED) == j) {
                list.key[e] = j | PROTECTED;
                known = true;
            }
        }
        if (j < seen.lo || j >= seen.hi || simd_any(known)) continue;
        if (me.lane() == 0) list.key[count] = j | PROTECTED;
        count++;
        warp_barrier();
    }
    return count;
}

template <class T, int D, int KEYS>
INLINE void scan_list(Thread me, constant ScanParams &p, threadgroup uchar *shared, threadgroup i32 *seen,
                      const device T *q, const device T *k, const device float *bias,
                      const device float *beta, const device float *prior, const device i32 *table,
                      device i32 *index, device float *energy, const device i32 *protected_keys,
                      device uint8_t *flags) {
    typedef Scoring<T, D, 1, KEYS> S;
    typedef typename S::E E;
    constexpr u32 EACH = KEYS / 4;
    u32 rows = me.warps() * S::ROWS, first = me.warp() * S::ROWS, lane = me.lane(), g = lane / 4,
        t = lane % 4;
    Block at(me, p, rows);
    fill_seen(me, seen, p, at, table, rows);

    threadgroup E *tile = reinterpret_cast<threadgroup E *>(shared);
    threadgroup float *tile_bias = reinterpret_cast<threadgroup float *>(tile + KEYS * S::PITCH);
    threadgroup float *out = tile_bias + KEYS + first * S::OUT;
    threadgroup float *lists = tile_bias + KEYS + rows * S::OUT + first * 2 * LIST;
    S scoring;
    load_queries(me, scoring, tile, p, at, q);

    Range own = seen_by(seen, first + g);
    // Of the lane's row, the same in the four lanes that share it.
    float bar = -GD_INFINITY;
    u32 count = 0;
    u32 quad = 0xfu << (lane & 28), below = (1u << lane) - 1;
    Reach reach(seen, first, S::ROWS);
    KeyRows<T> keys = key_rows(p, at, k);
    const device float *biases = key_biases(p, at, bias);
    Tiles tiles(seen, p.last, KEYS);
    for (i32 step = 0; step < tiles.count; step++) {
        u32 number = tiles.number(step);
        load_tile<T, D, KEYS>(me, tile, tile_bias, keys, biases, number, p.head_dim);
        i32 start = i32(number * KEYS);
        if (!reach.meets(start, KEYS)) continue;
        bool whole = reach.whole(start, KEYS);
        scoring.scores(tile, out);
        warp_barrier();
        float s[EACH];
        bool any = false;
#pragma unroll
        for (u32 x = 0; x < EACH; x++) {
            u32 at_key = x * 4 + t;
            i32 j = start + i32(at_key);
            s[x] = out[g * S::OUT + at_key] + tile_bias[at_key];
            bool open = s[x] < GD_INFINITY && (whole || (j >= own.lo && j < own.hi));
            if (!open) s[x] = -GD_INFINITY;
            any = any || s[x] > bar;
        }
        // Most tiles improve nothing.
        if (!simd_any(any)) continue;
        u32 hits[EACH], found = 0;
#pragma unroll
        for (u32 x = 0; x < EACH; x++) {
            hits[x] = vote(s[x] > bar) & quad;
            found += bits_set(hits[x]);
        }
        u32 full = vote(count + found > (GD_FAULT(110) ? LIST + 8 : LIST));
        for (; full; full &= ~(0xfu << (first_bit(full) & 28))) {
            u32 r = first_bit(full) / 4, entries = shuffle(count, r * 4);
            List list(lists, r);
            sort_list(me, list, entries, p.candidates, false, p.last);
            if (g == r) {
                count = min(entries, p.candidates);
                if (entries >= p.candidates) bar = list.score[p.candidates - 1];
            }
        }
        List list(lists, g);
#pragma unroll
        for (u32 x = 0; x < EACH; x++) {
            if (hits[x] >> lane & 1) {
                u32 to = count + bits_set(hits[x] & below);
                list.score[to] = s[x];
                list.key[to] = start + i32(x * 4 + t);
            }
            count += bits_set(hits[x]);
        }
    }

    for (u32 r = 0; r < 8; r++) {
        u32 row = first + r, h = at.head(p, row), entries = shuffle(count, r * 4);
        if (!at.exists(p, row)) continue;
        List list(lists, r);
        sort_list(me, list, entries, p.candidates, false, p.last);
        entries = min(entries, p.candidates);
        if (p.protected_slots) {
            size_t place =
                size_t(at.b % p.protected_batch) * p.protected_heads + h / (p.q_heads / p.protected_heads);
            place = place * p.protected_queries + at.query(p, row) % p.protected_queries;
            entries = add_protected(me, list, entries, p, protected_keys + place * p.protected_slots,
                                    seen_by(seen, row));
        }
        // Scores give way to energies, which decide the order.
        const device T *query = query_row(p, at, q, row);
        for (u32 e = 0; e < entries; e++) {
            warp_barrier();
            i32 j = list.key[e] & ~PROTECTED;
            float b = p.prior_batch ? prior[prior_at(p, at.b, h) + j] : 0.0f;
            float x = pair_energy(me, p.score, beta[h], b, query, keys.row(u32(j)), p.head_dim);
            if (lane == 0) list.score[e] = finite(x) ? x : GD_INFINITY;
        }
        sort_list(me, list, entries, entries, true, p.last);
        size_t to = at.out(p, row) * p.slots;
        for (u32 e = lane; e < p.slots; e += 32) {
            bool used = e < entries && list.score[e] < GD_INFINITY;
            index[to + e] = used ? list.key[e] & ~PROTECTED : -1;
            energy[to + e] = used ? list.score[e] : GD_INFINITY;
            if (p.protected_slots) flags[to + e] = used && (list.key[e] & PROTECTED) ? 1 : 0;
        }
    }
}
