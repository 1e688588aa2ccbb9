// Which keys a query sees: always one interval, empty or not.
#pragma once
#include "../shared/params.h"
#include "ptx.cuh"

struct Range {
    i32 lo;
    i32 hi;
};

// The keys lo..hi of query i of batch entry b; table as in params.h.
__device__ __forceinline__ Range visible(const MaskParams &m, const i32 *table, u32 b, u32 i) {
    i32 keys = i32(m.keys);
    i32 at = i32(i) + (m.tables ? table[b] : m.offset);
    Range r = {0, keys};
    if (m.causal) r.hi = min(r.hi, at + (GD_FAULT(1) ? 0 : 1));
    if (m.window) r.lo = max(r.lo, at + (GD_FAULT(2) ? 0 : 1) - i32(m.window));
    if (m.tables == 2) {
        if (at < 0 || at >= keys) return {0, 0};
        const i32 *first = table + 2 * m.batch;
        const i32 *ends = first + m.batch + 1;
        // The last boundary at or before the position opens its sequence.
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
    r.hi = min(r.hi, m.tables ? table[m.batch + b] : m.length);
    r.lo = max(r.lo, 0);
    r.hi = max(r.hi, r.lo);
    return r;
}
