//! Sums of products of 8-bit integers with AVX2.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::backend::cpu::prefetch::prefetch_line;
use crate::backend::cpu::quantize::{KEYS, STEP};
use crate::ops::scan::cpu::int8::ROWS;

/// Distance between the keys that are read and the keys that are prefetched.
const PREFETCH_DISTANCE_BYTES: usize = 1 << 13;
/// Keys of a register.
const REGISTER_KEYS: usize = 32 / STEP;

/// The sums of products of query `r` of a group `[D / 4][ROWS][4]` with the keys of a panel `[D / 4][KEYS][4]`, from `start`
/// on. The products of bytes are sums of 16-bit integers: those of `vpmaddubsw` would saturate.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sums(start: i32, queries: &[i8], r: usize, keys: &[u8]) -> [i32; KEYS] {
    let zero = _mm256_setzero_si256();
    // For each key two sums, of which each has two of its four elements.
    let mut halves = [[zero; 2]; KEYS / REGISTER_KEYS];
    for (q, k) in queries.chunks_exact(ROWS * STEP).zip(keys.chunks_exact(KEYS * STEP)) {
        for line in [0, 64] {
            prefetch_line(k.as_ptr().wrapping_add(PREFETCH_DISTANCE_BYTES + line));
        }
        let [a, b, c, d] = [0, 1, 2, 3].map(|s| i16::from(q[r * STEP + s]));
        let q = _mm256_setr_epi16(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
        for (k, halves) in k.as_chunks::<{ REGISTER_KEYS * STEP }>().0.iter().zip(&mut halves) {
            // SAFETY: `k` holds 32 bytes.
            let k = unsafe { _mm256_loadu_si256(k.as_ptr().cast()) };
            for (half, k) in
                halves.iter_mut().zip([_mm256_unpacklo_epi8(k, zero), _mm256_unpackhi_epi8(k, zero)])
            {
                *half = _mm256_add_epi32(*half, _mm256_madd_epi16(k, q));
            }
        }
    }
    let mut sums = [0; KEYS];
    for (out, [low, high]) in sums.as_chunks_mut::<REGISTER_KEYS>().0.iter_mut().zip(halves) {
        // In the order of the keys: each half of a register has two keys of `low` and then two of `high`.
        let sum = _mm256_add_epi32(_mm256_hadd_epi32(low, high), _mm256_set1_epi32(start));
        // SAFETY: `out` holds eight numbers.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sum) };
    }
    sums
}
