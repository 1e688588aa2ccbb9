// Instantiations of the gated activation.
#include "../shared/swiglu.h"

#define SWIGLU(T)                                                                                                      \
    KERNEL(256)                                                                                                        \
    swiglu_forward_##T##_metal(constant SwigluParams &p [[buffer(0)]], const device T *gate [[buffer(1)]],             \
                               const device T *up [[buffer(2)]], device T *y [[buffer(3)]], GD_THREAD) {               \
        swiglu_forward<T>(GD_HERE, p, gate, up, y);                                                                    \
    }                                                                                                                  \
    GD_REGISTER(swiglu_forward_##T##_metal)                                                                            \
    KERNEL(256)                                                                                                        \
    swiglu_backward_##T##_metal(constant SwigluParams &p [[buffer(0)]], const device T *gate [[buffer(1)]],            \
                                const device T *up [[buffer(2)]], const device T *dy [[buffer(3)]],                    \
                                device T *dgate [[buffer(4)]], device T *dup [[buffer(5)]], GD_THREAD) {               \
        swiglu_backward<T>(GD_HERE, p, gate, up, dy, dgate, dup);                                                      \
    }                                                                                                                  \
    GD_REGISTER(swiglu_backward_##T##_metal)

SWIGLU(f32)
SWIGLU(f16)
SWIGLU(bf16)
