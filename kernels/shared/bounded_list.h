// The lists of a scan for several candidates, in the shared memory of a block: 64 entries a row, or for more than 32
// candidates 128. Only scores above that of the K-th entry are appended; when there is no room, the best K stay.
#pragma once
#include "mask.h"
#include "query_rows.h"

// The bit that marks a protected key in a list.
constexpr CONSTANT i32 PROTECTED = 1 << 30;

// The list of a row, one of a warp's.
struct List {
    SHARED float *score;
    SHARED i32 *key;
    u32 room;

    INLINE List(SHARED float *lists, u32 row, u32 entries)
        : score(lists + size_t(row) * 2 * entries), key(reinterpret_cast<SHARED i32 *>(score + entries)),
          room(entries) {}
};

// Whether entry x goes before entry y: by value (rising or falling), then by key.
INLINE bool ahead(float x, i32 i, float y, i32 j, bool rising, u32 tie) {
    if (x != y) return rising ? x < y : x > y;
    return before(i & ~PROTECTED, j & ~PROTECTED, tie);
}

// Sorts the first `count` entries, at most 32 PARTS, and keeps the first `keep`; by a warp, no NaN among the scores.
template <int PARTS>
INLINE void sort_entries(Thread me, const LOCAL List &list, u32 count, u32 keep, bool rising, u32 tie) {
    warp_barrier();
    float score[PARTS];
    i32 key[PARTS];
    u32 rank[PARTS];
#pragma unroll
    for (int x = 0; x < PARTS; x++) {
        u32 e = me.lane() + 32 * u32(x);
        score[x] = e < count ? list.score[e] : 0.0f;
        key[x] = e < count ? list.key[e] : -1;
        rank[x] = 0;
    }
    for (u32 e = 0; e < count; e++) {
        float s = list.score[e];
        i32 j = list.key[e];
#pragma unroll
        for (int x = 0; x < PARTS; x++)
            rank[x] += ahead(s, j, score[x], key[x], rising, tie);
    }
    if (!GD_FAULT(12)) warp_barrier();
#pragma unroll
    for (int x = 0; x < PARTS; x++) {
        if (me.lane() + 32 * u32(x) < count && rank[x] < keep)
            list.score[rank[x]] = score[x], list.key[rank[x]] = key[x];
    }
    if (!GD_FAULT(13)) warp_barrier();
}
INLINE void sort_list(Thread me, const LOCAL List &list, u32 count, u32 keep, bool rising, u32 tie) {
    // Where the room is known to be 64, the other branch is not compiled.
    if (list.room <= 64 || count <= 64)
        sort_entries<2>(me, list, count, keep, rising, tie);
    else
        sort_entries<4>(me, list, count, keep, rising, tie);
}

// Adds the protected keys that the row sees to its `count` candidates and marks them; returns the new count.
INLINE u32 add_protected(Thread me, const LOCAL List &list, u32 count, PARAMS ScanParams &p, const DEVICE i32 *keys,
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
        if (j < seen.lo || j >= seen.hi || vote(known)) continue;
        if (me.lane() == 0) list.key[count] = j | PROTECTED;
        count++;
        warp_barrier();
    }
    return count;
}

// Keeps the best K of the lists that `full` names by the four lanes of their rows: list `first` + r is that of the
// lanes from 4 r on. A lane's `count` and `bar`, the score that a new entry has to exceed, are those of its own list.
INLINE void make_room(Thread me, PARAMS ScanParams &p, SHARED float *lists, u32 first, u32 room, u32 full,
                      LOCAL u32 &count, LOCAL float &bar) {
    for (; full; full &= ~(0xfu << (first_bit(full) & 28))) {
        u32 r = first_bit(full) / 4, entries = shuffle(count, r * 4);
        List list(lists, first + r, room);
        sort_list(me, list, entries, p.candidates, false, p.tie);
        if (me.lane() / 4 == r) {
            count = min(entries, p.candidates);
            if (entries >= p.candidates) bar = list.score[p.candidates - 1];
        }
    }
}

// Writes the list of a row of the block by energy; keys are the rows of its head.
template <class T>
INLINE void write_list(Thread me, PARAMS ScanParams &p, const LOCAL Block &at, u32 row, const LOCAL List &list,
                       u32 entries, Range seen, const DEVICE T *q, const DEVICE T *keys, const DEVICE float *beta,
                       const DEVICE float *prior, DEVICE i32 *index, DEVICE float *energy,
                       const DEVICE i32 *protected_keys, DEVICE uint8_t *flags) {
    u32 h = at.head(p, row);
    sort_list(me, list, entries, p.candidates, false, p.tie);
    entries = min(entries, p.candidates);
    if (p.protected_slots) {
        size_t place = size_t(at.b % p.protected_batch) * p.protected_heads + h / (p.q_heads / p.protected_heads);
        place = place * p.protected_queries + at.query(p, row) % p.protected_queries;
        entries = add_protected(me, list, entries, p, protected_keys + place * p.protected_slots, seen);
    }
    // Scores give way to energies, which decide the order.
    const DEVICE T *query = query_row(p, at, q, row);
    for (u32 e = 0; e < entries; e++) {
        warp_barrier();
        u32 j = u32(list.key[e] & ~PROTECTED);
        float b = p.prior_batch ? prior[prior_at(p, at.b, h) + j] : 0.0f;
        float x = pair_energy(me, p.score, beta[h], b, query, keys + size_t(j) * p.k_row, p.head_dim);
        if (me.lane() == 0) list.score[e] = finite(x) ? x : GD_INFINITY;
    }
    sort_list(me, list, entries, entries, true, p.tie);
    size_t out = at.out(p, row) * p.slots;
    for (u32 e = me.lane(); e < p.slots; e += 32) {
        bool used = e < entries && list.score[e] < GD_INFINITY;
        index[out + e] = used ? list.key[e] & ~PROTECTED : -1;
        energy[out + e] = used ? list.score[e] : GD_INFINITY;
        if (p.protected_slots) flags[out + e] = used && (list.key[e] & PROTECTED) ? 1 : 0;
    }
}
