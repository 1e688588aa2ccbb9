// Instantiations of cross entropy.
#include "../shared/cross_entropy.h"

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

#define CROSS_ENTROPY(T)                                                                                               \
    KERNEL cross_entropy_forward_##T##_sm80(CrossEntropyParams p, const T *logits, const u32 *targets, float *losses,  \
                                            float *log_sums) {                                                         \
        GD_SHARED(float[256], maxima);                                                                                 \
        GD_SHARED(float[256], sums);                                                                                   \
        cross_entropy_forward<T>(this_thread(), p, maxima, sums, logits, targets, losses, log_sums);                   \
    }                                                                                                                  \
    GD_REGISTER(cross_entropy_forward_##T##_sm80)                                                                      \
    KERNEL cross_entropy_backward_##T##_sm80(CrossEntropyParams p, const T *logits, const u32 *targets,                \
                                             const float *log_sums, const float *dlosses, T *dlogits) {                \
        cross_entropy_backward<T>(this_thread(), p, logits, targets, log_sums, dlosses, dlogits);                      \
    }                                                                                                                  \
    GD_REGISTER(cross_entropy_backward_##T##_sm80)

CROSS_ENTROPY(f16)
CROSS_ENTROPY(bf16)
CROSS_ENTROPY(f32)
