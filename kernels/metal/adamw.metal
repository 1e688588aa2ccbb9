// Instantiations of AdamW and of the norm before it.
#include "../shared/adamw.h"

#define ADAMW(T)                                                                                                       \
    KERNEL(256)                                                                                                        \
    squares_##T##_metal(constant SquaresParams &p [[buffer(0)]], const device T *gradient [[buffer(1)]],               \
                        device float *parts [[buffer(2)]], GD_THREAD) {                                                \
        GD_SHARED(Total[256], sums);                                                                                   \
        squares<T>(GD_HERE, p, sums, gradient, parts);                                                                 \
    }                                                                                                                  \
    GD_REGISTER(squares_##T##_metal)                                                                                   \
    KERNEL(256)                                                                                                        \
    adamw_##T##_metal(constant AdamwParams &p [[buffer(0)]], const device ClipResult *result [[buffer(1)]],            \
                      const device ClipResult *before [[buffer(2)]], const device T *gradient [[buffer(3)]],           \
                      device float *m [[buffer(4)]], device float *v [[buffer(5)]],                                    \
                      device float *master [[buffer(6)]], device T *parameter [[buffer(7)]], GD_THREAD) {              \
        adamw<T>(GD_HERE, p, result, GD_IF_PRESENT(2, before), gradient, m, v, GD_IF_PRESENT(6, master), parameter);   \
    }                                                                                                                  \
    GD_REGISTER(adamw_##T##_metal)

ADAMW(f32)
ADAMW(f16)
ADAMW(bf16)

KERNEL(256)
clip_metal(constant ClipParams &p [[buffer(0)]], const device float *parts [[buffer(1)]],
           const device float *losses [[buffer(2)]], device ClipResult *result [[buffer(3)]], GD_THREAD) {
    GD_SHARED(Total[256], sums);
    clip(GD_HERE, p, sums, parts, losses, result);
}
GD_REGISTER(clip_metal)
