// Tiles of rows in threadgroup memory, and the scores of query rows against them by 8 x 8 matrices.
#pragma once
#include "../shared/row.h"

// Element type of a tile: bf16 is widened to f32, since simdgroup matrices of bfloat need Metal 3.1.
template <class T> struct Element {
    typedef T type;
    static INLINE T of(T x) { return x; }
};
template <> struct Element<bf16> {
    typedef float type;
    static INLINE float of(bf16 x) { return to_float(x); }
};

// The key rows of a tensor; row(r) is null beyond the last.
template <class T> struct KeyRows {
    const device T *first;
    u32 stride, rows;

    const device T *row(u32 r) const { return r < rows ? first + size_t(r) * stride : nullptr; }
};

// Loads ROWS rows from `first` on, zeros beyond the last row and beyond dim; by all threads of a block.
template <class T, int D, int ROWS, class Rows>
INLINE void load_rows(Thread me, threadgroup typename Element<T>::type *tile, const thread Rows &rows, u32 first,
                      u32 dim) {
    typedef typename Element<T>::type E;
    constexpr u32 PITCH = D + 16 / sizeof(E);
    for (u32 c = me.index; c < ROWS * D / 4; c += me.threads) {
        u32 r = c / (D / 4), d = c % (D / 4) * 4;
        const device T *row = rows.row(first + r);
        threadgroup E *to = tile + r * PITCH + d;
        if (!row || d >= dim) {
            for (u32 x = 0; x < 4; x++)
                to[x] = Element<T>::of(from_float<T>(0.0f));
        } else if (has(FEATURE_VECTOR_LOADS)) {
            vec<T, 4> from = *reinterpret_cast<const device vec<T, 4> *>(row + d);
            for (u32 x = 0; x < 4; x++)
                to[x] = Element<T>::of(from[x]);
        } else {
            for (u32 x = 0; x < 4; x++)
                to[x] = Element<T>::of(row[d + x]);
        }
    }
}

// The query rows of a simdgroup, in registers, and their products with keys.
template <class T, int D, int MT, int KEYS> struct Scoring {
    typedef typename Element<T>::type E;
    // Rows are padded by 16 bytes, so that consecutive rows start in different banks.
    static constexpr constant u32 ROWS = 8 * MT, PITCH = D + 16 / sizeof(E), OUT = KEYS + 4;
    simdgroup_matrix<E, 8, 8> q[MT][D / 8];

    void load_queries(const threadgroup E *tile) {
        for (int m = 0; m < MT; m++)
            for (int s = 0; s < D / 8; s++)
                simdgroup_load(q[m][s], tile + m * 8 * PITCH + s * 8, PITCH);
    }

    // Products of the rows with the keys of a tile: out [ROWS, OUT].
    void scores(const threadgroup E *tile, threadgroup float *out) {
        for (int n = 0; n < KEYS / 8; n++) {
            simdgroup_matrix<float, 8, 8> sum[MT];
            for (int m = 0; m < MT; m++)
                sum[m] = make_filled_simdgroup_matrix<float, 8>(0.0f);
#pragma unroll
            for (int s = 0; s < D / 8; s++) {
                simdgroup_matrix<E, 8, 8> k;
                simdgroup_load(k, tile + n * 8 * PITCH + s * 8, PITCH, ulong2(0, 0), true);
                for (int m = 0; m < MT; m++)
                    simdgroup_multiply_accumulate(sum[m], q[m][s], k, sum[m]);
            }
            for (int m = 0; m < MT; m++)
                simdgroup_store(sum[m], out + m * 8 * OUT + n * 8, OUT);
        }
    }
};
