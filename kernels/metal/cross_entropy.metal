// Instantiations of cross entropy.
#include "../shared/cross_entropy.h"

#define CROSS_ENTROPY(T)                                                                                               \
    KERNEL(256)                                                                                                        \
    cross_entropy_forward_##T##_metal(constant CrossEntropyParams &p [[buffer(0)]],                                    \
                                      const device T *logits [[buffer(1)]], const device u32 *targets [[buffer(2)]],   \
                                      device float *losses [[buffer(3)]], device float *log_sums [[buffer(4)]],        \
                                      GD_THREAD) {                                                                     \
        GD_SHARED(float[256], maxima);                                                                                 \
        GD_SHARED(float[256], sums);                                                                                   \
        cross_entropy_forward<T>(GD_HERE, p, maxima, sums, logits, targets, losses, log_sums);                         \
    }                                                                                                                  \
    GD_REGISTER(cross_entropy_forward_##T##_metal)                                                                     \
    KERNEL(256)                                                                                                        \
    cross_entropy_backward_##T##_metal(                                                                                \
        constant CrossEntropyParams &p [[buffer(0)]], const device T *logits [[buffer(1)]],                            \
        const device u32 *targets [[buffer(2)]], const device float *log_sums [[buffer(3)]],                           \
        const device float *dlosses [[buffer(4)]], device T *dlogits [[buffer(5)]], GD_THREAD) {                       \
        cross_entropy_backward<T>(GD_HERE, p, logits, targets, log_sums, dlosses, dlogits);                            \
    }                                                                                                                  \
    GD_REGISTER(cross_entropy_backward_##T##_metal)

CROSS_ENTROPY(f32)
CROSS_ENTROPY(f16)
CROSS_ENTROPY(bf16)
