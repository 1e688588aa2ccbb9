// Instantiations of the causal convolution.
#include "../shared/causal_conv.h"

#define CONV(T)                                                                                                        \
    KERNEL(128)                                                                                                        \
    causal_conv_forward_##T##_metal(constant CausalConvParams &p [[buffer(0)]], const device T *x [[buffer(1)]],       \
                                    const device T *weight [[buffer(2)]], const device T *past [[buffer(3)]],          \
                                    const device i32 *table [[buffer(4)]], device T *y [[buffer(5)]], GD_THREAD) {     \
        causal_conv_forward<T>(GD_HERE, p, x, weight, GD_IF_PRESENT(3, past), table, y);                               \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_forward_##T##_metal)                                                                       \
    KERNEL(128)                                                                                                        \
    causal_conv_backward_##T##_metal(constant CausalConvParams &p [[buffer(0)]], const device T *x [[buffer(1)]],      \
                                     const device T *weight [[buffer(2)]], const device T *past [[buffer(3)]],         \
                                     const device i32 *table [[buffer(4)]], const device T *dy [[buffer(5)]],          \
                                     device T *dx [[buffer(6)]], device float *parts [[buffer(7)]], GD_THREAD) {       \
        causal_conv_backward<T>(GD_HERE, p, x, weight, GD_IF_PRESENT(3, past), table, dy, dx, parts);                  \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_backward_##T##_metal)                                                                      \
    KERNEL(128)                                                                                                        \
    causal_conv_weight_gradient_##T##_metal(constant CausalConvParams &p [[buffer(0)]],                                \
                                            const device float *parts [[buffer(1)]], device T *dweight [[buffer(2)]],  \
                                            GD_THREAD) {                                                               \
        causal_conv_weight_gradient<T>(GD_HERE, p, parts, dweight);                                                    \
    }                                                                                                                  \
    GD_REGISTER(causal_conv_weight_gradient_##T##_metal)

CONV(f32)
CONV(f16)
CONV(bf16)
