// RMS normalisation: y = x r w with r = 1 / sqrt(mean(x^2) + eps); x, y [B, H, N, C], weight [C]. One warp per row.
// Sums are f32, and every result is rounded once.
#pragma once
#include "row_index.h"

template <class T> INLINE float inverse_rms(Thread me, PARAMS RmsNormParams &p, const DEVICE T *x) {
    float sum = 0;
    for (u32 c = me.lane(); c < p.dim; c += 32)
        sum = fma(to_float(x[c]), to_float(x[c]), sum);
    return 1.0f / sqrt(warp_sum(sum) / float(p.dim) + p.eps);
}

template <class T>
INLINE void rms_norm_forward(Thread me, PARAMS RmsNormParams &p, const DEVICE T *x, const DEVICE T *weight,
                             DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    x += RowIndex(row, p.heads, p.rows).offset(p.x_batch, p.x_head, p.x_row);
    y += size_t(row) * p.dim;
    float r = inverse_rms(me, p, x);
    for (u32 c = me.lane(); c < p.dim; c += 32)
        y[c] = from_float<T>(to_float(x[c]) * r * to_float(weight[c]));
}

// dx = r (w dy - x r^2 mean(w dy x)), and the block's share of dweight = sum over rows of dy x r: parts [partials, C].
// A block takes `block_rows` rows. In the first pass every warp computes dx of a row and leaves r in `inverse`
// [NORM_MAX_BLOCK_ROWS]; in the second every warp sums 32 columns over the rows.
template <class T>
INLINE void rms_norm_backward(Thread me, PARAMS RmsNormParams &p, SHARED float *inverse, const DEVICE T *x,
                              const DEVICE T *weight, const DEVICE T *dy, DEVICE T *dx, DEVICE float *parts) {
    u32 first = me.block * p.block_rows, end = min(first + p.block_rows, p.batch * p.heads * p.rows);
    for (u32 row = first + me.warp(); row < end; row += me.warps()) {
        RowIndex index(row, p.heads, p.rows);
        const DEVICE T *from = x + index.offset(p.x_batch, p.x_head, p.x_row);
        const DEVICE T *gradient = dy + index.offset(p.d_batch, p.d_head, p.d_row);
        DEVICE T *to = dx + size_t(row) * p.dim;
        float r = inverse_rms(me, p, from), dot = 0;
        for (u32 c = me.lane(); c < p.dim; c += 32)
            dot = fma(to_float(weight[c]) * to_float(gradient[c]), to_float(from[c]), dot);
        float scale = warp_sum(dot) * r * r / float(p.dim);
        for (u32 c = me.lane(); c < p.dim; c += 32)
            to[c] = from_float<T>(r * (to_float(weight[c]) * to_float(gradient[c]) - to_float(from[c]) * scale));
        if (me.lane() == 0) inverse[row - first] = r;
    }
    if (!GD_FAULT(40)) block_barrier();
    // With fewer tiles of 32 columns than warps, several warps split the rows of a tile.
    u32 tiles = (p.dim + 31) / 32, groups = tiles < me.warps() ? me.warps() / tiles : 1;
    for (u32 task = me.warp(); task < tiles * groups; task += me.warps()) {
        u32 c = task % tiles * 32 + me.lane(), group = task / tiles;
        if (c >= p.dim) continue;
        float sum = 0;
        for (u32 row = first + group; row < end; row += groups) {
            RowIndex index(row, p.heads, p.rows);
            float value = to_float(x[index.offset(p.x_batch, p.x_head, p.x_row) + c]);
            float gradient = to_float(dy[index.offset(p.d_batch, p.d_head, p.d_row) + c]);
            sum = fma(gradient, value * inverse[row - first], sum);
        }
        parts[(size_t(me.block) * groups + group) * p.dim + c] = sum;
    }
}

// dweight [C] from the parts, by one block per 32 columns; its warps take the parts in turn. `sums` has one entry per
// thread.
template <class T>
INLINE void rms_norm_weight_gradient(Thread me, PARAMS RmsNormParams &p, SHARED Total *sums, const DEVICE float *parts,
                                     DEVICE T *dweight) {
    u32 c = me.block * 32 + me.lane();
    Total sum = total(0.0f);
    if (c < p.dim)
        for (u32 part = me.warp(); part < p.partials - (GD_FAULT(41) ? 1 : 0); part += me.warps())
            sum = plus(sum, total(parts[size_t(part) * p.dim + c]));
    store(sum, sums + me.index);
    block_barrier();
    if (me.warp() > 0 || c >= p.dim) return;
    for (u32 w = 1; w < me.warps(); w++)
        sum = plus(sum, load(sums + w * 32 + me.lane()));
    dweight[c] = from_float<T>(value(sum));
}
