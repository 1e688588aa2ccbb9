//! Products of f32 matrices that are rounded to bf16: tiles of 16 rows by 32 terms times 32 terms by 16 columns, with sums
//! in f32.
//!
//! Both factors are copied into tiles first. A tile of the left factor holds 16 rows of 16 pairs of neighbouring terms; a
//! tile of the right factor is the transpose of 16 columns of 16 pairs. Rows and columns are both called lines here, so that
//! two ways to copy serve both factors: one where the terms of a line are contiguous, one where the lines of a term are.

use std::arch::asm;
use std::arch::x86_64::*;

use crate::backend::cpu::amx::{TileConfig, TileShape};

/// Lines of a tile.
const TILE_LINES: usize = 16;
/// Terms of a tile.
pub(crate) const TILE_TERMS: usize = 32;
/// Elements of a tile.
const TILE_ELEMENTS: usize = TILE_LINES * TILE_TERMS;
/// Lines of a strip: two rows or columns of tiles.
pub(crate) const STRIP: usize = 2 * TILE_LINES;

/// 16 lines of 16 pairs of terms, or their transpose. A pair of bf16 numbers is an element of 32 bits.
type Pairs = [__m512i; TILE_LINES];

/// A factor: `lines` rows of the left one or columns of the right one, with `terms` elements each. One of the strides is 1.
#[derive(Clone, Copy)]
pub(crate) struct Lines<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) lines: usize,
    pub(crate) terms: usize,
    pub(crate) line_stride: usize,
    pub(crate) term_stride: usize,
}

/// The side of a product on which a factor stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Left,
    Right,
}

/// Elements of a strip with `terms` terms.
pub(crate) fn strip_len(terms: usize) -> usize {
    2 * TILE_ELEMENTS * terms.div_ceil(TILE_TERMS)
}

/// Rounds a strip of lines from `first` on, as far as they exist, to bf16, and copies it into tiles `[2][terms / 32][16][32]`.
/// Lines and terms beyond the last ones are 0.
///
/// # Panics
/// On a machine without AMX, if no stride is 1, or if `out` does not have the length of a strip.
pub(crate) fn pack(factor: Lines<'_>, side: Side, first: usize, out: &mut [u16]) {
    assert!(crate::backend::cpu::amx::available(), "AMX is available");
    assert!(factor.line_stride == 1 || factor.term_stride == 1);
    assert_eq!(out.len(), strip_len(factor.terms));
    let (near, far) = out.split_at_mut(strip_len(factor.terms) / 2);
    let steps = near.chunks_exact_mut(TILE_ELEMENTS).zip(far.chunks_exact_mut(TILE_ELEMENTS));
    // Both tiles of a step in turn, whose lines are neighbours in memory where the lines of a term are contiguous.
    for (step, (near, far)) in steps.enumerate() {
        for (out, first) in [(near, first), (far, first + TILE_LINES)] {
            if first < factor.lines {
                // SAFETY: machines with AMX have these instructions, as `available` checks.
                unsafe { pack_tile(factor, side, first, step * TILE_TERMS, out) };
            } else {
                out.fill(0);
            }
        }
    }
}

/// Copies the tile of the lines and terms from these on.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_tile(factor: Lines<'_>, side: Side, line: usize, term: usize, out: &mut [u16]) {
    let Lines { data, lines, terms, line_stride, term_stride } = factor;
    let (lines, terms) = (TILE_LINES.min(lines - line), TILE_TERMS.min(terms - term));
    let data = &data[line * line_stride + term * term_stride..];
    // The order in which the factor lies is the one that its tiles have, or they are transposed.
    let (pairs, by) = match term_stride {
        1 => (by_lines(data, line_stride, lines, terms), Side::Left),
        _ => (by_terms(data, term_stride, lines, terms), Side::Right),
    };
    let pairs = if by == side { pairs } else { transposed(pairs) };
    for (out, pairs) in out.chunks_exact_mut(TILE_TERMS).zip(pairs) {
        // SAFETY: `out` has 32 elements of 16 bits.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs) };
    }
}

/// Pairs of terms of lines that start at multiples of `stride`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn by_lines(data: &[f32], stride: usize, lines: usize, terms: usize) -> Pairs {
    let mut pairs = [_mm512_setzero_si512(); TILE_LINES];
    for (i, pairs) in pairs.iter_mut().enumerate().take(lines) {
        let (low, high) = data[i * stride..][..terms].split_at(terms.min(16));
        *pairs = rounded(load(low), load(high));
    }
    pairs
}

