// CUDA C++, as far as candle's kernels use it, for a host compiler: replaces the headers of the toolkit of the same
// names. Every operation on a half rounds once, from f32.
#pragma once
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../grid.h"

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
// One block runs at a time.
#define __shared__ static

#define threadIdx grid::thread
#define blockIdx grid::block
#define blockDim grid::block_size
#define gridDim grid::grid_size

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return T(a) > T(b) ? T(a) : T(b);
}

template <class To, class From> To gd_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "bits");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(uint32_t x) { return gd_bits<float>(x); }
inline float __int_as_float(int32_t x) { return gd_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return gd_bits<uint32_t>(x); }
inline int32_t __float_as_int(float x) { return gd_bits<int32_t>(x); }
inline double __longlong_as_double(long long x) { return gd_bits<double>(x); }
inline long long __double_as_longlong(double x) { return gd_bits<long long>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
inline float normcdff(float x) { return float(normcdf(x)); }
using std::isnan;
using std::signbit;

inline void __syncthreads() { grid::barrier(); }
template <class T> T __shfl_xor_sync(uint32_t, T x, int step, int = 32) {
    static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    bits = grid::shuffle_xor(bits, step);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Threads are not preempted between barriers and shuffles.
template <class T, class U> T atomicAdd(T *at, U x) {
    T old = *at;
    *at = T(old + T(x));
    return old;
}
template <class T, class U> T atomicMax(T *at, U y) {
    T old = *at, x = T(y);
    if (x > old) *at = x;
    return old;
}
template <class T, class U> T atomicMin(T *at, U y) {
    T old = *at, x = T(y);
    if (x < old) *at = x;
    return old;
}
template <class T, class U> T atomicCAS(T *at, U expected, U x) {
    T old = *at;
    if (old == T(expected)) *at = T(x);
    return old;
}

namespace emulate {
float half_up(uint16_t bits);
uint16_t half_down(float x);
uint16_t bfloat_down(float x);
} // namespace emulate
inline float gd_bfloat_up(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

#define GD_HALF(NAME, UP, DOWN)                                                                              \
    struct NAME {                                                                                            \
        uint16_t bits;                                                                                       \
        NAME() = default;                                                                                    \
        template <class X, class = std::enable_if_t<std::is_arithmetic_v<X>>>                                \
        NAME(X x) : bits(DOWN(float(x))) {}                                                                  \
        operator float() const { return UP(bits); }                                                          \
        NAME &operator+=(NAME x) { return *this = *this + x; }                                               \
        NAME &operator*=(NAME x) { return *this = *this * x; }                                               \
        friend NAME operator+(NAME x, NAME y) { return float(x) + float(y); }                                \
        friend NAME operator-(NAME x, NAME y) { return float(x) - float(y); }                                \
        friend NAME operator*(NAME x, NAME y) { return float(x) * float(y); }                                \
        friend NAME operator/(NAME x, NAME y) { return float(x) / float(y); }                                \
        friend NAME operator-(NAME x) { return -float(x); }                                                  \
        friend bool operator==(NAME x, NAME y) { return float(x) == float(y); }                              \
        friend bool operator!=(NAME x, NAME y) { return float(x) != float(y); }                              \
        friend bool operator<(NAME x, NAME y) { return float(x) < float(y); }                                \
        friend bool operator>(NAME x, NAME y) { return float(x) > float(y); }                                \
        friend bool operator<=(NAME x, NAME y) { return float(x) <= float(y); }                              \
        friend bool operator>=(NAME x, NAME y) { return float(x) >= float(y); }                              \
    };                                                                                                       \
    inline bool __hisnan(NAME x) { return std::isnan(float(x)); }                                            \
    inline NAME __hmax_nan(NAME x, NAME y) { return __hisnan(x) || __hisnan(y) ? NAME(NAN) : x > y ? x : y; } \
    inline NAME __hmin_nan(NAME x, NAME y) { return __hisnan(x) || __hisnan(y) ? NAME(NAN) : x < y ? x : y; } \
    inline NAME __habs(NAME x) { return std::fabs(float(x)); }                                               \
    inline NAME hsqrt(NAME x) { return std::sqrt(float(x)); }                                                \
    inline NAME hsin(NAME x) { return std::sin(float(x)); }                                                  \
    inline NAME hcos(NAME x) { return std::cos(float(x)); }                                                  \
    inline NAME hlog(NAME x) { return std::log(float(x)); }                                                  \
    inline NAME hexp(NAME x) { return std::exp(float(x)); }

GD_HALF(__half, emulate::half_up, emulate::half_down)
GD_HALF(__nv_bfloat16, gd_bfloat_up, emulate::bfloat_down)

struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x + b.x, a.y + b.y}; }
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) { return {a.x * b.x, a.y * b.y}; }

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t x) { return gd_bits<__half>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }

// 8-bit floats are declared so that the sources compile; they have no arithmetic.
struct __nv_fp8_e4m3 {
    uint8_t __x;
    __nv_fp8_e4m3() = default;
    explicit __nv_fp8_e4m3(float) { std::abort(); }
};
enum { __NV_E4M3 };
inline __half __nv_cvt_fp8_to_halfraw(uint8_t, int) { std::abort(); }
