// Tiles of keys in shared memory, and the scores of query rows against them.
//
// Both implementations of scores give a warp the fragment layout of mma m16n8k16: with g = lane / 4, t = lane % 4 a
// lane holds, of every 16 rows, rows g and g + 8, and of every 8 keys, keys 2t and 2t + 1.
#pragma once
#include "row.cuh"

// Keys of a group: four matrices of 8 keys.
constexpr int GROUP = 32;

// The rows of a strided tensor.
template <class T> struct Source {
    const T *first;
    u32 stride;
    u32 rows;
    u32 dim;
    bool aligned;
};

// Loads rows first..first + ROWS, zeros beyond the tensor's rows and dim; asynchronous where aligned.
template <class T, int DP, int ROWS> __device__ __forceinline__ void load_rows(T *tile, const Source<T> &s, u32 first) {
    constexpr int V = 16 / sizeof(T), CHUNKS = DP / V, PITCH = DP + V;
    for (u32 c = threadIdx.x; c < u32(ROWS * CHUNKS); c += blockDim.x) {
        u32 row = first + c / CHUNKS, d = c % CHUNKS * V;
        T *to = tile + c / CHUNKS * PITCH + d;
        bool inside = row < s.rows && d < s.dim;
        const T *from = inside ? s.first + size_t(row) * s.stride + d : s.first;
        if (s.aligned) {
            copy_async(to, from, inside ? 16 : 0);
        } else {
            for (int x = 0; x < V; x++)
                to[x] = inside ? from[x] : T{};
        }
    }
}

// Loads the biases of a tile. Rows of biases are padded to whole tiles.
template <int KEYS> __device__ __forceinline__ void load_bias(float *to, const float *bias, size_t first) {
    for (u32 c = threadIdx.x; c < KEYS / 4; c += blockDim.x)
        copy_async(to + 4 * c, bias + first + 4 * c, 16);
}

// The greatest score among keys that lanes propose (key -1: none), ties by the rule; the same in all lanes.
__device__ __forceinline__ i32 argmax_key(float score, i32 key, u32 tie) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        float s = __shfl_xor_sync(ALL, score, step);
        i32 j = __shfl_xor_sync(ALL, key, step);
        bool wins = j >= 0 && (key < 0 || s > score || (s == score && wins_tie(j, key, tie)));
        if (wins) score = s, key = j;
    }
    return key;
}

// Scores by tensor cores: 16-bit inputs, f32 sums. Queries stay in registers.
template <class T, int DP, int MT> struct Mma {
    static constexpr int KEYS = 64, PITCH = DP + 8, ROWS = 16 * MT;
    static constexpr int QUERY_BYTES = 0;
    uint32_t a[MT][DP / 16][4];

    // Two neighbouring elements of a row; zeros beyond its end.
    static __device__ __forceinline__ uint32_t pair(const T *row, u32 d, u32 dim, bool aligned) {
        if (!row || d >= dim) return 0;
        if (aligned) return *reinterpret_cast<const uint32_t *>(row + d);
        return row[d].bits | uint32_t(row[d + 1].bits) << 16;
    }

    // row(r) is row r of the warp, null where there is none.
    template <class Row> __device__ __forceinline__ void load_queries(T *, u32 dim, bool aligned, bool, Row row) {
        u32 g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const T *upper = row(m * 16 + g), *lower = row(m * 16 + g + 8);
#pragma unroll
            for (int s = 0; s < DP / 16; s++) {
                a[m][s][0] = pair(upper, s * 16 + 2 * t, dim, aligned);
                a[m][s][1] = pair(lower, s * 16 + 2 * t, dim, aligned);
                a[m][s][2] = pair(upper, s * 16 + 2 * t + 8, dim, aligned);
                a[m][s][3] = pair(lower, s * 16 + 2 * t + 8, dim, aligned);
            }
        }
    }

    // Adds the products with 8 NT keys of a tile, from key `first` on, to acc (which holds their biases).
    template <int NT> __device__ __forceinline__ void scores(const T *tile, int first, float (&acc)[MT][NT][4]) const {
        u32 lane = lane_id();
        // Lane l names a row of one of: keys 0..8 at k 0 and 8, keys 8..16 at k 0 and 8.
        const T *from = tile + (first + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
        for (int s = 0; s < DP / 16; s++) {
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t b[4];
                load_matrices(b, from + n * 8 * PITCH + s * 16);
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    mma(acc[m][n], a[m][s], b[0], b[1], T{});
                    mma(acc[m][n + 1], a[m][s], b[2], b[3], T{});
                }
            }
        }
    }

    // The key with the greatest score for row 8 * half + g of matrix M among the keys of tile `tile` that lanes of
    // column pair t hold. The products are computed again on gathered keys and have the same bits.
    template <int M>
    __device__ __forceinline__ i32 find(const T *, const Source<T> &k, const float *bias, u32 tile, u32 t, int half,
                                        u32 g, Range range, u32 tie) const {
        u32 lane = lane_id(), n = lane / 4, c = lane % 4;
        float score = -GD_INFINITY;
        i32 key = -1;
        for (int x = 0; x < 2; x++) {
            auto at = [&](u32 n) { return tile * KEYS + (x * 4 + n / 2) * 8 + 2 * t + n % 2; };
            const T *row = at(n) < k.rows ? k.first + size_t(at(n)) * k.stride : nullptr;
            float acc[4] = {bias[at(2 * c)], bias[at(2 * c + 1)], bias[at(2 * c)], bias[at(2 * c + 1)]};
#pragma unroll
            for (int s = 0; s < DP / 16; s++) {
                uint32_t b0 = pair(row, s * 16 + 2 * c, k.dim, k.aligned);
                uint32_t b1 = pair(row, s * 16 + 2 * c + 8, k.dim, k.aligned);
                mma(acc, a[M][s], b0, b1, T{});
            }
            for (u32 e = 0; e < 2; e++) {
                float s = half ? acc[2 + e] : acc[e];
                i32 j = i32(at(2 * c + e));
                bool open = lane / 4 == g && j >= range.lo && j < range.hi;
                if (open && (s > score || (s == score && key >= 0 && wins_tie(j, key, tie)))) score = s, key = j;
            }
        }
        return argmax_key(score, key, tie);
    }
};

