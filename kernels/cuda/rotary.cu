// Instantiations of the rotary embedding.
#include "../shared/rotary.h"

#define ROTARY(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256, 4) rotary_##T##_sm80(                                            \
        RotaryParams p, const T *x, const float *cosines, const float *sines, const u32 *table, T *y) {                \
        rotary<T>(this_thread(), p, x, cosines, sines, table, y);                                                      \
    }                                                                                                                  \
    GD_REGISTER(rotary_##T##_sm80)

ROTARY(f16)
ROTARY(bf16)
ROTARY(f32)
