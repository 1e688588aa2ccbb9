// Instructions of sm_90a: mbarriers with transaction counts, TMA copies and warpgroup matrix products (wgmma). On the
// device they are PTX; the emulator (kernels/emulate/hopper.h) has functions of the same names.
#pragma once
#include "ptx.cuh"

#ifdef GD_EMULATE
#include "../emulate/hopper.h"
#else

// A CUtensorMap: address, sizes and strides of a tensor, and the box that one TMA copy transfers.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// An mbarrier whose phase completes when `arrivals` threads have arrived and all expected bytes have been written.
__device__ __forceinline__ void barrier_init(uint64_t *b, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the async proxy; a block barrier makes them visible to the other threads.
__device__ __forceinline__ void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// Arrives, and adds to the bytes that the phase expects.
__device__ __forceinline__ void barrier_expect(uint64_t *b, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
                 : "memory");
}
// Waits until the phase of this parity is over: 0 for the first, 1 for the second; parity 1 of a new barrier
// counts as over.
__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t parity) {
    uint32_t over;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(over)
                     : "r"(shared_address(b)), "r"(parity)
                     : "memory");
    } while (!over);
}

// Copies the box that starts at element (column, row, head, batch); zeros beyond the edges of the tensor.
__device__ __forceinline__ void copy_box(void *to, const TensorMap &map, int32_t column, int32_t row, int32_t head,
                                         int32_t batch, uint64_t *b) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)),
                 "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(b))
                 : "memory");
}
// Copies a multiple of 16 bytes; both ends are aligned to 16.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t bytes, uint64_t *b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}
// Makes this thread's stores to shared memory visible to the async proxy, through which TMA and wgmma access it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Changes how many registers the threads of this warpgroup have.
template <int N> __device__ __forceinline__ void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_drop() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// The 64 sums of a thread as operands, so that the compiler does not move accesses to them across a fence or a wait.
#define GD_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define GD_SUMS                                                                                                        \
    GD_FOUR(0), GD_FOUR(1), GD_FOUR(2), GD_FOUR(3), GD_FOUR(4), GD_FOUR(5), GD_FOUR(6), GD_FOUR(7), GD_FOUR(8),        \
        GD_FOUR(9), GD_FOUR(10), GD_FOUR(11), GD_FOUR(12), GD_FOUR(13), GD_FOUR(14), GD_FOUR(15)

// Before the first product on sums that the thread has written.
__device__ __forceinline__ void wgmma_fence(float (&c)[16][4]) {
    asm volatile("wgmma.fence.sync.aligned;" : GD_SUMS::"memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N committed groups are in flight; c are sums of the groups before.
template <int N> __device__ __forceinline__ void wgmma_wait(float (&c)[16][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : GD_SUMS : "n"(N) : "memory");
}

// c [64, 128] += a [64, 16] b [128, 16]^T by a warpgroup; a and b lie in shared memory (see matrix below). Warp w
// of the four holds rows 16 w on, each as mma does: c[n] are keys 8 n on.
#define GD_WGMMA(type)                                                                                                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                                      \
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                             \
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                    \
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                    \
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                   \
                 "%64, %65, 1, 1, 1, 0, 0;"                                                                            \
                 : GD_SUMS                                                                                             \
                 : "l"(a), "l"(b)                                                                                      \
                 : "memory")
__device__ __forceinline__ void wgmma(float (&c)[16][4], uint64_t a, uint64_t b, f16) { GD_WGMMA("f16"); }
__device__ __forceinline__ void wgmma(float (&c)[16][4], uint64_t a, uint64_t b, bf16) { GD_WGMMA("bf16"); }
#undef GD_WGMMA
#undef GD_SUMS
#undef GD_FOUR
#endif

// Layout of a matrix operand in shared memory: rows of 128 bytes, in groups of eight that start at multiples of 1024
// bytes. The 16-byte unit u of row r is stored at unit u ^ r (TMA's 128-byte swizzle).
constexpr int MATRIX_ROW = 128;
constexpr int MATRIX_ALIGN = 8 * MATRIX_ROW;

// The wgmma descriptor of a matrix that starts at `at`, in the format of the PTX manual: address, stride between groups
// of eight rows, 128-byte swizzle. Advancing by 16 columns adds 32 bytes to the address.
__device__ __forceinline__ uint64_t matrix(const void *at) {
    return uint64_t((shared_address(at) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(MATRIX_ALIGN >> 4) << 32 |
           uint64_t(1) << 62;
}