// Scores in f32: every score is one chain of fused multiply-adds that begins with the bias.
template <class T, int DP, int MT> struct Ffma {
    static_assert(MT == 1 && sizeof(T) == 4, "one matrix of rows of f32");
    static constexpr int KEYS = 32, PITCH = DP + 4, ROWS = 16;
    static constexpr int QUERY_BYTES = ROWS * PITCH * 4;
    const float *queries;

    // Where several warps share the rows, one of them stores them; a block barrier must follow before the others read.
    template <class Row> __device__ __forceinline__ void load_queries(T *to, u32 dim, bool, bool store, Row row) {
        for (int r = 0; store && r < ROWS; r++) {
            const T *from = row(r);
            for (u32 d = lane_id(); d < DP; d += 32)
                to[r * PITCH + d] = from && d < dim ? from[d] : 0.0f;
        }
        __syncwarp();
        queries = to;
    }

    template <int NT> __device__ __forceinline__ void scores(const T *tile, int first, float (&acc)[MT][NT][4]) const {
        u32 g = lane_id() / 4, t = lane_id() % 4;
        const float *q = queries + g * PITCH, *k = tile + (first + 2 * t) * PITCH;
#pragma unroll 4
        for (int d = 0; d < DP; d += 4) {
            float4 x = *reinterpret_cast<const float4 *>(q + d);
            float4 y = *reinterpret_cast<const float4 *>(q + 8 * PITCH + d);
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float4 z = *reinterpret_cast<const float4 *>(k + (n * 8 + e) * PITCH + d);
                    float &upper = acc[0][n][e], &lower = acc[0][n][2 + e];
                    upper = fmaf(x.w, z.w, fmaf(x.z, z.z, fmaf(x.y, z.y, fmaf(x.x, z.x, upper))));
                    lower = fmaf(y.w, z.w, fmaf(y.z, z.z, fmaf(y.y, z.y, fmaf(y.x, z.x, lower))));
                }
            }
        }
    }

    template <int M>
    __device__ __forceinline__ i32 find(const T *, const Source<T> &k, const float *bias, u32 tile, u32 t, int half,
                                        u32 g, Range range, u32 tie) const {
        u32 x = lane_id() % 8;
        i32 j = i32(tile * KEYS + x / 2 * 8 + 2 * t + x % 2);
        bool open = lane_id() < 8 && j >= range.lo && j < range.hi;
        float score = -GD_INFINITY;
        if (open) {
            score = bias[j];
            const float *q = queries + (g + 8 * half) * PITCH, *row = k.first + size_t(j) * k.stride;
            for (u32 d = 0; d < k.dim; d++)
                score = fmaf(q[d], row[d], score);
        }
        // A key whose score is NaN or -inf is no candidate.
        return argmax_key(score, score > -GD_INFINITY ? j : -1, tie);
    }
};

// The implementation of scores for a dtype.
template <class T> struct Scoring {
    template <int DP, int MT> using Of = Mma<T, DP, MT>;
};
template <> struct Scoring<float> {
    template <int DP, int MT> using Of = Ffma<float, DP, MT>;
};
