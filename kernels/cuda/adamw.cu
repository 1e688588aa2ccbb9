// Instantiations of AdamW and of the norm before it.
#include "../shared/adamw.h"

#define KERNEL extern "C" __global__ void __launch_bounds__(256, 4)

#define ADAMW(T)                                                                                                       \
    KERNEL squares_##T##_sm80(SquaresParams p, const T *gradient, float *parts) {                                      \
        GD_SHARED(Total[256], sums);                                                                                   \
        squares<T>(this_thread(), p, sums, gradient, parts);                                                           \
    }                                                                                                                  \
    GD_REGISTER(squares_##T##_sm80)                                                                                    \
    KERNEL adamw_##T##_sm80(AdamwParams p, const ClipResult *result, const ClipResult *before, const T *gradient,      \
                            float *m, float *v, float *master, T *parameter) {                                         \
        adamw<T>(this_thread(), p, result, before, gradient, m, v, master, parameter);                                 \
    }                                                                                                                  \
    GD_REGISTER(adamw_##T##_sm80)

ADAMW(f16)
ADAMW(bf16)
ADAMW(f32)

KERNEL clip_sm80(ClipParams p, const float *parts, const float *losses, ClipResult *result) {
    GD_SHARED(Total[256], sums);
    clip(this_thread(), p, sums, parts, losses, result);
}
GD_REGISTER(clip_sm80)
