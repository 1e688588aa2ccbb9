// Instantiations of the entry of keys into a cache of 8-bit integers.
#include "quantize.cuh"

#define QUANTIZE(T)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        quantize_##T##_sm80(QuantizeParams p, const T *k, int8_t *codes, float4 *stats) {                              \
        quantize_keys<T>(p, k, codes, stats);                                                                          \
    }                                                                                                                  \
    GD_REGISTER(quantize_##T##_sm80)

QUANTIZE(f16)
QUANTIZE(bf16)
QUANTIZE(f32)
