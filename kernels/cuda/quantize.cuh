// Quantisation of rows to 8-bit integers with error bounds: x = scale Q + r with |Q| <= 127. Integers and scales are
// bitwise those of the CPU implementation.
#pragma once
#include "row.cuh"

// A row whose greatest magnitude is outside of this range is not quantised: inside of it no bound overflows or
// underflows in f32.
constexpr float MIN_QUANTIZED_MAGNITUDE = 1e-12f, MAX_QUANTIZED_MAGNITUDE = 1e15f;
// Factor that covers the rounding of the bounds themselves.
constexpr float ROUND_UP = 1.0f + 1e-4f;

// Scale and error bounds of a quantised row. A row that is not quantised has scale 0, and error and norm +inf; a row of
// zeros has all three 0.
struct Quantization {
    float scale;
    float error; // at least |r|
    float norm;  // at least |x| and |scale Q|
};

// Quantises a row of `dim` elements, at most 256, by a warp, and fills up to `width` with zeros.
template <class T> __device__ __forceinline__ Quantization quantize_row(const T *row, u32 dim, int8_t *out, u32 width) {
    float x[8];
    // The bits of floats without sign have the order of their magnitudes, with NaN above infinity.
    u32 largest = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 d = lane_id() + 32 * i;
        x[i] = d < dim ? to_float(row[d]) : 0.0f;
        largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        largest = max(largest, __shfl_xor_sync(ALL, largest, step));
    float magnitude = __uint_as_float(largest);
    bool quantized = magnitude >= MIN_QUANTIZED_MAGNITUDE && magnitude < MAX_QUANTIZED_MAGNITUDE;
    // 1.5 * 2^23: added to a small number it leaves no bits for a fraction.
    const float round = 12582912.0f, scale = quantized ? magnitude / 127.0f : 0.0f;
    const float inverse = quantized ? 127.0f / magnitude : 0.0f;
    float square = 0, residual = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 d = lane_id() + 32 * i;
        // No fused step: the integers are those of the CPU, to the bit.
        int8_t code = quantized ? int8_t(__float_as_uint(__fadd_rn(__fmul_rn(x[i], inverse), round))) : int8_t(0);
        if (d < width) out[d] = code;
        float rest = fmaf(-scale, float(code), x[i]);
        square = fmaf(x[i], x[i], square);
        residual = fmaf(rest, rest, residual);
    }
    float error = sqrtf(warp_sum(residual)) * ROUND_UP;
    if (quantized) return {scale, error, sqrtf(warp_sum(square)) * ROUND_UP + error};
    return largest == 0 ? Quantization{0.0f, 0.0f, 0.0f} : Quantization{0.0f, GD_INFINITY, GD_INFINITY};
}

// Quantises keys into a cache: codes [sequences, Hk, capacity, width], stats [sequences, Hk, capacity] with scale,
// error, norm and the bias without a prior, bitwise as key_bias computes it. One warp per key.
template <class T>
__device__ __forceinline__ void quantize_keys(const QuantizeParams &p, const T *k, int8_t *codes, float4 *stats) {
    u32 row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.sequences * p.kv_heads * p.keys) return;
    u32 j = row % p.keys, head = row / p.keys;
    const T *key =
        k + size_t(head / p.kv_heads) * p.k_batch + size_t(head % p.kv_heads) * p.k_head + size_t(j) * p.k_row;
    size_t to = size_t(head) * p.capacity + p.first + j;
    Quantization x = quantize_row(key, p.head_dim, codes + to * p.width, p.width);
    float bias = key_bias(this_thread(), p.score, key, p.head_dim);
    if (lane_id() == 0) stats[to] = {x.scale, x.error, x.norm, bias};
}
