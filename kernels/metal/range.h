// Ranges of keys in threadgroup memory: pairs lo, hi.
#pragma once
#include "../shared/mask.h"

// Widens the range that starts at `all`.
INLINE void widen(threadgroup i32 *all, Range r) {
    atomic_fetch_min_explicit(reinterpret_cast<threadgroup atomic_int *>(all), r.lo, memory_order_relaxed);
    atomic_fetch_max_explicit(reinterpret_cast<threadgroup atomic_int *>(all + 1), r.hi, memory_order_relaxed);
}
