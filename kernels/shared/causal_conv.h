// Depthwise causal convolution: y[b, t, c] = sum_w weight[c, w] x[b, t - W + 1 + w, c]. A thread holds a
// channel of 64 rows. Rows before the start come from `past`, or are 0; of packed sequences none sees
// another.
#pragma once
#include "language.h"

// The rows of the sequence that holds row t.
struct Own {
    u32 start, end;
};
INLINE Own own_rows(PARAMS CausalConvParams &p, const DEVICE i32 *table, u32 b, u32 t) {
    if (!p.packed) return {0, p.rows};
    const DEVICE i32 *ends = table + p.batch + 1;
    i32 below = table[b], above = table[b + 1];
    while (above - below > 1) {
        i32 middle = (below + above) / 2;
        if (ends[middle] <= i32(t))
            below = middle;
        else
            above = middle;
    }
    return {u32(ends[below]), u32(ends[above])};
}

// Batch entry, first row and channel of a thread.
struct ConvPlace {
    u32 b, first, c;
    bool exists;

    INLINE ConvPlace(Thread me, PARAMS CausalConvParams &p) {
        u32 columns = (p.channels + me.threads - 1) / me.threads;
        c = me.block % columns * me.threads + me.index;
        first = me.block / columns % p.chunks * CONV_BLOCK_ROWS;
        b = me.block / columns / p.chunks;
        exists = c < p.channels;
    }
};

// What tap w of row t meets: row t - (W - 1) + w.
template <class T>
INLINE float tap_input(PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *past, u32 b, u32 t, u32 w,
                       u32 c) {
    u32 at = t + w;
    if (at >= p.width - 1) return up(x[size_t(b) * p.x_batch + size_t(at - (p.width - 1)) * p.x_row + c]);
    return past ? up(past[(size_t(b) * (p.width - 1) + at) * p.channels + c]) : 0.0f;
}

// The first tap that meets a row of the sequence.
INLINE u32 first_tap(PARAMS CausalConvParams &p, const LOCAL Own &own, u32 t) {
    if (!p.packed) return 0;
    u32 behind = t - own.start;
    return behind >= p.width - 1 ? 0 : p.width - 1 - behind + (GD_FAULT(25) ? 1 : 0);
}

template <class T>
INLINE void causal_conv_forward(Thread me, PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *weight,
                                const DEVICE T *past, const DEVICE i32 *table, DEVICE T *y) {
    ConvPlace at(me, p);
    if (!at.exists) return;
    for (u32 t = at.first; t < min(at.first + CONV_BLOCK_ROWS, p.rows); t++) {
        Own own = own_rows(p, table, at.b, t);
        float sum = 0;
        for (u32 w = first_tap(p, own, t); w < p.width; w++)
            sum = fma(tap_input(p, x, past, at.b, t, w, at.c), up(weight[size_t(at.c) * p.width + w]), sum);
        y[(size_t(at.b) * p.rows + t) * p.channels + at.c] = down<T>(sum);
    }
}

// dx, and what each chunk of rows adds to dweight: parts [B, chunks, W, C].
template <class T>
INLINE void causal_conv_backward(Thread me, PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *weight,
                                 const DEVICE T *past, const DEVICE i32 *table, const DEVICE T *dy, DEVICE T *dx,
                                 DEVICE float *parts) {
    ConvPlace at(me, p);
    if (!at.exists) return;
    const DEVICE T *gradient = dy + size_t(at.b) * p.d_batch + at.c;
    u32 end = min(at.first + CONV_BLOCK_ROWS, p.rows);
    for (u32 t = at.first; t < end; t++) {
        Own own = own_rows(p, table, at.b, t);
        float sum = 0;
        for (u32 w = 0; w < p.width; w++) {
            u32 later = t + p.width - 1 - w;
            if (later < own.end)
                sum = fma(up(gradient[size_t(later) * p.d_row]), up(weight[size_t(at.c) * p.width + w]), sum);
        }
        dx[(size_t(at.b) * p.rows + t) * p.channels + at.c] = down<T>(sum);
    }
    u32 chunk = at.b * p.chunks + at.first / CONV_BLOCK_ROWS;
    for (u32 w = 0; w < p.width; w++) {
        float sum = 0;
        for (u32 t = at.first; t < end; t++)
            if (w >= first_tap(p, own_rows(p, table, at.b, t), t))
                sum = fma(up(gradient[size_t(t) * p.d_row]), tap_input(p, x, past, at.b, t, w, at.c), sum);
        parts[(size_t(chunk) * p.width + w) * p.channels + at.c] = sum;
    }
}

// dweight [C, W] from the parts, in order.
template <class T>
INLINE void causal_conv_weight_gradient(Thread me, PARAMS CausalConvParams &p, const DEVICE float *parts,
                                        DEVICE T *dweight) {
    u32 at = me.global(), c = at % p.channels, w = at / p.channels;
    if (w >= p.width) return;
    Total sum = total(0.0f);
    for (u32 x = 0; x < p.batch * p.chunks; x++)
        sum = plus(sum, total(parts[(size_t(x) * p.width + w) * p.channels + c]));
    dweight[size_t(c) * p.width + w] = down<T>(value(sum));
}
