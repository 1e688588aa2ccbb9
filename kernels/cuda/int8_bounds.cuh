// Scores of 8-bit integers with a bound of their error.
//
// With q = q^ + r_q, k = k^ + r_k (hats quantised), <q, k> - <q^, k^> = <q, r_k> + <r_q, k^>, which is at most
// |q| e_k + e_q |k^|. The rounding errors of the native score and of the bound itself are added.
#pragma once
#include "../shared/mask.h"
#include "quantize.cuh"
#include "tile.cuh"

// Greatest magnitude of a bias for which bounds are computed: a greater one could overflow the bound of a score.
constexpr float MAX_BOUNDED_BIAS = 1e37f;

// Bound of the rounding error of a native score, relative to |q| |k| + |b|. A tensor core adds 8 products at a time to
// the accumulator, each truncated at 2^-23 of the greatest: 9 / 8 of that per product, 2.25 D units of 2^-24 in total.
// A chain of D fused multiply-adds stays within D units. The rest covers the operations of the bound itself.
__device__ __forceinline__ float rounding(u32 dim) { return float(4 * dim + 64) * (1.0f / 16777216.0f); }

// The greatest ratio of error to norm among 16 rows, the same in all lanes.
__device__ __forceinline__ float coarseness(const Quantization *rows) {
    Quantization x = rows[lane_id() % 16];
    float ratio = x.norm > 0 && finite(x.error) ? x.error / x.norm * (1.0f + 1e-6f) : 0.0f;
#pragma unroll
    for (int step = 8; step > 0; step /= 2)
        ratio = fmaxf(ratio, __shfl_xor_sync(ALL, ratio, step));
    return ratio;
}

// The bounds of a key: its score is within scale f +- (norm error) + [lower_bias, upper_bias], with f the integer
// product times the scale of the row.
struct KeyBound {
    float scale, error, lower_bias, upper_bias;
    bool allowed; // false for a key of bias -inf, which is no candidate

    // `coarse` is the rows' coarseness plus rounding.
    __device__ __forceinline__ KeyBound(float4 stats, float bias, float coarse, float rounding) {
        float slack = rounding * fabsf(bias);
        scale = stats.x;
        // Written so that NaN has no bound either; a key without one is scored exactly.
        error = fabsf(bias) <= MAX_BOUNDED_BIAS ? fmaf(coarse, stats.z, stats.y) : GD_INFINITY;
        if (GD_FAULT(80)) error *= 0.25f;
        lower_bias = bias - slack, upper_bias = bias + slack;
        allowed = !(bias == -GD_INFINITY);
    }
};

// 16 query rows as integers, in fragments; lane as for mma.
template <int DP> struct Integers {
    static constexpr int PITCH = DP + 16;
    uint32_t a[DP / 32][4];

    // From rows [16, PITCH].
    __device__ __forceinline__ void load(const int8_t *rows) {
        const int8_t *from = rows + lane_id() / 4 * PITCH + lane_id() % 4 * 4;
#pragma unroll
        for (int s = 0; s < DP / 32; s++) {
#pragma unroll
            for (int x = 0; x < 4; x++)
                a[s][x] = *reinterpret_cast<const uint32_t *>(from + x % 2 * 8 * PITCH + s * 32 + x / 2 * 16);
        }
    }

    // Adds the products with 8 NT keys of a tile [.., PITCH], from key `first` on.
    template <int NT> __device__ __forceinline__ void scores(const int8_t *tile, int first, i32 (&acc)[NT][4]) const {
        u32 lane = lane_id();
        // Lane l names a row of one of: keys 0..8 at bytes 0 and 16, keys 8..16 at bytes 0 and 16.
        const int8_t *from = tile + (first + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 16;
#pragma unroll
        for (int s = 0; s < DP / 32; s++) {
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                uint32_t b[4];
                load_matrices(b, from + n * 8 * PITCH + s * 32);
                mma(acc[n], a[s], b[0], b[1]);
                mma(acc[n + 1], a[s], b[2], b[3]);
            }
        }
    }
};

// Quantises 16 rows by the warps of a block; row(r) is null where there is none. Ends with a barrier.
template <class T, int DP, class Row>
__device__ __forceinline__ void quantize_rows(int8_t *codes, Quantization *stats, u32 dim, u32 warp, u32 warps,
                                              Row row) {
    for (u32 r = warp; r < 16; r += warps) {
        const T *from = row(r);
        Quantization x = quantize_row(from, from ? dim : 0, codes + r * Integers<DP>::PITCH, DP);
        if (lane_id() == 0) stats[r] = x;
    }
    __syncthreads();
}

// Exact scores of gathered keys: at most KEYS rows at a time are copied to the warp's part of shared memory and scored
// by the instructions of the native scan, so that the bits are the same.
template <class T> struct Gather {
    static constexpr int KEYS = sizeof(T) == 2 ? 16 : 8;
};

// Copies the rows row(0).. row(count - 1) of `dim` elements to tile [KEYS, PITCH]; zeros elsewhere.
template <class T, int DP, class Row>
__device__ __forceinline__ void gather_rows(T *tile, u32 count, u32 dim, bool aligned, Row row) {
    constexpr int V = 16 / sizeof(T), CHUNKS = DP / V, PITCH = DP + V;
    __syncwarp();
    for (u32 c = lane_id(); c < u32(Gather<T>::KEYS * CHUNKS); c += 32) {
        u32 x = c / CHUNKS, d = c % CHUNKS * V;
        T *to = tile + x * PITCH + d;
        bool inside = x < count && d < dim;
        if (inside && aligned) {
            *reinterpret_cast<float4 *>(to) = *reinterpret_cast<const float4 *>(row(x) + d);
        } else {
            for (int i = 0; i < V; i++)
                to[i] = inside ? row(x)[d + i] : T{};
        }
    }
    __syncwarp();
}
