// The keys that a query attends to under a mask. They always form one interval, which may be empty.
#pragma once
#include "language.h"

// Keys lo <= j < hi.
struct Range {
    i32 lo;
    i32 hi;
};

// The keys of query i of batch entry b; `table` is described at MaskParams.
INLINE Range visible_keys(PARAMS MaskParams &m, const DEVICE i32 *table, u32 b, u32 i) {
    i32 keys = i32(m.keys);
    i32 at = i32(i) + (has_table(m) ? table[b] : m.offset);
    Range r = {0, keys};
    if (is_causal(m)) r.hi = min(r.hi, at + (GD_FAULT(1) ? 0 : 1));
    if (has_window(m)) r.lo = max(r.lo, at + (GD_FAULT(2) ? 0 : 1) - i32(m.window));
    if (has_boundaries(m)) {
        if (at < 0 || at >= keys) return {0, 0};
        const DEVICE i32 *first = table + 2 * m.batch;
        const DEVICE i32 *ends = first + m.batch + 1;
        // Binary search for the last boundary at or before the position, which is the start of its sequence.
        i32 below = first[b], above = first[b + 1];
        while (above - below > 1) {
            i32 middle = (below + above) / 2;
            if (GD_FAULT(3) ? ends[middle] < at : ends[middle] <= at)
                below = middle;
            else
                above = middle;
        }
        r.lo = max(r.lo, ends[below]);
        r.hi = min(r.hi, ends[above]);
    }
    r.hi = min(r.hi, has_table(m) ? table[m.batch + b] : m.length);
    r.lo = max(r.lo, 0);
    r.hi = max(r.hi, r.lo);
    return r;
}
