// How the scan is instantiated: the head_dims of a dtype, each with the matrices of rows of a simdgroup (when
// there is one candidate) and the keys of a tile, as gpu/scan.rs plans them.
#pragma once
#include "../shared/key_bias.h"
#include "scan_top1.h"
#include "scan_topk.h"

#define BIAS(T)                                                                                                        \
    KERNEL(256)                                                                                                        \
    key_bias_##T##_metal(constant BiasParams &p [[buffer(0)]], const device T *k [[buffer(1)]],                        \
                         const device float *beta [[buffer(2)]], const device float *prior [[buffer(3)]],              \
                         device float *bias [[buffer(4)]], GD_THREAD) {                                                \
        write_key_biases<T>(GD_HERE, p, k, beta, prior, bias);                                                         \
    }                                                                                                                  \
    GD_REGISTER(key_bias_##T##_metal)

#define SCAN(T, D, MT, KEYS)                                                                                           \
    KERNEL(256)                                                                                                        \
    scan_top1_##T##_d##D##_metal(constant ScanParams &p [[buffer(0)]], const device T *q [[buffer(1)]],                \
                                 const device T *k [[buffer(2)]], const device float *bias [[buffer(3)]],              \
                                 const device float *beta [[buffer(4)]], const device float *prior [[buffer(5)]],      \
                                 const device i32 *table [[buffer(6)]], device i32 *index [[buffer(7)]],               \
                                 device float *energy [[buffer(8)]], const device T *v [[buffer(9)]],                  \
                                 const device float *threshold [[buffer(10)]], device T *y [[buffer(11)]],             \
                                 GD_DYNAMIC_SHARED(uchar, shared), GD_THREAD) {                                        \
        GD_SHARED(i32[KEY_RANGES], ranges);                                                                            \
        scan_top1<T, D, MT, KEYS>(GD_HERE, p, shared, ranges, q, k, bias, beta, prior, table, index, energy, v,        \
                                  GD_IF_PRESENT(10, threshold), y);                                                    \
    }                                                                                                                  \
    GD_REGISTER(scan_top1_##T##_d##D##_metal)                                                                          \
    KERNEL(128)                                                                                                        \
    scan_topk_##T##_d##D##_metal(constant ScanParams &p [[buffer(0)]], const device T *q [[buffer(1)]],                \
                                 const device T *k [[buffer(2)]], const device float *bias [[buffer(3)]],              \
                                 const device float *beta [[buffer(4)]], const device float *prior [[buffer(5)]],      \
                                 const device i32 *table [[buffer(6)]], device i32 *index [[buffer(7)]],               \
                                 device float *energy [[buffer(8)]], const device i32 *protected_keys [[buffer(9)]],   \
                                 device uint8_t *flags [[buffer(10)]], GD_DYNAMIC_SHARED(uchar, shared), GD_THREAD) {  \
        GD_SHARED(i32[KEY_RANGES], ranges);                                                                            \
        scan_topk<T, D, KEYS>(GD_HERE, p, shared, ranges, q, k, bias, beta, prior, table, index, energy,               \
                              protected_keys, flags);                                                                  \
    }                                                                                                                  \
    GD_REGISTER(scan_topk_##T##_d##D##_metal)

#define SCANS(T)                                                                                                       \
    BIAS(T)                                                                                                            \
    SCAN(T, 32, 2, 32)                                                                                                 \
    SCAN(T, 64, 2, 32)                                                                                                 \
    SCAN(T, 96, 2, 32)                                                                                                 \
    SCAN(T, 128, 2, 32)                                                                                                \
    SCAN(T, 192, 1, 16)                                                                                                \
    SCAN(T, 256, 1, 16)
