// Instantiations of the gated running average.
#include "../shared/running_average.h"

#define AVERAGE(T)                                                                                                     \
    KERNEL(256)                                                                                                        \
    running_average_weights_##T##_metal(constant RunningAverageParams &p [[buffer(0)]],                                \
                                        const device T *decay [[buffer(1)]], const device T *write [[buffer(2)]],      \
                                        const device float *start [[buffer(3)]], device float *weights [[buffer(4)]],  \
                                        device float *last [[buffer(5)]], GD_THREAD) {                                 \
        GD_SHARED(float[AVERAGE_SCAN_THREADS / 16], part);                                                             \
        GD_SHARED(float[AVERAGE_SCAN_THREADS], logs);                                                                  \
        running_average_weights<T>(GD_HERE, p, part, logs, decay, write, GD_IF_PRESENT(3, start), weights, last);      \
    }                                                                                                                  \
    GD_REGISTER(running_average_weights_##T##_metal)                                                                   \
    KERNEL(1024)                                                                                                       \
    running_average_partial_##T##_metal(constant RunningAverageParams &p [[buffer(0)]],                                \
                                        const device T *v [[buffer(1)]], const device float *weights [[buffer(2)]],    \
                                        device float *carry [[buffer(3)]], device float *joint [[buffer(4)]],          \
                                        GD_THREAD) {                                                                   \
        running_average_partial<T>(GD_HERE, p, v, weights, carry, joint);                                              \
    }                                                                                                                  \
    GD_REGISTER(running_average_partial_##T##_metal)                                                                   \
    KERNEL(1024)                                                                                                       \
    running_average_rows_##T##_metal(constant RunningAverageParams &p [[buffer(0)]], const device T *v [[buffer(1)]],  \
                                     const device float *weights [[buffer(2)]],                                        \
                                     const device float *carry [[buffer(3)]], device T *m [[buffer(4)]], GD_THREAD) {  \
        running_average_rows<T>(GD_HERE, p, v, weights, carry, m);                                                     \
    }                                                                                                                  \
    GD_REGISTER(running_average_rows_##T##_metal)                                                                      \
    KERNEL(1024)                                                                                                       \
    running_average_partial_backward_##T##_metal(                                                                      \
        constant RunningAverageParams &p [[buffer(0)]], const device T *dm [[buffer(1)]],                              \
        const device float *weights [[buffer(2)]], device float *carry [[buffer(3)]],                                  \
        device float *joint [[buffer(4)]], GD_THREAD) {                                                                \
        running_average_partial_backward<T>(GD_HERE, p, dm, weights, carry, joint);                                    \
    }                                                                                                                  \
    GD_REGISTER(running_average_partial_backward_##T##_metal)                                                          \
    KERNEL(1024)                                                                                                       \
    running_average_rows_backward_##T##_metal(                                                                         \
        constant RunningAverageParams &p [[buffer(0)]], const device T *v [[buffer(1)]],                               \
        const device T *m [[buffer(2)]], const device T *dm [[buffer(3)]], const device float *weights [[buffer(4)]],  \
        const device float *carry [[buffer(5)]], const device float *start [[buffer(6)]], device T *dv [[buffer(7)]],  \
        device float *dtake [[buffer(8)]], GD_DYNAMIC_SHARED(float, gradient), GD_THREAD) {                            \
        running_average_rows_backward<T>(GD_HERE, p, gradient, v, m, dm, weights, carry, GD_IF_PRESENT(6, start), dv,  \
                                         dtake);                                                                       \
    }                                                                                                                  \
    GD_REGISTER(running_average_rows_backward_##T##_metal)                                                             \
    KERNEL(256)                                                                                                        \
    running_average_weights_backward_##T##_metal(                                                                      \
        constant RunningAverageParams &p [[buffer(0)]], const device T *decay [[buffer(1)]],                           \
        const device float *weights [[buffer(2)]], const device float *dtake [[buffer(3)]],                            \
        device T *ddecay [[buffer(4)]], device T *dwrite [[buffer(5)]], GD_THREAD) {                                   \
        GD_SHARED(float[AVERAGE_SCAN_THREADS / 16], part);                                                             \
        GD_SHARED(float[AVERAGE_SCAN_THREADS], after);                                                                 \
        running_average_weights_backward<T>(GD_HERE, p, part, after, decay, weights, dtake, (p.dim + 31) / 32, ddecay, \
                                            dwrite);                                                                   \
    }                                                                                                                  \
    GD_REGISTER(running_average_weights_backward_##T##_metal)

AVERAGE(f32)
AVERAGE(f16)
AVERAGE(bf16)

KERNEL(1024)
running_average_carry_metal(constant RunningAverageParams &p [[buffer(0)]], const device float *joint [[buffer(1)]],
                            const device float *start [[buffer(2)]], device float *carry [[buffer(3)]],
                            device float *last [[buffer(4)]], GD_THREAD) {
    running_average_carry(GD_HERE, p, joint, GD_IF_PRESENT(2, start), carry, last);
}
GD_REGISTER(running_average_carry_metal)
KERNEL(1024)
running_average_carry_backward_metal(constant RunningAverageParams &p [[buffer(0)]],
                                     const device float *joint [[buffer(1)]], device float *carry [[buffer(2)]],
                                     GD_THREAD) {
    running_average_carry_backward(GD_HERE, p, joint, carry);
}
GD_REGISTER(running_average_carry_backward_metal)
