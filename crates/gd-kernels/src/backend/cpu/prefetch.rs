//! Asking for memory before it is read.
#![allow(unsafe_code)]

/// Asks for a row that will be read soon, where the processor takes such hints.
#[inline(always)]
pub(crate) fn prefetch<T>(row: &[T]) {
    for byte in (0..size_of_val(row)).step_by(64) {
        prefetch_line(row.as_ptr().cast::<u8>().wrapping_add(byte));
    }
}

/// Asks for the cache line at an address, which may be any.
#[inline(always)]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(crate) fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing that the program sees, and no address makes it fail.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
}
