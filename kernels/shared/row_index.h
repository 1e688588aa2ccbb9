// Where the rows of a tensor [B, H, N, ..] of any strides are.
#pragma once
#include "language.h"

// Batch entry, head and number of a row, of all rows in order.
struct Place {
    u32 b, h, n;

    INLINE Place(u32 row, u32 heads, u32 rows) : b(row / rows / heads), h(row / rows % heads), n(row % rows) {}

    INLINE size_t at(u32 batch_stride, u32 head_stride, u32 row_stride) const {
        return size_t(b) * batch_stride + size_t(h) * head_stride + size_t(n) * row_stride;
    }
};
