// Instantiations of the gated running average.
#include "../shared/running_average.h"

// At least one block per multiprocessor: the compiler may use all registers that it needs.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)

#define AVERAGE(T)                                                                                                     \
    KERNEL(256)                                                                                                        \
    running_average_weights_##T##_sm80(RunningAverageParams p, const T *decay, const T *write, const float *start,     \
                                       float *weights, float *last) {                                                  \
        GD_SHARED(float[AVERAGE_SCAN_THREADS / 16], part);                                                             \
        GD_SHARED(float[AVERAGE_SCAN_THREADS], logs);                                                                  \
        running_average_weights<T>(this_thread(), p, part, logs, decay, write, start, weights, last);                  \
    }                                                                                                                  \
    GD_REGISTER(running_average_weights_##T##_sm80)                                                                    \
    KERNEL(1024)                                                                                                       \
    running_average_partial_##T##_sm80(RunningAverageParams p, const T *v, const float *weights, float *carry,         \
                                       float *joint) {                                                                 \
        running_average_partial<T>(this_thread(), p, v, weights, carry, joint);                                        \
    }                                                                                                                  \
    GD_REGISTER(running_average_partial_##T##_sm80)                                                                    \
    KERNEL(1024)                                                                                                       \
    running_average_rows_##T##_sm80(RunningAverageParams p, const T *v, const float *weights, const float *carry,      \
                                    T *m) {                                                                            \
        running_average_rows<T>(this_thread(), p, v, weights, carry, m);                                               \
    }                                                                                                                  \
    GD_REGISTER(running_average_rows_##T##_sm80)                                                                       \
    KERNEL(1024)                                                                                                       \
    running_average_partial_backward_##T##_sm80(RunningAverageParams p, const T *dm, const float *weights,             \
                                                float *carry, float *joint) {                                          \
        running_average_partial_backward<T>(this_thread(), p, dm, weights, carry, joint);                              \
    }                                                                                                                  \
    GD_REGISTER(running_average_partial_backward_##T##_sm80)                                                           \
    KERNEL(1024)                                                                                                       \
    running_average_rows_backward_##T##_sm80(RunningAverageParams p, const T *v, const T *m, const T *dm,              \
                                             const float *weights, const float *carry, const float *start, T *dv,      \
                                             float *dtake) {                                                           \
        GD_DYNAMIC_SHARED(shared);                                                                                     \
        float *gradient = reinterpret_cast<float *>(shared);                                                           \
        running_average_rows_backward<T>(this_thread(), p, gradient, v, m, dm, weights, carry, start, dv, dtake);      \
    }                                                                                                                  \
    GD_REGISTER(running_average_rows_backward_##T##_sm80)                                                              \
    KERNEL(256)                                                                                                        \
    running_average_weights_backward_##T##_sm80(RunningAverageParams p, const T *decay, const float *weights,          \
                                                const float *dtake, T *ddecay, T *dwrite) {                            \
        GD_SHARED(float[AVERAGE_SCAN_THREADS / 16], part);                                                             \
        GD_SHARED(float[AVERAGE_SCAN_THREADS], after);                                                                 \
        running_average_weights_backward<T>(this_thread(), p, part, after, decay, weights, dtake, (p.dim + 31) / 32,   \
                                            ddecay, dwrite);                                                           \
    }                                                                                                                  \
    GD_REGISTER(running_average_weights_backward_##T##_sm80)

AVERAGE(f16)
AVERAGE(bf16)
AVERAGE(f32)

KERNEL(1024)
running_average_carry_sm80(RunningAverageParams p, const float *joint, const float *start, float *carry, float *last) {
    running_average_carry(this_thread(), p, joint, start, carry, last);
}
GD_REGISTER(running_average_carry_sm80)
KERNEL(1024) running_average_carry_backward_sm80(RunningAverageParams p, const float *joint, float *carry) {
    running_average_carry_backward(this_thread(), p, joint, carry);
}
GD_REGISTER(running_average_carry_backward_sm80)
