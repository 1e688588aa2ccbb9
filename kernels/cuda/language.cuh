// CUDA definitions of the dialect of kernels/shared.
#pragma once
#include "../shared/params.h"
#include "ptx.cuh"
#include <math.h>

#define INLINE __device__ __forceinline__
// A function for rare cases, which must not take registers from its callers.
#define COLD __device__ __noinline__
#define DEVICE
#define SHARED
#define LOCAL
#define PARAMS const
#define CONSTANT

// A thread of a block.
struct Thread {
    u32 index, block, threads;

    INLINE u32 lane() const { return index % 32; }
    INLINE u32 warp() const { return index / 32; }
    INLINE u32 warps() const { return threads / 32; }
    // Its number in the grid.
    INLINE u32 global() const { return block * threads + index; }
};
INLINE Thread this_thread() { return {threadIdx.x, blockIdx.x, blockDim.x}; }

template <class X> INLINE X shuffle(X x, u32 from) { return __shfl_sync(ALL, x, from); }
template <class X> INLINE X shuffle_xor(X x, u32 step) { return __shfl_xor_sync(ALL, x, step); }
template <class X> INLINE X shuffle_up(X x, u32 step) { return __shfl_up_sync(ALL, x, step); }
INLINE u32 vote(bool x) { return __ballot_sync(ALL, x); }
// The sum over the lanes, the same bits in all of them.
INLINE float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        x += shuffle_xor(x, step);
    return x;
}
INLINE void warp_barrier() { __syncwarp(); }
INLINE void block_barrier() { __syncthreads(); }
INLINE u32 bits_set(u32 x) { return u32(__popc(x)); }
INLINE u32 first_bit(u32 x) { return u32(__ffs(x) - 1); }

// Adds 1 to a number that other threads of the block add to.
INLINE void add_one(u32 *at) { atomicAdd(at, 1u); }

template <class T> INLINE T from_float(float x) {
    T y;
    from_float(x, y);
    return y;
}

// The type of long sums, and of values whose comparison decides between roots or conditions.
typedef double wide;
#define WIDE_ROUNDOFF 2.3e-16
struct Total {
    double sum;
};
INLINE Total total(float x) { return {double(x)}; }
INLINE Total plus(Total x, Total y) { return {x.sum + y.sum}; }
INLINE float value(Total x) { return float(x.sum); }
INLINE Total load(const Total *at) { return *at; }
INLINE void store(Total x, Total *at) { *at = x; }

// Features of a mask, read from its params.
INLINE bool is_causal(const MaskParams &m) { return m.causal; }
INLINE bool has_window(const MaskParams &m) { return m.window; }
INLINE bool has_table(const MaskParams &m) { return m.table != MASK_TABLE_NONE; }
INLINE bool has_boundaries(const MaskParams &m) { return m.table == MASK_TABLE_BOUNDARIES; }
