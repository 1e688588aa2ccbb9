// Rotary position embedding: element i of the first half of a row and element i of the second turn by an angle of
// the row's position. A warp takes a row; its backward pass is the rotation by the negative angle.
#pragma once
#include "row_index.h"

// y [B, H, N, 2 pairs] from x of any strides; cos and sin [positions, pairs].
template <class T>
INLINE void rotary(Thread me, PARAMS RotaryParams &p, const DEVICE T *x, const DEVICE float *cosines,
                   const DEVICE float *sines, const DEVICE u32 *table, DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    Place place(row, p.heads, p.rows);
    x += place.at(p.x_batch, p.x_head, p.x_row);
    y += size_t(row) * 2 * p.pairs;
    size_t angles = size_t((p.table ? table[place.b] : p.offset) + place.n) * p.pairs;
    for (u32 i = me.lane(); i < p.pairs; i += 32) {
        float c = cosines[angles + i], s = p.inverse && !GD_FAULT(42) ? -sines[angles + i] : sines[angles + i];
        float x1 = up(x[i]), x2 = up(x[p.pairs + i]);
        y[i] = down<T>(x1 * c - x2 * s);
        y[p.pairs + i] = down<T>(x2 * c + x1 * s);
    }
}
