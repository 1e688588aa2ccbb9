// Bounded lists of candidates for a top-K scan, in the shared memory of a block: 64 entries per row, or 128 for more
// than 32 candidates. A score is appended only if it exceeds the row's threshold, the K-th greatest score of its last
// compaction; a full list is sorted and cut to the K greatest.
#pragma once
#include "mask.h"
#include "query_rows.h"

// The bit that marks a protected key in a list.
constexpr CONSTANT i32 PROTECTED = 1 << 30;

// The list of row `row` of a warp.
struct List {
    SHARED float *score;
    SHARED i32 *key;
    u32 capacity;

    INLINE List(SHARED float *lists, u32 row, u32 entries)
        : score(lists + size_t(row) * 2 * entries), key(reinterpret_cast<SHARED i32 *>(score + entries)),
          capacity(entries) {}
};

// Whether entry (x, i) comes before entry (y, j): by value, ascending or descending, then by key.
INLINE bool precedes(float x, i32 i, float y, i32 j, bool ascending, u32 tie) {
    if (x != y) return ascending ? x < y : x > y;
    return wins_tie(i & ~PROTECTED, j & ~PROTECTED, tie);
}

// Sorts the first `count` entries, at most 32 PARTS, and stores the first `keep`. A rank sort by a whole warp: every
// lane holds PARTS entries and counts how many come before each. Scores must not be NaN.
template <int PARTS>
INLINE void sort_entries(Thread me, const LOCAL List &list, u32 count, u32 keep, bool ascending, u32 tie) {
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
            rank[x] += precedes(s, j, score[x], key[x], ascending, tie);
    }
    if (!GD_FAULT(12)) warp_barrier();
#pragma unroll
    for (int x = 0; x < PARTS; x++) {
        if (me.lane() + 32 * u32(x) < count && rank[x] < keep)
            list.score[rank[x]] = score[x], list.key[rank[x]] = key[x];
    }
    if (!GD_FAULT(13)) warp_barrier();
}
INLINE void sort_list(Thread me, const LOCAL List &list, u32 count, u32 keep, bool ascending, u32 tie) {
    // Where the capacity is the constant 64, the compiler drops the second branch.
    if (list.capacity <= 64 || count <= 64)
        sort_entries<2>(me, list, count, keep, ascending, tie);
    else
        sort_entries<4>(me, list, count, keep, ascending, tie);
}

// Adds the protected keys inside of `range` to the `count` candidates of a row and marks them; returns the new count.
INLINE u32 add_protected(Thread me, const LOCAL List &list, u32 count, PARAMS ScanParams &p, const DEVICE i32 *keys,
                         Range range) {
    for (u32 x = 0; x < p.protected_slots; x++) {
        i32 j = keys[x];
        bool listed = false;
        for (u32 e = me.lane(); e < count; e += 32) {
            if ((list.key[e] & ~PROTECTED) == j) {
                list.key[e] = j | PROTECTED;
                listed = true;
            }
        }
        if (j < range.lo || j >= range.hi || vote(listed)) continue;
        if (me.lane() == 0) list.key[count] = j | PROTECTED;
        count++;
        warp_barrier();
    }
    return count;
}

// Cuts full lists to their K greatest scores. Lanes 4 r.. 4 r + 3 share list `first` + r, and `full` has the bits of
// the lanes whose lists are full. `count` and `threshold` (which a new score must exceed) are those of the lane's own
// list.
INLINE void compact_lists(Thread me, PARAMS ScanParams &p, SHARED float *lists, u32 first, u32 capacity, u32 full,
                          LOCAL u32 &count, LOCAL float &threshold) {
    for (; full; full &= ~(0xfu << (first_bit(full) & 28))) {
        u32 r = first_bit(full) / 4, entries = shuffle(count, r * 4);
        List list(lists, first + r, capacity);
        sort_list(me, list, entries, p.candidates, false, p.tie);
        if (me.lane() / 4 == r) {
            count = min(entries, p.candidates);
            if (entries >= p.candidates) threshold = list.score[p.candidates - 1];
        }
    }
}

// Fills a list with the best keys of an ill-conditioned row, relative to key `center` (-1: none); returns their count.
// The list has room for 32 more than `wanted`. Called by a whole warp.
template <class T, class Keys>
COLD u32 list_by_differences(Thread me, const LOCAL RankedRow<T, Keys> &row, i32 center, const LOCAL List &list,
                             u32 wanted) {
    float scale = safe_scale(me, row, center), threshold = -GD_INFINITY;
    u32 count = 0, below = (1u << me.lane()) - 1, visible = u32(row.range.hi - row.range.lo);
    warp_barrier();
    for (u32 step = 0; step < visible; step += 32) {
        // In tie order, because a later key of an equal score does not exceed the threshold.
        u32 at = step + me.lane();
        i32 j = row.tie == TIE_LAST ? row.range.hi - 1 - i32(at) : row.range.lo + i32(at);
        float s = at < visible ? relative_score(row, center, scale, j) : -GD_INFINITY;
        bool better = s > threshold;
        u32 hits = vote(better);
        if (count + bits_set(hits) > list.capacity) {
            sort_list(me, list, count, wanted, false, row.tie);
            count = min(count, wanted);
            threshold = list.score[wanted - 1];
        }
        if (better) {
            u32 to = count + bits_set(hits & below);
            list.score[to] = s, list.key[to] = j;
        }
        count += bits_set(hits);
    }
    return count;
}

