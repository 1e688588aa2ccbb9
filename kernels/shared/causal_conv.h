// Depthwise causal convolution: y[b, t, c] = sum_w weight[c, w] x[b, t - W + 1 + w, c]. A thread computes one channel
// of CONV_BLOCK_ROWS rows. Rows before the first come from `past`, or are 0. Packed sequences do not read each other.
#pragma once
#include "language.h"

// The rows of the packed sequence to which row t belongs.
struct SequenceRows {
    u32 start, end;
};
INLINE SequenceRows sequence_of(PARAMS CausalConvParams &p, const DEVICE i32 *table, u32 b, u32 t) {
    if (!p.packed) return {0, p.rows};
    const DEVICE i32 *boundaries = table + p.batch + 1;
    i32 below = table[b], above = table[b + 1];
    while (above - below > 1) {
        i32 middle = (below + above) / 2;
        if (boundaries[middle] <= i32(t))
            below = middle;
        else
            above = middle;
    }
    return {u32(boundaries[below]), u32(boundaries[above])};
}

// Batch entry, first row and channel of a thread.
struct ConvThread {
    u32 b, first, c;
    bool exists;

    INLINE ConvThread(Thread me, PARAMS CausalConvParams &p) {
        u32 columns = (p.channels + me.threads - 1) / me.threads;
        c = me.block % columns * me.threads + me.index;
        first = me.block / columns % p.chunks * CONV_BLOCK_ROWS;
        b = me.block / columns / p.chunks;
        exists = c < p.channels;
    }
};

// The input of tap w at row t: row t - (W - 1) + w.
template <class T>
INLINE float tap_input(PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *past, u32 b, u32 t, u32 w,
                       u32 c) {
    u32 at = t + w;
    if (at >= p.width - 1) return to_float(x[size_t(b) * p.x_batch + size_t(at - (p.width - 1)) * p.x_row + c]);
    return past ? to_float(past[(size_t(b) * (p.width - 1) + at) * p.channels + c]) : 0.0f;
}

// The first tap whose input belongs to the sequence of row t.
INLINE u32 first_tap(PARAMS CausalConvParams &p, const LOCAL SequenceRows &sequence, u32 t) {
    if (!p.packed) return 0;
    u32 distance = t - sequence.start;
    return distance >= p.width - 1 ? 0 : p.width - 1 - distance + (GD_FAULT(25) ? 1 : 0);
}

template <class T>
INLINE void causal_conv_forward(Thread me, PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *weight,
                                const DEVICE T *past, const DEVICE i32 *table, DEVICE T *y) {
    ConvThread at(me, p);
    if (!at.exists) return;
    for (u32 t = at.first; t < min(at.first + CONV_BLOCK_ROWS, p.rows); t++) {
        SequenceRows sequence = sequence_of(p, table, at.b, t);
        float sum = 0;
        for (u32 w = first_tap(p, sequence, t); w < p.width; w++)
            sum = fma(tap_input(p, x, past, at.b, t, w, at.c), to_float(weight[size_t(at.c) * p.width + w]), sum);
        y[(size_t(at.b) * p.rows + t) * p.channels + at.c] = from_float<T>(sum);
    }
}

// dx, and the share of dweight of every chunk of rows: parts [B, chunks, W, C].
template <class T>
INLINE void causal_conv_backward(Thread me, PARAMS CausalConvParams &p, const DEVICE T *x, const DEVICE T *weight,
                                 const DEVICE T *past, const DEVICE i32 *table, const DEVICE T *dy, DEVICE T *dx,
                                 DEVICE float *parts) {
    ConvThread at(me, p);
    if (!at.exists) return;
    const DEVICE T *gradient = dy + size_t(at.b) * p.d_batch + at.c;
    u32 end = min(at.first + CONV_BLOCK_ROWS, p.rows);
    for (u32 t = at.first; t < end; t++) {
        SequenceRows sequence = sequence_of(p, table, at.b, t);
        float sum = 0;
        for (u32 w = 0; w < p.width; w++) {
            u32 later = t + p.width - 1 - w;
            if (later < sequence.end)
                sum =
                    fma(to_float(gradient[size_t(later) * p.d_row]), to_float(weight[size_t(at.c) * p.width + w]), sum);
        }
        dx[(size_t(at.b) * p.rows + t) * p.channels + at.c] = from_float<T>(sum);
    }
    u32 chunk = at.b * p.chunks + at.first / CONV_BLOCK_ROWS;
    for (u32 w = 0; w < p.width; w++) {
        float sum = 0;
        for (u32 t = at.first; t < end; t++)
            if (w >= first_tap(p, sequence_of(p, table, at.b, t), t))
                sum = fma(to_float(gradient[size_t(t) * p.d_row]), tap_input(p, x, past, at.b, t, w, at.c), sum);
        parts[(size_t(chunk) * p.width + w) * p.channels + at.c] = sum;
    }
}

// dweight [C, W], the sum of the parts in a fixed order.
template <class T>
INLINE void causal_conv_weight_gradient(Thread me, PARAMS CausalConvParams &p, const DEVICE float *parts,
                                        DEVICE T *dweight) {
    u32 at = me.global(), c = at % p.channels, w = at / p.channels;
    if (w >= p.width) return;
    Total sum = total(0.0f);
    for (u32 x = 0; x < p.batch * p.chunks; x++)
        sum = plus(sum, total(parts[(size_t(x) * p.width + w) * p.channels + c]));
    dweight[size_t(c) * p.width + w] = from_float<T>(value(sum));
}
