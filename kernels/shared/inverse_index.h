// Inverts "query reads keys" to "key is read by queries": a stable radix sort of the slots by the key that they hold,
// least significant digit first. Key gradients are then sums in a fixed order, without float atomics. A block takes
// SORT_BLOCK_ENTRIES entries.
//
// The segment of key j of KV head kv of batch entry b is (b Hk + kv) M + j; unused slots belong to segment B Hk M. An
// entry is a flat slot of index [B, Hq, N, K].
#pragma once
#include "row.h"

constexpr CONSTANT u32 DIGITS = 1u << SORT_DIGIT_BITS, SORT_WARPS = 8, WARP_ENTRIES = SORT_BLOCK_ENTRIES / SORT_WARPS;

// The segment of every slot.
INLINE void sort_init(Thread me, PARAMS SortParams &p, const DEVICE i32 *index, DEVICE u32 *segments,
                      DEVICE u32 *entries) {
    u32 at = me.global();
    if (at >= p.entries) return;
    i32 j = index[at];
    u32 head = at / p.slots / p.queries, kv = head % p.q_heads / (p.q_heads / p.kv_heads);
    segments[at] = j < 0 ? p.segments : (head / p.q_heads * p.kv_heads + kv) * p.keys + u32(j);
    entries[at] = at;
}

// Digit counts of every block: counts [DIGITS, blocks]; `count` has DIGITS entries.
INLINE void sort_histogram(Thread me, PARAMS SortParams &p, SHARED u32 *count, const DEVICE u32 *segments,
                           DEVICE u32 *counts) {
    for (u32 d = me.index; d < DIGITS; d += me.threads)
        count[d] = 0;
    block_barrier();
    for (u32 x = me.index; x < SORT_BLOCK_ENTRIES; x += me.threads) {
        u32 at = me.block * SORT_BLOCK_ENTRIES + x;
        if (at < p.entries) add_one(count + (segments[at] >> p.shift & (DIGITS - 1)));
    }
    block_barrier();
    for (u32 d = me.index; d < DIGITS; d += me.threads)
        counts[size_t(d) * p.blocks + me.block] = count[d];
}

// The inclusive sums of x over the threads of a block of 256; `sums` holds 8 and is free afterwards.
INLINE u32 block_prefix(Thread me, u32 x, SHARED u32 *sums) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 y = shuffle_up(x, step);
        if (me.lane() >= step) x += y;
    }
    if (me.lane() == 31) sums[me.warp()] = x;
    if (!GD_FAULT(22)) block_barrier();
    for (u32 w = 0; w < me.warp(); w++)
        x += sums[w];
    block_barrier();
    return x;
}

// Replaces counts by their exclusive sums over [DIGITS, blocks], in one block; `sums` has 8 entries.
INLINE void sort_offsets(Thread me, PARAMS SortParams &p, SHARED u32 *sums, SHARED u32 *total, DEVICE u32 *counts) {
    u32 before = 0, all = DIGITS * p.blocks;
    for (u32 first = 0; first < all; first += me.threads) {
        u32 at = first + me.index, x = at < all ? counts[at] : 0;
        u32 sum = block_prefix(me, x, sums);
        if (at < all) counts[at] = before + sum - x;
        if (me.index == me.threads - 1) *total = sum;
        block_barrier();
        before += *total;
    }
}

// Moves every entry to its position. Warp w of a block takes WARP_ENTRIES entries in order, 32 at a time; `next` has 8
// DIGITS entries.
INLINE void sort_scatter(Thread me, PARAMS SortParams &p, SHARED u32 *next, const DEVICE u32 *offsets,
                         const DEVICE u32 *segments, const DEVICE u32 *entries, DEVICE u32 *segments_out,
                         DEVICE u32 *entries_out) {
    u32 warp = me.warp(), first = me.block * SORT_BLOCK_ENTRIES + warp * WARP_ENTRIES;
    for (u32 x = me.index; x < SORT_WARPS * DIGITS; x += me.threads)
        next[x] = 0;
    block_barrier();
    for (u32 x = me.lane(); x < WARP_ENTRIES; x += 32)
        if (first + x < p.entries) add_one(next + warp * DIGITS + (segments[first + x] >> p.shift & (DIGITS - 1)));
    block_barrier();
    for (u32 d = me.index; d < DIGITS; d += me.threads) {
        u32 sum = offsets[size_t(d) * p.blocks + me.block];
        for (u32 w = 0; w < SORT_WARPS; w++) {
            u32 count = next[w * DIGITS + d];
            next[w * DIGITS + d] = sum;
            sum += count;
        }
    }
    block_barrier();
    for (u32 x = me.lane(); x < WARP_ENTRIES; x += 32) {
        u32 at = first + x;
        bool inside = at < p.entries;
        u32 segment = inside ? segments[at] : 0, digit = segment >> p.shift & (DIGITS - 1);
        // Lanes with the same digit.
        u32 same = vote(inside);
#pragma unroll
        for (u32 b = 0; b < SORT_DIGIT_BITS; b++) {
            u32 set = vote(digit >> b & 1);
            same &= digit >> b & 1 ? set : ~set;
        }
        SHARED u32 *position = &next[warp * DIGITS + digit];
        u32 to = *position + bits_set(same & ((1u << me.lane()) - 1));
        warp_barrier();
        if (inside && first_bit(same) == me.lane()) *position += bits_set(same);
        warp_barrier();
        if (inside) {
            segments_out[to] = segment;
            entries_out[to] = entries[at];
        }
    }
}

// Start of every segment: starts [segments + 1]; entries after the last start belong to unused slots.
INLINE void sort_segment_starts(Thread me, PARAMS SortParams &p, const DEVICE u32 *segments, DEVICE u32 *starts) {
    u32 at = me.global();
    if (at > p.entries) return;
    u32 from = at == 0 ? 0 : segments[at - 1] + 1, to = at == p.entries ? p.segments : segments[at];
    for (u32 segment = from; segment <= to && segment <= p.segments; segment++)
        starts[segment] = at;
}