// Sorts those entries of a list, sorted by energy, that overflowed to `energy`: by their scores relative to that of key
// `center` (-1: none). Called by a whole warp.
template <class T, class Keys>
COLD void sort_overflowed(Thread me, const LOCAL RankedRow<T, Keys> &row, i32 center, const LOCAL List &list,
                          u32 entries, float energy) {
    u32 from = 0, count = 0;
    for (u32 first = 0; first < entries; first += 32) {
        u32 e = first + me.lane();
        float x = e < entries ? list.score[e] : GD_INFINITY;
        from += bits_set(vote(x < energy)), count += bits_set(vote(x == energy));
    }
    List part = list;
    part.score += from, part.key += from;
    float scale = safe_scale(me, row, center);
    for (u32 e = 0; e < count; e++)
        if (!(squared_norm(me, row.keys.row(u32(part.key[e] & ~PROTECTED)), row.dim) < MAX_SQUARE)) scale = SCALE_DOWN;
    for (u32 e = me.lane(); e < count; e += 32)
        part.score[e] = relative_score(row, center, scale, part.key[e] & ~PROTECTED);
    sort_list(me, part, count, count, false, row.tie);
    for (u32 e = me.lane(); e < count; e += 32)
        part.score[e] = energy;
    warp_barrier();
}

// Writes the list of a row of the block, sorted by energy; `keys` points to the key rows of its head.
template <class T>
INLINE void write_list(Thread me, PARAMS ScanParams &p, const LOCAL QueryBlock &at, u32 row, const LOCAL List &list,
                       u32 entries, Range range, LOCAL CommonOffset &offset, const DEVICE T *q, const DEVICE T *keys,
                       const DEVICE float *beta, const DEVICE float *prior, DEVICE i32 *index, DEVICE float *energy,
                       const DEVICE i32 *protected_keys, DEVICE uint8_t *flags) {
    u32 h = at.head(p, row);
    sort_list(me, list, entries, p.candidates, false, p.tie);
    entries = min(entries, p.candidates);
    const DEVICE T *query = query_row(p, at, q, row);
    const DEVICE float *priors = p.prior_batch ? prior + prior_offset(p, at.b, h) : nullptr;
    StridedKeys<T> rows = {keys, p.k_row};
    RankedRow<T, StridedKeys<T>> ranked = {query, rows, range, priors, beta[h], p.score, p.tie, p.head_dim};
    // Without the mark of a protected key, which another lane may have added by now.
    i32 best = entries ? list.key[0] & ~PROTECTED : -1;
    if (ill_conditioned(me, ranked, best, entries, p.candidates, offset)) {
        entries = list_by_differences(me, ranked, best, list, p.candidates);
        sort_list(me, list, entries, p.candidates, false, p.tie);
        entries = min(entries, p.candidates);
        best = entries ? list.key[0] & ~PROTECTED : -1;
    }
    if (p.protected_slots) {
        size_t row_at = size_t(at.b % p.protected_batch) * p.protected_heads + h / (p.q_heads / p.protected_heads);
        row_at = row_at * p.protected_queries + at.query(p, row) % p.protected_queries;
        entries = add_protected(me, list, entries, p, protected_keys + row_at * p.protected_slots, range);
    }
    // Scores are replaced by energies, which are computed as differences and decide the final order.
    bool overflows = false;
    for (u32 e = 0; e < entries; e++) {
        warp_barrier();
        u32 j = u32(list.key[e] & ~PROTECTED);
        float x = pair_energy(me, p.score, beta[h], ranked.prior_of(i32(j)), query, rows.row(j), p.head_dim);
        overflows |= fabs(x) == MAX_ENERGY;
        if (me.lane() == 0) list.score[e] = finite(x) ? x : GD_INFINITY;
    }
    sort_list(me, list, entries, entries, true, p.tie);
    if (overflows && !GD_FAULT(90)) {
        sort_overflowed(me, ranked, best, list, entries, -MAX_ENERGY);
        sort_overflowed(me, ranked, best, list, entries, MAX_ENERGY);
    }
    size_t out = at.output_row(p, row) * p.slots;
    for (u32 e = me.lane(); e < p.slots; e += 32) {
        bool used = e < entries && list.score[e] < GD_INFINITY;
        index[out + e] = used ? list.key[e] & ~PROTECTED : -1;
        energy[out + e] = used ? list.score[e] : GD_INFINITY;
        if (p.protected_slots) flags[out + e] = used && (list.key[e] & PROTECTED) ? 1 : 0;
    }
}
