// Instantiations of the gated activation.
#include "../shared/swiglu.h"

#define SWIGLU(T)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        swiglu_forward_##T##_sm80(SwigluParams p, const T *gate, const T *up, T *y) {                                  \
        swiglu_forward<T>(this_thread(), p, gate, up, y);                                                              \
    }                                                                                                                  \
    GD_REGISTER(swiglu_forward_##T##_sm80)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 4)                                                               \
        swiglu_backward_##T##_sm80(SwigluParams p, const T *gate, const T *up, const T *dy, T *dgate, T *dup) {        \
        swiglu_backward<T>(this_thread(), p, gate, up, dy, dgate, dup);                                                \
    }                                                                                                                  \
    GD_REGISTER(swiglu_backward_##T##_sm80)

SWIGLU(f16)
SWIGLU(bf16)
SWIGLU(f32)
