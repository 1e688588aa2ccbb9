// Emulates the Metal shading language, as far as the kernels use it, for a host compiler; the counterpart of device.h
// for CUDA. A source of kernels/metal is included inside of `namespace gd_metal`, after this header, so that names of
// both languages do not collide. The host compiler ignores the attributes in [[..]].
#pragma once
#define GD_METAL
#include "device.h"
#include <math.h>
#include <tuple>
#include <type_traits>

namespace emulate {

extern const Collective SUM, MATRIX_LOAD, MATRIX_STORE, MATRIX_MULTIPLY;

// d = a b + c of 8 x 8, of which a lane holds two elements each.
struct MatrixMultiply {
    float a[2], b[2], c[2], d[2];
};

// The element of an 8 x 8 matrix that a lane holds as its element e. Metal does not specify the order, so this one is
// arbitrary.
inline uint32_t matrix_element(uint32_t lane, uint32_t e) { return (lane * 2 + e) * 37 % 64; }

inline uint64_t collective(const Collective &kind, uint64_t in, void *data = nullptr, uint32_t from = 0) {
    LaneCall r = {&kind, in, 0, data, from};
    execute_collective(r, 0xffffffffu);
    return r.out;
}
template <class X> X move_from(X x, uint32_t from) {
    static_assert(sizeof(X) <= 8, "shuffles move up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    bits = collective(SHUFFLE, bits, nullptr, from);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t lane() { return thread.x % 32; }

// Dynamic threadgroup memory, an argument of a kernel.
template <class T> struct Dynamic {
    T *at;
    operator T *() const { return at; }
};

// Hands out the arguments of a kernel in order. A missing buffer becomes an address whose access faults.
struct Arguments {
    void *const *pointers;
    size_t count, next;
    uint32_t numbers;

    void *pointer() {
        void *p = pointers[next++];
        return p ? p : reinterpret_cast<void *>(uintptr_t(64));
    }
    uint32_t number() {
        const uint32_t all[3] = {thread.x, block.x, block_size.x};
        return all[numbers++];
    }
};
template <class A> struct Argument;
template <class T> struct Argument<T *> {
    static T *get(Arguments &a) { return static_cast<T *>(a.pointer()); }
};
template <class T> struct Argument<Dynamic<T>> {
    static Dynamic<T> get(Arguments &) { return {static_cast<T *>(dynamic_shared())}; }
};
template <> struct Argument<uint32_t> {
    static uint32_t get(Arguments &a) { return a.number(); }
};

template <class P, class... A> struct InvokeMetal {
    static constexpr size_t COUNT = (size_t(std::is_pointer<A>::value) + ... + 0);

    static void call(void (*kernel)(), const void *params, void *const *pointers) {
        present = 0;
        for (size_t n = 0; n < COUNT; n++)
            present |= uint32_t(pointers[n] != nullptr) << n;
        Arguments a = {pointers, COUNT, 0, 0};
        // Braces evaluate the arguments in order.
        std::tuple<A...> all{Argument<A>::get(a)...};
        std::apply(
            [&](const A &...x) {
                reinterpret_cast<void (*)(const P &, A...)>(kernel)(*static_cast<const P *>(params), x...);
            },
            all);
    }
};

struct MetalEntry {
    template <class P, class... A> MetalEntry(const char *name, const char *file, void (*kernel)(const P &, A...)) {
        using I = InvokeMetal<P, A...>;
        register_kernel(name, file, reinterpret_cast<void (*)()>(kernel), I::call, sizeof(P), I::COUNT, 0);
    }
};

} // namespace emulate

namespace gd_metal {

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

struct half {
    uint16_t bits;

    half() = default;
    explicit half(float x) : bits(emulate::half_from_float(x)) {}
    explicit operator float() const { return emulate::half_to_float(bits); }
};

template <class X, class Y> X as_type(Y y) {
    static_assert(sizeof(X) == sizeof(Y), "as_type keeps the size");
    X x;
    std::memcpy(&x, &y, sizeof x);
    return x;
}

template <class T, int N> struct alignas(sizeof(T) * N) vec {
    T element[N];
    T operator[](uint at) const { return element[at]; }
};

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline uint min(uint x, uint y) { return x < y ? x : y; }
inline uint max(uint x, uint y) { return x > y ? x : y; }
inline uint popcount(uint x) { return uint(__builtin_popcount(x)); }
inline uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32; }

template <class X> X simd_shuffle(X x, ushort from) { return emulate::move_from(x, from); }
template <class X> X simd_shuffle_xor(X x, ushort step) { return emulate::move_from(x, emulate::lane() ^ step); }
template <class X> X simd_shuffle_up(X x, ushort step) {
    uint32_t lane = emulate::lane();
    return emulate::move_from(x, lane < step ? lane : lane - step);
}
inline float simd_sum(float x) { return as_type<float>(uint(emulate::collective(emulate::SUM, as_type<uint>(x)))); }
struct simd_vote {
    typedef ulong vote_t;
    vote_t bits;
    explicit operator vote_t() const { return bits; }
};
inline simd_vote simd_ballot(bool x) { return {emulate::collective(emulate::BALLOT, x)}; }
inline bool simd_any(bool x) { return emulate::collective(emulate::BALLOT, x) != 0; }

enum class mem_flags {
    mem_none,
    mem_device,
    mem_threadgroup
};
inline void simdgroup_barrier(mem_flags) { emulate::collective(emulate::SYNC, 0); }
inline void threadgroup_barrier(mem_flags) { emulate::block_barrier(); }

// Fibers are not preempted, so plain code is atomic.
enum memory_order {
    memory_order_relaxed
};
struct atomic_uint {
    uint value;
};
struct atomic_int {
    int value;
};
inline uint atomic_fetch_add_explicit(atomic_uint *at, uint x, memory_order) {
    uint old = at->value;
    at->value += x;
    return old;
}
inline int atomic_fetch_min_explicit(atomic_int *at, int x, memory_order) {
    int old = at->value;
    at->value = min(old, x);
    return old;
}
inline int atomic_fetch_max_explicit(atomic_int *at, int x, memory_order) {
    int old = at->value;
    at->value = max(old, x);
    return old;
}

struct ulong2 {
    ulong x, y;
    ulong2(ulong both) : x(both), y(both) {}
    ulong2(ulong x, ulong y) : x(x), y(y) {}
};

template <class T, int C, int R> struct simdgroup_matrix {
    static_assert(C == 8 && R == 8, "matrices are 8 x 8");
    T element[2];
};
template <class T, int C, int R = C> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T x) { return {{x, x}}; }

// Element (row, column) is at row * elements_per_row + column; transposed, at column * .. + row.
template <class T>
void simdgroup_load(simdgroup_matrix<T, 8, 8> &m, const T *from, ulong elements_per_row = 8, ulong2 origin = 0,
                    bool transpose = false) {
    emulate::collective(emulate::MATRIX_LOAD, 0);
    for (uint e = 0; e < 2; e++) {
        uint at = emulate::matrix_element(emulate::lane(), e), row = at / 8, column = at % 8;
        ulong x = origin.x + (transpose ? row : column), y = origin.y + (transpose ? column : row);
        m.element[e] = from[y * elements_per_row + x];
    }
}
template <class T>
void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T *to, ulong elements_per_row = 8, ulong2 origin = 0,
                     bool transpose = false) {
    emulate::collective(emulate::MATRIX_STORE, 0);
    for (uint e = 0; e < 2; e++) {
        uint at = emulate::matrix_element(emulate::lane(), e), row = at / 8, column = at % 8;
        ulong x = origin.x + (transpose ? row : column), y = origin.y + (transpose ? column : row);
        to[y * elements_per_row + x] = m.element[e];
    }
}
template <class A, class B>
void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8> &d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
    emulate::MatrixMultiply m;
    for (int e = 0; e < 2; e++) {
        m.a[e] = float(a.element[e]);
        m.b[e] = float(b.element[e]);
        m.c[e] = c.element[e];
    }
    emulate::collective(emulate::MATRIX_MULTIPLY, 0, &m);
    d.element[0] = m.d[0];
    d.element[1] = m.d[1];
}

} // namespace gd_metal

#define GD_REGISTER(name) static const emulate::MetalEntry entry_##name(#name, __FILE__, name);
#define GD_SHARED(type, name)                                                                                          \
    static const char name##_tag = 0;                                                                                  \
    gd_type<type> &name = *static_cast<gd_type<type> *>(emulate::static_shared(&name##_tag, sizeof(type)))
#define GD_DYNAMIC_SHARED(type, name) emulate::Dynamic<type> name
#define gd_present emulate::present
#define gd_features emulate::features
#define gd_rows emulate::rows

// Address spaces are checked by strict_metal.h alone.
#define KERNEL(threads) static void
#define device
#define constant const
#define threadgroup
#define thread