/// Pairs of terms of lines, by pair: the lines of a term are contiguous and start at multiples of `stride`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn by_terms(data: &[f32], stride: usize, lines: usize, terms: usize) -> Pairs {
    let mut pairs = [_mm512_setzero_si512(); TILE_LINES];
    let interleave: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: the array has 512 bits.
    let interleave = unsafe { _mm512_loadu_si512(interleave.as_ptr().cast()) };
    for (i, pairs) in pairs.iter_mut().enumerate().take(terms.div_ceil(2)) {
        let first = load(&data[2 * i * stride..][..lines]);
        let second = if 2 * i + 1 < terms {
            load(&data[(2 * i + 1) * stride..][..lines])
        } else {
            _mm512_setzero_ps()
        };
        *pairs = _mm512_permutexvar_epi16(interleave, rounded(first, second));
    }
    pairs
}

/// At most 16 numbers, filled up with zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(numbers: &[f32]) -> __m512 {
    debug_assert!(numbers.len() <= 16);
    let mask = ((1u32 << numbers.len()) - 1) as __mmask16;
    // SAFETY: the mask selects as many elements as the slice has.
    unsafe { _mm512_maskz_loadu_ps(mask, numbers.as_ptr()) }
}

/// 32 numbers rounded to bf16. Subnormal numbers become 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 512 bits of plain numbers.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// The transpose of 16 by 16 elements of 32 bits.
#[inline]
#[target_feature(enable = "avx512f")]
fn transposed(rows: Pairs) -> Pairs {
    let mut twos = rows;
    for i in (0..16).step_by(2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Of four rows 4g.., element 4g + c holds column c of every four in each 128-bit lane.
    let mut fours = rows;
    for i in (0..16).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
    }
    let mut columns = rows;
    for c in 0..4 {
        // Lanes 0 and 1, then 2 and 3, of the upper and the lower eight rows.
        let upper_low = _mm512_shuffle_i32x4::<0x44>(fours[c], fours[4 + c]);
        let upper_high = _mm512_shuffle_i32x4::<0xee>(fours[c], fours[4 + c]);
        let lower_low = _mm512_shuffle_i32x4::<0x44>(fours[8 + c], fours[12 + c]);
        let lower_high = _mm512_shuffle_i32x4::<0xee>(fours[8 + c], fours[12 + c]);
        columns[c] = _mm512_shuffle_i32x4::<0x88>(upper_low, lower_low);
        columns[4 + c] = _mm512_shuffle_i32x4::<0xdd>(upper_low, lower_low);
        columns[8 + c] = _mm512_shuffle_i32x4::<0x88>(upper_high, lower_high);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(upper_high, lower_high);
    }
    columns
}

/// The tiles of this thread, configured for products of strips.
pub(crate) struct Tiles {
    _config: TileConfig,
}

impl Tiles {
    /// Configures the tiles of this thread.
    ///
    /// # Panics
    /// On a machine without AMX.
    pub(crate) fn new() -> Self {
        Self { _config: TileConfig::new(TileShape { left_bytes: 2 * TILE_TERMS, right_rows: TILE_LINES }) }
    }

    /// Writes the product of the tiles `steps` of a left strip with those of a right one to `out`.
    ///
    /// # Panics
    /// Without steps, or if a strip has fewer.
    pub(crate) fn multiply(
        &self,
        left: &[u16],
        right: &[u16],
        steps: std::ops::Range<usize>,
        out: &mut Sums,
    ) {
        let (lower, far) = (left.len() / 2, right.len() / 2);
        assert!(!steps.is_empty() && steps.end * TILE_ELEMENTS <= lower.min(far));
        let (left, right) = (&left[steps.start * TILE_ELEMENTS..], &right[steps.start * TILE_ELEMENTS..]);
        // SAFETY: the tiles are configured while `self` lives, in its thread: 16 rows of 64 bytes each. Both halves of the
        // strips have the tiles `steps`, and `out` 32 rows of 128 bytes.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{near} + {line}*1]",
                "tileloadd tmm4, [{upper} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{far} + {line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {line}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 1024",
                "add {lower}, 1024",
                "add {near}, 1024",
                "add {far}, 1024",
                "dec {left}",
                "jnz 2b",
                "tilestored [{out} + {row}*1], tmm0",
                "tilestored [{out} + {row}*1 + 64], tmm1",
                "tilestored [{out} + {row}*1 + 2048], tmm2",
                "tilestored [{out} + {row}*1 + 2112], tmm3",
                upper = inout(reg) left.as_ptr() => _,
                lower = inout(reg) left.as_ptr().add(lower) => _,
                near = inout(reg) right.as_ptr() => _,
                far = inout(reg) right.as_ptr().add(far) => _,
                line = in(reg) 2 * TILE_TERMS,
                left = inout(reg) steps.len() => _,
                out = in(reg) out.0.as_mut_ptr(),
                row = in(reg) 4 * STRIP,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

/// The product of two strips. At cache lines, because storing a tile whose rows cross them takes several times as long.
#[repr(align(64))]
pub(crate) struct Sums(pub(crate) [[f32; STRIP]; STRIP]);

impl Sums {
    pub(crate) const ZERO: Self = Self([[0.0; STRIP]; STRIP]);
}
