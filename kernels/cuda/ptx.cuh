// Number formats, asynchronous copies and matrix fragments. On the device they are PTX instructions; the emulator
// (kernels/emulate) has functions of the same names.
#pragma once
#include <stdint.h>

// IEEE half and bfloat16 as storage; arithmetic is done in f32.
struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

#ifdef GD_EMULATE
#include "../emulate/device.h"
#else

#define GD_REGISTER(name)
// Seeded faults exist in the emulator alone.
#define GD_FAULT(n) false
#define GD_INFINITY __int_as_float(0x7f800000)
#define GD_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// Makes an array type usable in a declaration: gd_type<float[8]> &name.
template <class T> using gd_type = T;
#define GD_SHARED(type, name) __shared__ gd_type<type> name

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

// Rounds to nearest, ties to even.
__device__ __forceinline__ void from_float(float x, float &y) { y = x; }
__device__ __forceinline__ void from_float(float x, f16 &y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void from_float(float x, bf16 &y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Copies `bytes` (0 to 16) of 16 bytes to shared memory and fills up with zeros; both ends are aligned.
__device__ __forceinline__ void copy_async(void *to, const void *from, uint32_t bytes) {
    uint32_t at = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are in flight.
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void *row) {
    uint32_t at = uint32_t(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and t = lane % 4: a holds rows g, g + 8, columns
// 2t, 2t + 1 (a[0], a[1]) and 8 more (a[2], a[3]); b rows 2t, 2t + 1 (b0) and 8 more (b1) of column g;
// c row g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t, 2t + 1.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c [16, 8] += a [16, 32] b [32, 8] of 8-bit integers. a holds rows g, g + 8, columns 4t.. 4t + 3 (a[0], a[1]) and
// 16 more (a[2], a[3]); b rows 4t.. 4t + 3 (b0) and 16 more (b1) of column g; c as above.
__device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same where all of c was `start`.
__device__ __forceinline__ void mma_from(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         int32_t start) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%10, %10, %10, %10};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}
#endif

// The lanes of a warp.
constexpr uint32_t ALL = 0xffffffffu;
