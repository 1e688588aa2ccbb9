// Instantiations of decoding: dtypes and head_dims.
#include "decode.h"

#define DECODE(T, D)                                                                                                   \
    KERNEL(128)                                                                                                        \
    decode_##T##_d##D##_metal(constant DecodeParams &p [[buffer(0)]], const device T *q [[buffer(1)]],                 \
                              const device T *k [[buffer(2)]], const device float *bias [[buffer(3)]],                 \
                              const device float *beta [[buffer(4)]], const device float *prior [[buffer(5)]],         \
                              const device i32 *table [[buffer(6)]], const device i32 *pages [[buffer(7)]],            \
                              device u32 *partial [[buffer(8)]], GD_DYNAMIC_SHARED(float, queries), GD_THREAD) {       \
        GD_SHARED(i32[DECODE_RANGES], ranges);                                                                         \
        GD_SHARED(float[DECODE_WARPS * ROWS], scores);                                                                 \
        GD_SHARED(i32[DECODE_WARPS * ROWS], keys);                                                                     \
        decode<T, D>(GD_HERE, p, queries, ranges, scores, keys, q, k, bias, beta, prior, table, pages, partial);       \
    }                                                                                                                  \
    GD_REGISTER(decode_##T##_d##D##_metal)

#define DECODES(T)                                                                                                     \
    DECODE(T, 32)                                                                                                      \
    DECODE(T, 64)                                                                                                      \
    DECODE(T, 96)                                                                                                      \
    DECODE(T, 128)                                                                                                     \
    DECODE(T, 192)                                                                                                     \
    DECODE(T, 256)                                                                                                     \
    KERNEL(128)                                                                                                        \
    decode_merge_##T##_metal(constant DecodeParams &p [[buffer(0)]], const device T *q [[buffer(1)]],                  \
                             const device T *k [[buffer(2)]], const device float *beta [[buffer(3)]],                  \
                             const device float *prior [[buffer(4)]], const device i32 *table [[buffer(5)]],           \
                             const device i32 *pages [[buffer(6)]], const device T *v [[buffer(7)]],                   \
                             const device float *threshold [[buffer(8)]], const device u32 *partial [[buffer(9)]],     \
                             device i32 *index [[buffer(10)]], device float *energy [[buffer(11)]],                    \
                             device T *y [[buffer(12)]], GD_THREAD) {                                                  \
        decode_merge<T>(GD_HERE, p, q, k, beta, prior, table, pages, v, GD_IF_PRESENT(8, threshold), partial, index,   \
                        energy, y);                                                                                    \
    }                                                                                                                  \
    GD_REGISTER(decode_merge_##T##_metal)

DECODES(f32)
DECODES(f16)
DECODES(bf16)
