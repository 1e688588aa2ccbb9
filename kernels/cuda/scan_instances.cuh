// Instantiations of the scan for the head_dims of a dtype. Every dtype has its own source, so that they compile in
// parallel.
#pragma once
#include "../shared/key_bias.h"
#include "scan_top1.cuh"
#include "scan_topk.cuh"

#define BIAS(T)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        key_bias_##T##_sm80(BiasParams p, const T *k, const float *beta, const float *prior, float *bias) {            \
        write_key_biases<T>(this_thread(), p, k, beta, prior, bias);                                                   \
    }                                                                                                                  \
    GD_REGISTER(key_bias_##T##_sm80)

#define SCAN(T, D, MT)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256, 1) scan_top1_##T##_d##D##_sm80(                                  \
        ScanParams p, const T *q, const T *k, const float *bias, const float *beta, const float *prior,                \
        const i32 *table, i32 *index, float *energy, const T *v, const float *threshold, T *y) {                       \
        scan_top1<T, D, MT>(p, q, k, bias, beta, prior, table, index, energy, v, threshold, y);                        \
    }                                                                                                                  \
    GD_REGISTER(scan_top1_##T##_d##D##_sm80)                                                                           \
    extern "C" __global__ void __launch_bounds__(128, 3) scan_topk_##T##_d##D##_sm80(                                  \
        ScanParams p, const T *q, const T *k, const float *bias, const float *beta, const float *prior,                \
        const i32 *table, i32 *index, float *energy, const i32 *protected_keys, uint8_t *flags) {                      \
        scan_topk<T, D>(p, q, k, bias, beta, prior, table, index, energy, protected_keys, flags);                      \
    }                                                                                                                  \
    GD_REGISTER(scan_topk_##T##_d##D##_sm80)

#define SCANS(T)                                                                                                       \
    BIAS(T)                                                                                                            \
    SCAN(T, 32, 2)                                                                                                     \
    SCAN(T, 64, 2)                                                                                                     \
    SCAN(T, 96, 2)                                                                                                     \
    SCAN(T, 128, 2)                                                                                                    \
    SCAN(T, 192, 1)                                                                                                    \
    SCAN(T, 256, 1)
