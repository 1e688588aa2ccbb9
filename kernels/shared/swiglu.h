// SwiGLU, the gated activation of a feed-forward block: y = silu(gate) * up, elementwise on [B, H, N, C]. One warp per
// row. Computed in f32 and rounded once. `up` is the operand of that name in Llama's feed-forward block.
#pragma once
#include "row_index.h"

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

template <class T>
INLINE void swiglu_forward(Thread me, PARAMS SwigluParams &p, const DEVICE T *gate, const DEVICE T *up, DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    RowIndex index(row, p.heads, p.rows);
    gate += index.offset(p.g_batch, p.g_head, p.g_row);
    up += index.offset(p.u_batch, p.u_head, p.u_row);
    y += size_t(row) * p.dim;
    for (u32 c = me.lane(); c < p.dim; c += 32) {
        float g = to_float(gate[c]);
        y[c] = from_float<T>(g * sigmoid(g) * to_float(up[c]));
    }
}

// dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, with s = sigmoid(gate).
template <class T>
INLINE void swiglu_backward(Thread me, PARAMS SwigluParams &p, const DEVICE T *gate, const DEVICE T *up,
                            const DEVICE T *dy, DEVICE T *dgate, DEVICE T *dup) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    RowIndex index(row, p.heads, p.rows);
    gate += index.offset(p.g_batch, p.g_head, p.g_row);
    up += index.offset(p.u_batch, p.u_head, p.u_row);
    dy += index.offset(p.d_batch, p.d_head, p.d_row);
    dgate += size_t(row) * p.dim;
    dup += size_t(row) * p.dim;
    for (u32 c = me.lane(); c < p.dim; c += 32) {
        float g = to_float(gate[c]), u = to_float(up[c]), d = to_float(dy[c]), s = sigmoid(g);
        dgate[c] = from_float<T>(d * u * s * (GD_FAULT(43) ? 1.0f : 1.0f + g * (1.0f - s)));
        dup[c] = from_float<T>(d * g * s);
    }
}
