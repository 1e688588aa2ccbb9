// Emulates the CUDA language, as far as the kernels use it, for a host compiler. Every GPU thread is a fiber, and warp
// and block operations are rendezvous of fibers (emulate.cpp). Included by ptx.cuh, and by metal.h, which defines
// Metal's language instead.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#ifndef GD_METAL
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#endif

namespace emulate {

struct Index {
    uint32_t x, y, z;
};

// __thread instead of thread_local: without a check for an initialiser at every access.
// The position of the running thread, and the number of the seeded fault that is switched on (0: none).
extern __thread Index thread, block, block_size, grid_size;
extern __thread int fault;
// Metal's function constants of the running kernel: bit set of its buffers, features, rows.
extern __thread uint32_t present, features, rows;

struct LaneCall;
using Lanes = LaneCall *const (&)[32];

// A collective operation of a warp, executed when its last lane has arrived.
struct Collective {
    const char *name;
    void (*complete)(Lanes lanes);
};
extern const Collective SYNC, SHUFFLE, BALLOT, MATRICES, MMA_F16, MMA_BF16, MMA_S8;

// One lane's arguments and result of a collective. The operation may read `in` of every lane.
struct LaneCall {
    const Collective *kind;
    uint64_t in;
    uint64_t out;
    void *data;
    uint32_t from = 0;
};
// Waits until all lanes of the warp have called the same collective; the last one executes it.
void execute_collective(LaneCall &call, uint32_t mask);
void block_barrier();
[[noreturn]] void fail(const char *format, ...);

void *dynamic_shared();
void *static_shared(const void *tag, size_t bytes);
void copy_async(void *to, const void *from, uint32_t bytes);
void copy_commit();
void copy_wait(int in_flight);

// For the asynchronous units (hopper.cpp).
// A random number less than `bound`.
uint32_t random_below(uint32_t bound);
// Suspends the running thread until wake(its number).
void suspend();
void wake(uint32_t thread);
// The 256 KiB of shared memory of the block.
uint8_t *shared_window();

// The asynchronous copies and products of a block, and its mbarriers.
namespace async_proxy {
void begin();
// Completes a copy at random, or certainly if no thread can run (`stuck`). Returns whether one was completed.
bool step(bool stuck);
// Describes the threads that wait, and for what.
std::string waiting();
// What is incomplete when all threads have finished; empty if nothing is.
std::string unfinished();
} // namespace async_proxy

// Calls a kernel with its params and the addresses of its other arguments.
using Call = void (*)(void (*kernel)(), const void *params, void *const *pointers);
// Registers a kernel under its name.
void register_kernel(const char *name, const char *file, void (*kernel)(), Call call, size_t params, size_t pointers,
                     uint32_t values);

// A kernel's argument: a pointer, or a struct that is passed by value.
template <class A> A argument(void *at) {
    if constexpr (std::is_pointer_v<A>)
        return static_cast<A>(at);
    else
        return *static_cast<const A *>(at);
}

template <class P, class... A> struct Invoke {
    template <size_t... I>
    static void all(void (*kernel)(P, A...), const P &p, void *const *pointers, std::index_sequence<I...>) {
        kernel(p, argument<A>(pointers[I])...);
    }
    static void call(void (*kernel)(), const void *params, void *const *pointers) {
        P p;
        std::memcpy(&p, params, sizeof p);
        all(reinterpret_cast<void (*)(P, A...)>(kernel), p, pointers, std::index_sequence_for<A...>());
    }
};

struct Entry {
    template <class P, class... A> Entry(const char *name, const char *file, void (*kernel)(P, A...)) {
        // A bit for each argument that is passed by value.
        uint32_t values = 0, at = 0;
        ((values |= uint32_t(!std::is_pointer_v<A>) << at++), ...);
        register_kernel(name, file, reinterpret_cast<void (*)()>(kernel), Invoke<P, A...>::call, sizeof(P),
                        sizeof...(A), values);
    }
};

float half_to_float(uint16_t bits);
uint16_t half_from_float(float x);
uint16_t bfloat_from_float(float x);

struct Mma {
    float *c;
    const uint32_t *a;
    uint32_t b[2];
};
struct IntegerMma {
    int32_t *c;
    const uint32_t *a;
    uint32_t b[2];
};

} // namespace emulate

#define GD_FAULT(n) (emulate::fault == (n))

#ifndef GD_METAL
#define GD_REGISTER(name) static const emulate::Entry entry_##name(#name, __FILE__, name);
// Makes an array type usable in a declaration: gd_type<float[8]> &name.
template <class T> using gd_type = T;

