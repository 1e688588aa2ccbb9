// How the scan is instantiated: the head_dims of a dtype. A dtype has a source of its own, so that they compile
// side by side.
#pragma once
#include "../shared/bias.h"
#include "scan_best.cuh"
#include "scan_list.cuh"

#define BIAS(T)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256)                                                               \
        scan_bias_##T##_sm80(BiasParams p, const T *k, const float *beta, const float *prior, float *bias) {        \
        scan_bias<T>(here(), p, k, beta, prior, bias);                                                              \
    }                                                                                                               \
    GD_REGISTER(scan_bias_##T##_sm80)

#define SCAN(T, D, MT)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                            \
        scan_best_##T##_d##D##_sm80(ScanParams p, const T *q, const T *k, const float *bias, const float *beta,     \
                                    const float *prior, const i32 *table, i32 *index, float *energy, const T *v,    \
                                    const float *threshold, T *y) {                                                 \
        scan_best<T, D, MT>(p, q, k, bias, beta, prior, table, index, energy, v, threshold, y);                     \
    }                                                                                                               \
    GD_REGISTER(scan_best_##T##_d##D##_sm80)                                                                        \
    extern "C" __global__ void __launch_bounds__(128, 3)                                                            \
        scan_list_##T##_d##D##_sm80(ScanParams p, const T *q, const T *k, const float *bias, const float *beta,     \
                                    const float *prior, const i32 *table, i32 *index, float *energy,                \
                                    const i32 *protected_keys, uint8_t *flags) {                                    \
        scan_list<T, D>(p, q, k, bias, beta, prior, table, index, energy, protected_keys, flags);                   \
    }                                                                                                               \
    GD_REGISTER(scan_list_##T##_d##D##_sm80)

#define SCANS(T)                                                                                                    \
    BIAS(T)                                                                                                         \
    SCAN(T, 32, 2)                                                                                                  \
    SCAN(T, 64, 2)                                                                                                  \
    SCAN(T, 96, 2)                                                                                                  \
    SCAN(T, 128, 2)                                                                                                 \
    SCAN(T, 192, 1)                                                                                                 \
    SCAN(T, 256, 1)
