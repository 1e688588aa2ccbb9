// Rotary position embedding: element i of the first half of a row and element i of the second half are rotated by an
// angle that depends on i and the row's position. One warp per row. The backward pass is the rotation by the negative
// angle.
#pragma once
#include "row_index.h"

// x [B, H, N, 2 pairs] of any strides, y contiguous; cosines and sines [positions, pairs].
template <class T>
INLINE void rotary(Thread me, PARAMS RotaryParams &p, const DEVICE T *x, const DEVICE float *cosines,
                   const DEVICE float *sines, const DEVICE u32 *table, DEVICE T *y) {
    u32 row = me.block * me.warps() + me.warp();
    if (row >= p.batch * p.heads * p.rows) return;
    RowIndex index(row, p.heads, p.rows);
    x += index.offset(p.x_batch, p.x_head, p.x_row);
    y += size_t(row) * 2 * p.pairs;
    size_t angles = size_t((p.table ? table[index.b] : p.offset) + index.n) * p.pairs;
    for (u32 i = me.lane(); i < p.pairs; i += 32) {
        float c = cosines[angles + i], s = p.inverse && !GD_FAULT(42) ? -sines[angles + i] : sines[angles + i];
        float x1 = to_float(x[i]), x2 = to_float(x[p.pairs + i]);
        y[i] = from_float<T>(x1 * c - x2 * s);
        y[p.pairs + i] = from_float<T>(x2 * c + x1 * s);
    }
}
