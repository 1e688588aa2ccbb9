// Declarations of the Metal shading language, as far as the kernels use it, for a type check by clang with distinct
// address spaces: a pointer to the wrong one does not compile. The command line is
//
//   clang++ -std=c++14 --target=arm64-apple-macos -ffreestanding -nostdinc++ -fsyntax-only -DGD_STRICT
//       -Wall -Wextra -Wdouble-promotion -Werror -Wno-unknown-attributes -Wno-ignored-attributes
//       -Wno-duplicate-decl-specifier -x c++ FILE.metal
//
// A literal without a suffix is an f32 in Metal and a double here, so the kernels write the suffix.
#pragma once
#define GD_METAL

typedef __SIZE_TYPE__ size_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
// Keywords of the language.
#define half _Float16

#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
// The address space of local variables is the default one.
#define thread
#define KERNEL(threads) extern "C" __attribute__((used)) void

#define GD_REGISTER(name)
#define GD_FAULT(n) false
#define GD_SHARED(type, name) extern threadgroup gd_type<type> name
#define GD_DYNAMIC_SHARED(type, name) threadgroup type *name
extern constant uint gd_present;
extern constant uint gd_features;
extern constant uint gd_rows;

template <class X, class Y> X as_type(Y y);
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));

int min(int x, int y);
int max(int x, int y);
uint min(uint x, uint y);
uint max(uint x, uint y);
uint popcount(uint x);
uint ctz(uint x);
float exp(float x);
float log(float x);
float tanh(float x);
float sqrt(float x);
float fabs(float x);
float fma(float x, float y, float z);
float fmin(float x, float y);
float fmax(float x, float y);

template <class X> X simd_shuffle(X x, ushort from);
template <class X> X simd_shuffle_xor(X x, ushort step);
template <class X> X simd_shuffle_up(X x, ushort step);
float simd_sum(float x);
struct simd_vote {
    typedef ulong vote_t;
    explicit operator vote_t() const;
};
simd_vote simd_ballot(bool x);
bool simd_any(bool x);

enum class mem_flags {
    mem_none,
    mem_device,
    mem_threadgroup
};
void simdgroup_barrier(mem_flags flags);
void threadgroup_barrier(mem_flags flags);

enum memory_order {
    memory_order_relaxed
};
struct atomic_uint {
    uint value;
};
struct atomic_int {
    int value;
};
uint atomic_fetch_add_explicit(threadgroup atomic_uint *at, uint x, memory_order order);
int atomic_fetch_min_explicit(threadgroup atomic_int *at, int x, memory_order order);
int atomic_fetch_max_explicit(threadgroup atomic_int *at, int x, memory_order order);

struct ulong2 {
    ulong2(ulong both);
    ulong2(ulong x, ulong y);
};
template <class T, int C, int R> struct simdgroup_matrix {
    T element[2];
};
template <class T, int C, int R = C> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T x);
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8> &m, const threadgroup T *from, ulong elements_per_row = 8,
                    ulong2 origin = 0, bool transpose = false);
template <class T>
void simdgroup_store(simdgroup_matrix<T, 8, 8> m, threadgroup T *to, ulong elements_per_row = 8, ulong2 origin = 0,
                     bool transpose = false);
template <class A, class B>
void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8> &d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<float, 8, 8> c);
