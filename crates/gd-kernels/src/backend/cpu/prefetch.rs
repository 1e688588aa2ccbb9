//! Software prefetches.
#![allow(unsafe_code)]

/// Prefetches a row into the cache, on x86-64.
#[inline(always)]
pub(crate) fn prefetch<T>(row: &[T]) {
    prefetch_at(row, 0);
}

/// Prefetches as many bytes as a slice has, from `distance` bytes behind its start on. They may lie beyond its allocation.
#[inline(always)]
pub(crate) fn prefetch_at<T>(row: &[T], distance: usize) {
    for byte in (0..size_of_val(row)).step_by(64) {
        prefetch_line(row.as_ptr().cast::<u8>().wrapping_add(distance + byte));
    }
}

/// Prefetches the cache line at any address.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(crate) fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch has no visible effect, and it does not fault for any address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
}
