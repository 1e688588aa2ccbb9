// Addresses of the rows of a strided tensor [B, H, N, ..].
#pragma once
#include "language.h"

// Batch entry, head and position of row number `row`, counted over all rows in order.
struct RowIndex {
    u32 b, h, n;

    INLINE RowIndex(u32 row, u32 heads, u32 rows) : b(row / rows / heads), h(row / rows % heads), n(row % rows) {}

    INLINE size_t offset(u32 batch_stride, u32 head_stride, u32 row_stride) const {
        return size_t(b) * batch_stride + size_t(h) * head_stride + size_t(n) * row_stride;
    }
};
