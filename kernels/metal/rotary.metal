// Instantiations of the rotary embedding.
#include "../shared/rotary.h"

#define ROTARY(T)                                                                                                      \
    KERNEL(256)                                                                                                        \
    rotary_##T##_metal(constant RotaryParams &p [[buffer(0)]], const device T *x [[buffer(1)]],                        \
                       const device float *cosines [[buffer(2)]], const device float *sines [[buffer(3)]],             \
                       const device u32 *table [[buffer(4)]], device T *y [[buffer(5)]], GD_THREAD) {                  \
        rotary<T>(GD_HERE, p, x, cosines, sines, table, y);                                                            \
    }                                                                                                                  \
    GD_REGISTER(rotary_##T##_metal)

ROTARY(f32)
ROTARY(f16)
ROTARY(bf16)
