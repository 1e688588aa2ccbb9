// Instantiations of the causal convolution.
#include "../shared/conv.h"

#define CONV(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128, 8)                                                            \
        conv_forward_##T##_sm80(ConvParams p, const T *x, const T *weight, const T *past, const i32 *table, T *y) { \
        conv_forward<T>(here(), p, x, weight, past, table, y);                                                      \
    }                                                                                                               \
    GD_REGISTER(conv_forward_##T##_sm80)                                                                            \
    extern "C" __global__ void __launch_bounds__(128, 8)                                                            \
        conv_backward_##T##_sm80(ConvParams p, const T *x, const T *weight, const T *past, const i32 *table,        \
                                 const T *dy, T *dx, float *parts) {                                                \
        conv_backward<T>(here(), p, x, weight, past, table, dy, dx, parts);                                         \
    }                                                                                                               \
    GD_REGISTER(conv_backward_##T##_sm80)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, 8)                                                            \
        conv_weights_##T##_sm80(ConvParams p, const float *parts, T *dweight) {                                     \
        conv_weights<T>(here(), p, parts, dweight);                                                                 \
    }                                                                                                               \
    GD_REGISTER(conv_weights_##T##_sm80)

CONV(f16)
CONV(bf16)
CONV(f32)
