// Instantiations of decoding with 8-bit keys: dtypes and head_dims.
#include "decode_certified.cuh"

#define DECODE(T, D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128, D > 192 ? 2 : 3) decode_certified_##T##_d##D##_sm80(             \
        DecodeParams p, const T *q, const T *k, const int8_t *codes, const float4 *stats, const float *beta,           \
        const float *prior, const i32 *table, const i32 *pages, const T *v, const float *threshold, uint64_t *winners, \
        u32 *lower, u32 *counter, Candidate *candidates, i32 *index, float *energy, T *y) {                            \
        decode_certified<T, D>(p, q, k, codes, stats, beta, prior, table, pages, v, threshold,                         \
                               {winners, lower, counter, candidates}, index, energy, y);                               \
    }                                                                                                                  \
    GD_REGISTER(decode_certified_##T##_d##D##_sm80)

#define DECODES(T)                                                                                                     \
    DECODE(T, 32)                                                                                                      \
    DECODE(T, 64)                                                                                                      \
    DECODE(T, 96)                                                                                                      \
    DECODE(T, 128)                                                                                                     \
    DECODE(T, 192)                                                                                                     \
    DECODE(T, 256)

DECODES(f16)
DECODES(bf16)
DECODES(f32)
