// The gated activation of a feed-forward block: y = silu(gate) up, elementwise. A warp takes a row of gate, up and y
// [B, H, N, C]. Computed in f32, rounded once.
#pragma once
#include "row_index.h"

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
INLINE void swiglu_forward(Thread me, PARAMS SwigluParams &p, const DEVICE T *gate, const DEVICE T *lift, DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    Place place(row, p.heads, p.rows);
    gate += place.at(p.g_batch, p.g_head, p.g_row);
    lift += place.at(p.u_batch, p.u_head, p.u_row);
    y += size_t(row) * p.dim;
    for (u32 c = me.lane(); c < p.dim; c += 32) {
        float g = up(gate[c]);
        y[c] = down<T>(g * sigmoid(g) * up(lift[c]));
    }
}

// dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, with s = sigmoid(gate).
template <class T>
INLINE void swiglu_backward(Thread me, PARAMS SwigluParams &p, const DEVICE T *gate, const DEVICE T *lift,
                            const DEVICE T *dy, DEVICE T *dgate, DEVICE T *dlift) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    Place place(row, p.heads, p.rows);
    gate += place.at(p.g_batch, p.g_head, p.g_row);
    lift += place.at(p.u_batch, p.u_head, p.u_row);
    dy += place.at(p.d_batch, p.d_head, p.d_row);
    dgate += size_t(row) * p.dim;
    dlift += size_t(row) * p.dim;
    for (u32 c = me.lane(); c < p.dim; c += 32) {
        float g = up(gate[c]), u = up(lift[c]), d = up(dy[c]), s = sigmoid(g);
        dgate[c] = down<T>(d * u * s * (GD_FAULT(43) ? 1.0f : 1.0f + g * (1.0f - s)));
        dlift[c] = down<T>(d * g * s);
    }
}