#define GD_INFINITY std::numeric_limits<float>::infinity()
#define GD_DYNAMIC_SHARED(name) unsigned char *name = static_cast<unsigned char *>(emulate::dynamic_shared())
#define GD_SHARED(type, name)                                                                                          \
    static const char name##_tag = 0;                                                                                  \
    gd_type<type> &name = *static_cast<gd_type<type> *>(emulate::static_shared(&name##_tag, sizeof(type)))

#define threadIdx emulate::thread
#define blockIdx emulate::block
#define blockDim emulate::block_size
#define gridDim emulate::grid_size

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int32_t min(int32_t x, int32_t y) { return x < y ? x : y; }
inline int32_t max(int32_t x, int32_t y) { return x > y ? x : y; }
inline uint32_t min(uint32_t x, uint32_t y) { return x < y ? x : y; }
inline uint32_t max(uint32_t x, uint32_t y) { return x > y ? x : y; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(int(x)); }
inline uint32_t __float_as_uint(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float __uint_as_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}

// Never contracted to a fused multiply-add.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }

inline void __syncthreads() { emulate::block_barrier(); }
inline void __threadfence() {}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    emulate::LaneCall r = {&emulate::SYNC, 0, 0, nullptr};
    emulate::execute_collective(r, mask);
}

template <class T> T gd_shuffle(uint32_t mask, T x, uint32_t from) {
    static_assert(sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
    emulate::LaneCall r = {&emulate::SHUFFLE, 0, 0, nullptr, from % 32};
    std::memcpy(&r.in, &x, sizeof x);
    emulate::execute_collective(r, mask);
    std::memcpy(&x, &r.out, sizeof x);
    return x;
}
template <class T> T __shfl_sync(uint32_t mask, T x, uint32_t from) { return gd_shuffle(mask, x, from); }
template <class T> T __shfl_xor_sync(uint32_t mask, T x, uint32_t step) {
    return gd_shuffle(mask, x, emulate::thread.x % 32 ^ step);
}
template <class T> T __shfl_up_sync(uint32_t mask, T x, uint32_t step) {
    uint32_t lane = emulate::thread.x % 32;
    return gd_shuffle(mask, x, lane < step ? lane : lane - step);
}
inline uint32_t __ballot_sync(uint32_t mask, bool x) {
    emulate::LaneCall r = {&emulate::BALLOT, x, 0, nullptr};
    emulate::execute_collective(r, mask);
    return uint32_t(r.out);
}
inline bool __any_sync(uint32_t mask, bool x) { return __ballot_sync(mask, x) != 0; }

// Fibers are not preempted, so plain code is atomic.
template <class T> T atomicMin(T *at, T x) {
    T old = *at;
    if (x < old) *at = x;
    return old;
}
template <class T> T atomicMax(T *at, T x) {
    T old = *at;
    if (x > old) *at = x;
    return old;
}
template <class T> T atomicAdd(T *at, T x) {
    T old = *at;
    *at += x;
    return old;
}

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return emulate::half_to_float(x.bits); }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline void from_float(float x, float &y) { y = x; }
inline void from_float(float x, f16 &y) { y.bits = emulate::half_from_float(x); }
inline void from_float(float x, bf16 &y) { y.bits = emulate::bfloat_from_float(x); }

inline void copy_async(void *to, const void *from, uint32_t bytes) { emulate::copy_async(to, from, bytes); }
inline void copy_commit() { emulate::copy_commit(); }
template <int N> inline void copy_wait() { emulate::copy_wait(N); }

inline void load_matrices(uint32_t (&r)[4], const void *row) {
    emulate::LaneCall request = {&emulate::MATRICES, uint64_t(uintptr_t(row)), 0, r};
    emulate::execute_collective(request, 0xffffffffu);
}
inline void gd_mma(const emulate::Collective &kind, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulate::Mma operands = {c, a, {b0, b1}};
    emulate::LaneCall request = {&kind, 0, 0, &operands};
    emulate::execute_collective(request, 0xffffffffu);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    gd_mma(emulate::MMA_F16, c, a, b0, b1);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    gd_mma(emulate::MMA_BF16, c, a, b0, b1);
}
inline void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulate::IntegerMma operands = {c, a, {b0, b1}};
    emulate::LaneCall request = {&emulate::MMA_S8, 0, 0, &operands};
    emulate::execute_collective(request, 0xffffffffu);
}
inline void mma_from(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int32_t start) {
    for (int32_t &x : c)
        x = start;
    mma(c, a, b0, b1);
}
#endif
