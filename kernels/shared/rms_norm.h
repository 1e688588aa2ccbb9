// Root-mean-square normalisation: y = x r w with r = 1 / sqrt(mean(x^2) + eps). A warp takes a row of x, y
// [B, H, N, C]; weight [C]. Sums run in f32, and every result is rounded once.
#pragma once
#include "row_index.h"

// Most rows of a block of the backward pass.

template <class T> INLINE float inverse_rms(Thread me, PARAMS RmsNormParams &p, const DEVICE T *x) {
    float sum = 0;
    for (u32 c = me.lane(); c < p.dim; c += 32)
        sum = fma(up(x[c]), up(x[c]), sum);
    return 1.0f / sqrt(warp_sum(sum) / float(p.dim) + p.eps);
}

template <class T>
INLINE void rms_norm_forward(Thread me, PARAMS RmsNormParams &p, const DEVICE T *x, const DEVICE T *weight,
                             DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    x += Place(row, p.heads, p.rows).at(p.x_batch, p.x_head, p.x_row);
    y += size_t(row) * p.dim;
    float r = inverse_rms(me, p, x);
    for (u32 c = me.lane(); c < p.dim; c += 32)
        y[c] = down<T>(up(x[c]) * r * up(weight[c]));
}

// dx = r (w dy - x r^2 mean(w dy x)), and what each block adds to dweight = sum over rows of dy x r: parts
// [lines, C]. A block takes `chunk` rows. First a warp takes a row, then 32 columns of some of the rows; `inverse`
// holds NORM_CHUNK.
template <class T>
INLINE void rms_norm_backward(Thread me, PARAMS RmsNormParams &p, SHARED float *inverse, const DEVICE T *x,
                              const DEVICE T *weight, const DEVICE T *dy, DEVICE T *dx, DEVICE float *parts) {
    u32 first = me.block * p.block_rows, end = min(first + p.block_rows, p.batch * p.heads * p.rows);
    for (u32 row = first + me.warp(); row < end; row += me.warps()) {
        Place place(row, p.heads, p.rows);
        const DEVICE T *from = x + place.at(p.x_batch, p.x_head, p.x_row);
        const DEVICE T *gradient = dy + place.at(p.d_batch, p.d_head, p.d_row);
        DEVICE T *to = dx + size_t(row) * p.dim;
        float r = inverse_rms(me, p, from), along = 0;
        for (u32 c = me.lane(); c < p.dim; c += 32)
            along = fma(up(weight[c]) * up(gradient[c]), up(from[c]), along);
        float pull = warp_sum(along) * r * r / float(p.dim);
        for (u32 c = me.lane(); c < p.dim; c += 32)
            to[c] = down<T>(r * (up(weight[c]) * up(gradient[c]) - up(from[c]) * pull));
        if (me.lane() == 0) inverse[row - first] = r;
    }
    if (!GD_FAULT(40)) block_barrier();
    // Where there are fewer tiles of columns than warps, several warps share the rows of a tile.
    u32 tiles = (p.dim + 31) / 32, groups = tiles < me.warps() ? me.warps() / tiles : 1;
    for (u32 task = me.warp(); task < tiles * groups; task += me.warps()) {
        u32 c = task % tiles * 32 + me.lane(), group = task / tiles;
        if (c >= p.dim) continue;
        float sum = 0;
        for (u32 row = first + group; row < end; row += groups) {
            Place place(row, p.heads, p.rows);
            float value = up(x[place.at(p.x_batch, p.x_head, p.x_row) + c]);
            float gradient = up(dy[place.at(p.d_batch, p.d_head, p.d_row) + c]);
            sum = fma(gradient, value * inverse[row - first], sum);
        }
        parts[(size_t(me.block) * groups + group) * p.dim + c] = sum;
    }
}

// dweight [C] from the parts: a block takes 32 columns, each warp every so many lines; `sums` holds one a thread.
template <class T>
INLINE void rms_norm_weight_gradient(Thread me, PARAMS RmsNormParams &p, SHARED Total *sums, const DEVICE float *parts,
                                     DEVICE T *dweight) {
    u32 c = me.block * 32 + me.lane();
    Total sum = total(0.0f);
    if (c < p.dim)
        for (u32 line = me.warp(); line < p.partials - (GD_FAULT(41) ? 1 : 0); line += me.warps())
            sum = plus(sum, total(parts[size_t(line) * p.dim + c]));
    store(sum, sums + me.index);
    block_barrier();
    if (me.warp() > 0 || c >= p.dim) return;
    for (u32 w = 1; w < me.warps(); w++)
        sum = plus(sum, load(sums + w * 32 + me.lane()));
    dweight[c] = down<T>(value(sum));
}
