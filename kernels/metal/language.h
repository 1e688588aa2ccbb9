// Metal definitions of the dialect of kernels/shared, and the interface of a kernel of this folder (gpu::Gpu::launch
// describes the host's side):
//
//   name        operator, dtype, head_dim if the kernel is compiled for one, `metal`: scan_top1_f16_d64_metal
//   buffer 0    the params struct, as bytes
//   buffer n    the n-th buffer of the launch, from 1 on; in place of a missing one any buffer is bound, and its bit of
//               function constant 0 is 0
//   constants   0 bit set of the buffers of the launch, 1 features, 2 rows (gpu::Constants); all `uint`
//   threadgroup memory 0: dynamic shared memory, where a kernel has any
//   grid        threadgroups [blocks, 1, 1] of [threads, 1, 1], simdgroups of 32
//
// Sources are compiled with precise math (no fast-math); the quoted includes of a .metal source are expanded once each.
#pragma once
#if defined(GD_EMULATE)
#include "../emulate/metal.h"
#elif defined(GD_STRICT)
#include "../emulate/strict_metal.h"
#else
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
#define GD_METAL
#define GD_REGISTER(name)
#define KERNEL(threads) [[kernel, max_total_threads_per_threadgroup(threads)]] void
// Seeded faults exist in the emulator alone.
#define GD_FAULT(n) false
#define GD_SHARED(type, name) threadgroup gd_type<type> name
#define GD_DYNAMIC_SHARED(type, name) threadgroup type *name [[threadgroup(0)]]
constant uint gd_present [[function_constant(0)]];
constant uint gd_features [[function_constant(1)]];
constant uint gd_rows [[function_constant(2)]];
#endif
#include "../shared/params.h"

#define INLINE inline
#define COLD inline
#define DEVICE device
#define SHARED threadgroup
#define LOCAL thread
#define PARAMS constant
#define CONSTANT constant
#define GD_INFINITY as_type<float>(0x7f800000u)

// Makes an array type usable in a declaration: gd_type<float[8]> &name.
template <class T> using gd_type = T;

// Number formats: arithmetic is done in f32. bfloat as storage, which needs no Metal 3.1.
typedef half f16;
typedef ushort bf16;

// The position arguments that every kernel takes, and the Thread made of them.
#define GD_THREAD                                                                                                      \
    uint gd_index [[thread_position_in_threadgroup]], uint gd_block [[threadgroup_position_in_grid]],                  \
        uint gd_threads [[threads_per_threadgroup]]
#define GD_HERE                                                                                                        \
    Thread { gd_index, gd_block, gd_threads }
// The n-th buffer, or null where the launch has none.
#define GD_IF_PRESENT(n, pointer) ((gd_present >> ((n) - 1) & 1) ? (pointer) : nullptr)

// Bits of function constant 1.
INLINE bool has(FeatureBit f) { return (gd_features & f) != 0; }

// A thread of a block.
struct Thread {
    u32 index, block, threads;

    u32 lane() const { return index % 32; }
    u32 warp() const { return index / 32; }
    u32 warps() const { return threads / 32; }
    // Its number in the grid.
    u32 global() const { return block * threads + index; }
};

template <class X> INLINE X shuffle(X x, u32 from) { return simd_shuffle(x, ushort(from)); }
template <class X> INLINE X shuffle_xor(X x, u32 step) { return simd_shuffle_xor(x, ushort(step)); }
template <class X> INLINE X shuffle_up(X x, u32 step) { return simd_shuffle_up(x, ushort(step)); }
INLINE u32 vote(bool x) { return u32(simd_vote::vote_t(simd_ballot(x))); }
// The sum over the lanes, the same bits in all of them.
INLINE float warp_sum(float x) { return simd_sum(x); }
INLINE void warp_barrier() { simdgroup_barrier(mem_flags::mem_threadgroup); }
INLINE void block_barrier() { threadgroup_barrier(mem_flags::mem_threadgroup); }
INLINE u32 bits_set(u32 x) { return popcount(x); }
INLINE u32 first_bit(u32 x) { return ctz(x); }

// Adds 1 to a number that other threads of the block add to.
INLINE void add_one(threadgroup u32 *at) {
    atomic_fetch_add_explicit(reinterpret_cast<threadgroup atomic_uint *>(at), 1u, memory_order_relaxed);
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(f16 x) { return float(x); }
INLINE float to_float(bf16 x) { return as_type<float>(u32(x) << 16); }

// Rounds to nearest, ties to even.
template <class T> INLINE T from_float(float x) { return T(x); }
template <> INLINE bf16 from_float<bf16>(float x) {
    u32 bits = as_type<u32>(x);
    return x != x ? bf16(0x7fff) : bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ln(1 + x) with the relative precision of x; Metal has no log1p.
INLINE float log1p(float x) {
    float y = 1.0f + x;
    return y == 1.0f ? x : log(y) * (x / (y - 1.0f));
}

// Metal has no double. Long sums are compensated (Neumaier): `rest` is the sum of the rounding errors.
typedef float wide;
#define WIDE_ROUNDOFF 1.2e-7f
struct Total {
    float sum, rest;
};
INLINE Total total(float x) { return {x, 0.0f}; }
INLINE Total plus(Total x, Total y) {
    float sum = x.sum + y.sum;
    float error = fabs(x.sum) >= fabs(y.sum) ? (x.sum - sum) + y.sum : (y.sum - sum) + x.sum;
    return {sum, x.rest + y.rest + error};
}
INLINE float value(Total x) { return x.sum + x.rest; }
INLINE Total load(const threadgroup Total *at) { return {at->sum, at->rest}; }
INLINE void store(Total x, threadgroup Total *at) { at->sum = x.sum, at->rest = x.rest; }

// Features of a mask, compiled in by function constants.
INLINE bool is_causal(constant MaskParams &) { return has(FEATURE_CAUSAL); }
INLINE bool has_window(constant MaskParams &) { return has(FEATURE_WINDOW); }
INLINE bool has_table(constant MaskParams &) { return has(FEATURE_TABLE); }
INLINE bool has_boundaries(constant MaskParams &) { return has(FEATURE_BOUNDARIES); }
