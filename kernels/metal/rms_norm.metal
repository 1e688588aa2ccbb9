// Instantiations of root-mean-square normalisation.
#include "../shared/rms_norm.h"

#define NORM(T)                                                                                                        \
    KERNEL(256)                                                                                                        \
    rms_norm_forward_##T##_metal(constant RmsNormParams &p [[buffer(0)]], const device T *x [[buffer(1)]],             \
                                 const device T *weight [[buffer(2)]], device T *y [[buffer(3)]], GD_THREAD) {         \
        rms_norm_forward<T>(GD_HERE, p, x, weight, y);                                                                 \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_forward_##T##_metal)                                                                          \
    KERNEL(256)                                                                                                        \
    rms_norm_backward_##T##_metal(constant RmsNormParams &p [[buffer(0)]], const device T *x [[buffer(1)]],            \
                                  const device T *weight [[buffer(2)]], const device T *dy [[buffer(3)]],              \
                                  device T *dx [[buffer(4)]], device float *parts [[buffer(5)]], GD_THREAD) {          \
        GD_SHARED(float[NORM_MAX_BLOCK_ROWS], inverse);                                                                \
        rms_norm_backward<T>(GD_HERE, p, inverse, x, weight, dy, dx, parts);                                           \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_backward_##T##_metal)                                                                         \
    KERNEL(256)                                                                                                        \
    rms_norm_weight_gradient_##T##_metal(constant RmsNormParams &p [[buffer(0)]],                                      \
                                         const device float *parts [[buffer(1)]], device T *dweight [[buffer(2)]],     \
                                         GD_THREAD) {                                                                  \
        GD_SHARED(Total[256], sums);                                                                                   \
        rms_norm_weight_gradient<T>(GD_HERE, p, sums, parts, dweight);                                                 \
    }                                                                                                                  \
    GD_REGISTER(rms_norm_weight_gradient_##T##_metal)

NORM(f32)
NORM(f16)
NORM(bf16)
