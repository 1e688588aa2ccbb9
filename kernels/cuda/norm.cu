// Instantiations of root-mean-square normalisation.
#include "../shared/norm.h"

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

#define NORM(T)                                                                                                     \
    KERNEL norm_forward_##T##_sm80(NormParams p, const T *x, const T *weight, T *y) {                               \
        norm_forward<T>(here(), p, x, weight, y);                                                                   \
    }                                                                                                               \
    GD_REGISTER(norm_forward_##T##_sm80)                                                                            \
    KERNEL norm_backward_##T##_sm80(NormParams p, const T *x, const T *weight, const T *dy, T *dx, float *parts) {  \
        GD_SHARED(float[NORM_CHUNK], inverse);                                                                      \
        norm_backward<T>(here(), p, inverse, x, weight, dy, dx, parts);                                             \
    }                                                                                                               \
    GD_REGISTER(norm_backward_##T##_sm80)                                                                           \
    KERNEL norm_weights_##T##_sm80(NormParams p, const float *parts, T *dweight) {                                  \
        GD_SHARED(Total[256], sums);                                                                                \
        norm_weights<T>(here(), p, sums, parts, dweight);                                                           \
    }                                                                                                               \
    GD_REGISTER(norm_weights_##T##_sm80)

NORM(f16)
NORM(bf16)
NORM(f32)
