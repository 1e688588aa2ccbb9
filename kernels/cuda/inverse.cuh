// From "query reads keys" to "key is read by queries": slots sorted by the key that they hold, in a fixed
// order, so that key gradients are sums in that order, without atomics on floats. Least significant digit
// first; every pass is stable. A block takes a chunk of 2048 entries.
//
// The list of key j of key-value head kv of batch entry b is list (b Hk + kv) M + j; unused slots go to list
// B Hk M. An entry is a flat slot of index [B, Hq, N, K].
#pragma once
#include "row.cuh"

constexpr u32 SORT_THREADS = 256, CHUNK = 2048, DIGITS = 256;

// The list of every slot.
__device__ __forceinline__ void sort_begin(const SortParams &p, const i32 *index, u32 *lists, u32 *entries) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.count) return;
    i32 j = index[at];
    u32 head = at / p.slots / p.queries, kv = head % p.q_heads / (p.q_heads / p.kv_heads);
    lists[at] = j < 0 ? p.lists : (head / p.q_heads * p.kv_heads + kv) * p.keys + u32(j);
    entries[at] = at;
}

// How often each digit occurs in each chunk: counts [DIGITS, blocks].
__device__ __forceinline__ void sort_count(const SortParams &p, const u32 *lists, u32 *counts) {
    GD_SHARED(u32[DIGITS], count);
    for (u32 d = threadIdx.x; d < DIGITS; d += blockDim.x)
        count[d] = 0;
    __syncthreads();
    for (u32 x = threadIdx.x; x < CHUNK; x += blockDim.x) {
        u32 at = blockIdx.x * CHUNK + x;
        if (at < p.count) atomicAdd(&count[lists[at] >> p.shift & (DIGITS - 1)], 1u);
    }
    __syncthreads();
    for (u32 d = threadIdx.x; d < DIGITS; d += blockDim.x)
        counts[size_t(d) * p.blocks + blockIdx.x] = count[d];
}

// The inclusive sums of x over the threads of a block of 256; `sums` holds 8 and is free afterwards.
__device__ __forceinline__ u32 block_prefix(u32 x, u32 *sums) {
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2) {
        u32 y = __shfl_up_sync(ALL, x, step);
        if (lane_id() >= step) x += y;
    }
    if (lane_id() == 31) sums[threadIdx.x / 32] = x;
    if (!GD_FAULT(22)) __syncthreads();
    for (u32 w = 0; w < threadIdx.x / 32; w++)
        x += sums[w];
    __syncthreads();
    return x;
}

// Counts become places: exclusive sums over [DIGITS, blocks], by one block.
__device__ __forceinline__ void sort_places(const SortParams &p, u32 *counts) {
    GD_SHARED(u32[SORT_THREADS / 32], sums);
    GD_SHARED(u32, total);
    u32 before = 0, all = DIGITS * p.blocks;
    for (u32 first = 0; first < all; first += blockDim.x) {
        u32 at = first + threadIdx.x, x = at < all ? counts[at] : 0;
        u32 sum = block_prefix(x, sums);
        if (at < all) counts[at] = before + sum - x;
        if (threadIdx.x == blockDim.x - 1) total = sum;
        __syncthreads();
        before += total;
    }
}

// Moves every entry to its place. Inside a chunk, warp w takes entries 256 w.. in order, 32 at a time.
__device__ __forceinline__ void sort_move(const SortParams &p, const u32 *places, const u32 *lists,
                                          const u32 *entries, u32 *lists_out, u32 *entries_out) {
    constexpr u32 WARPS = SORT_THREADS / 32, EACH = CHUNK / WARPS;
    GD_SHARED(u32[WARPS * DIGITS], next);
    u32 warp = threadIdx.x / 32, first = blockIdx.x * CHUNK + warp * EACH;
    for (u32 x = threadIdx.x; x < WARPS * DIGITS; x += blockDim.x)
        next[x] = 0;
    __syncthreads();
    for (u32 x = lane_id(); x < EACH; x += 32)
        if (first + x < p.count)
            atomicAdd(&next[warp * DIGITS + (lists[first + x] >> p.shift & (DIGITS - 1))], 1u);
    __syncthreads();
    for (u32 d = threadIdx.x; d < DIGITS; d += blockDim.x) {
        u32 sum = places[size_t(d) * p.blocks + blockIdx.x];
        for (u32 w = 0; w < WARPS; w++) {
            u32 count = next[w * DIGITS + d];
            next[w * DIGITS + d] = sum;
            sum += count;
        }
    }
    __syncthreads();
    for (u32 x = lane_id(); x < EACH; x += 32) {
        u32 at = first + x;
        bool inside = at < p.count;
        u32 list = inside ? lists[at] : 0, digit = list >> p.shift & (DIGITS - 1);
        // Lanes with the same digit.
        u32 same = __ballot_sync(ALL, inside);
#pragma unroll
        for (u32 b = 0; b < 8; b++) {
            u32 set = __ballot_sync(ALL, digit >> b & 1);
            same &= digit >> b & 1 ? set : ~set;
        }
        u32 *place = &next[warp * DIGITS + digit], to = *place + __popc(same & ((1u << lane_id()) - 1));
        __syncwarp();
        if (inside && u32(__ffs(same) - 1) == lane_id()) *place += __popc(same);
        __syncwarp();
        if (inside) {
            lists_out[to] = list;
            entries_out[to] = entries[at];
        }
    }
}

// Where each list starts: starts [lists + 1]; what is behind the last holds the unused slots.
__device__ __forceinline__ void sort_starts(const SortParams &p, const u32 *lists, u32 *starts) {
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at > p.count) return;
    u32 from = at == 0 ? 0 : lists[at - 1] + 1, to = at == p.count ? p.lists : lists[at];
    for (u32 list = from; list <= to && list <= p.lists; list++)
        starts[list] = at;
}
