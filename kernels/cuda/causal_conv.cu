// Instantiations of the causal convolution.
#include "../shared/causal_conv.h"

#define CONV(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(128, 8) causal_conv_forward_##T##_sm80(                               \
        CausalConvParams p, const T *x, const T *weight, const T *past, const i32 *table, T *y) {                      \
        causal_conv_forward<T>(this_thread(), p, x, weight, past, table, y);                                           \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_forward_##T##_sm80)                                                                        \
    extern "C" __global__ void __launch_bounds__(128, 8)                                                               \
        causal_conv_backward_##T##_sm80(CausalConvParams p, const T *x, const T *weight, const T *past,                \
                                        const i32 *table, const T *dy, T *dx, float *parts) {                          \
        causal_conv_backward<T>(this_thread(), p, x, weight, past, table, dy, dx, parts);                              \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_backward_##T##_sm80)                                                                       \
    extern "C" __global__ void __launch_bounds__(128, 8)                                                               \
        causal_conv_weight_gradient_##T##_sm80(CausalConvParams p, const float *parts, T *dweight) {                   \
        causal_conv_weight_gradient<T>(this_thread(), p, parts, dweight);                                              \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_weight_gradient_##T##_sm80)

CONV(f16)
CONV(bf16)
CONV(f32)
