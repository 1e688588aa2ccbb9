// Instantiations of decoding: dtypes and head_dims.
#include "decode.cuh"

#define DECODE(T, D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) decode_##T##_d##D##_sm80(                                        \
        DecodeParams p, const T *q, const T *k, const float *bias, const float *beta, const float *prior,              \
        const i32 *table, const i32 *pages, const T *v, const float *threshold, uint64_t *winners, u32 *counter,       \
        i32 *index, float *energy, T *y) {                                                                             \
        decode<T, D>(p, q, k, bias, beta, prior, table, pages, v, threshold, winners, counter, index, energy, y);      \
    }                                                                                                                  \
    GD_REGISTER(decode_##T##_d##D##_sm80)

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
