// Instantiations of root-mean-square normalisation.
#include "../shared/rms_norm.h"

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

#define NORM(T)                                                                                                        \
    KERNEL rms_norm_forward_##T##_sm80(RmsNormParams p, const T *x, const T *weight, T *y) {                           \
        rms_norm_forward<T>(this_thread(), p, x, weight, y);                                                           \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_forward_##T##_sm80)                                                                           \
    KERNEL rms_norm_backward_##T##_sm80(RmsNormParams p, const T *x, const T *weight, const T *dy, T *dx,              \
                                        float *parts) {                                                                \
        GD_SHARED(float[NORM_MAX_BLOCK_ROWS], inverse);                                                                \
        rms_norm_backward<T>(this_thread(), p, inverse, x, weight, dy, dx, parts);                                     \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_backward_##T##_sm80)                                                                          \
    KERNEL rms_norm_weight_gradient_##T##_sm80(RmsNormParams p, const float *parts, T *dweight) {                      \
        GD_SHARED(Total[256], sums);                                                                                   \
        rms_norm_weight_gradient<T>(this_thread(), p, sums, parts, dweight);                                           \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_weight_gradient_##T##_sm80)

NORM(f16)
NORM(bf16)
NORM(f32)
