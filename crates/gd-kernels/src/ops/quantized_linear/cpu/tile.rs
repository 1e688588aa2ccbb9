//! The product of rows of activations with a tile of weights.

use super::GROUP;
use crate::backend::cpu::lanes::{Lanes, REGISTER_BYTES, WithLanes};
use crate::ops::quantized_linear::blocks::{Format, GROUPS_PER_BLOCK, Scales};
use crate::ops::quantized_linear::matrix::{LOW_BYTES, TILE};
use crate::ops::quantized_linear::rows::Rows16;

/// Pairs of activations of a group.
const PAIRS: usize = GROUP / 2;
/// Bytes of one f16 for each row of a tile.
const HALF_BYTES: usize = 2 * TILE;

/// The integers and the scales of a tile.
pub(super) type Tile<'a> = (&'a [u8], &'a [u8]);

/// Calls a function with the parameters of a format.
macro_rules! by_format {
    ($format:expr, $function:ident::<$lanes:ident>($($argument:expr),*)) => {
        match ($format.bits, $format.scales) {
            (4, Scales::Symmetric) => $function::<$lanes, 4, SYMMETRIC>($($argument),*),
            (4, Scales::Affine) => $function::<$lanes, 4, AFFINE>($($argument),*),
            (4, Scales::AffineK) => $function::<$lanes, 4, AFFINE_K>($($argument),*),
            (5, Scales::Symmetric) => $function::<$lanes, 5, SYMMETRIC>($($argument),*),
            (5, Scales::Affine) => $function::<$lanes, 5, AFFINE>($($argument),*),
            (5, Scales::AffineK) => $function::<$lanes, 5, AFFINE_K>($($argument),*),
            (8, Scales::Symmetric) => $function::<$lanes, 8, SYMMETRIC>($($argument),*),
            _ => $function::<$lanes, 6, SYMMETRIC_K>($($argument),*),
        }
    };
}

/// Writes the products of all rows with a tile to `[rows of the tile, rows]`, where the last tile may have fewer than 16 rows.
pub(super) struct Multiply<'a> {
    pub(super) format: Format,
    pub(super) tile: Tile<'a>,
    pub(super) rows: &'a Rows16,
    pub(super) out: &'a mut [f32],
}

impl WithLanes for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_lanes<V: Lanes>(self) {
        by_format!(self.format, all_rows::<V>(self.tile, self.rows, self.out));
    }
}

/// Writes the weights of a group to the starts of 32 rows of `out`; see [`dequantize_group`].
pub(super) struct Dequantize<'a> {
    pub(super) format: Format,
    pub(super) tile: Tile<'a>,
    /// The number of the group in the row.
    pub(super) group: usize,
    pub(super) out: &'a mut [f32],
    /// Elements from one row of `out` to the next.
    pub(super) stride: usize,
}

impl WithLanes for Dequantize<'_> {
    type Output = ();

    #[inline(always)]
    fn with_lanes<V: Lanes>(self) {
        by_format!(self.format, dequantize_group::<V>(self.tile, self.group, self.out, self.stride));
    }
}

// The variants of `Scales` as parameters of functions.
const SYMMETRIC: u8 = 0;
const AFFINE: u8 = 1;
const AFFINE_K: u8 = 2;
const SYMMETRIC_K: u8 = 3;

const fn format<const BITS: usize, const SCALES: u8>() -> Format {
    let scales = match SCALES {
        SYMMETRIC => Scales::Symmetric,
        AFFINE => Scales::Affine,
        AFFINE_K => Scales::AffineK,
        _ => Scales::SymmetricK,
    };
    Format { bits: BITS, scales }
}

/// The rows in groups of four, whose sums are in registers.
#[inline(always)]
fn all_rows<V: Lanes, const BITS: usize, const SCALES: u8>(tile: Tile<'_>, rows: &Rows16, out: &mut [f32]) {
    let mut first = 0;
    while first < rows.count {
        first += match rows.count - first {
            1 => some_rows::<V, BITS, SCALES, 1>(tile, rows, first, out),
            2 => some_rows::<V, BITS, SCALES, 2>(tile, rows, first, out),
            3 => some_rows::<V, BITS, SCALES, 3>(tile, rows, first, out),
            _ => some_rows::<V, BITS, SCALES, 4>(tile, rows, first, out),
        };
    }
}

/// `R` rows from `first` on. Returns `R`.
#[inline(always)]
fn some_rows<V: Lanes, const BITS: usize, const SCALES: u8, const R: usize>(
    (values, scales): Tile<'_>,
    rows: &Rows16,
    first: usize,
    out: &mut [f32],
) -> usize {
    let format = format::<BITS, SCALES>();
    let groups = rows.groups;
    let mut totals = [V::splat_float(0.0); R];
    for group in 0..groups {
        let values = &values[group * BITS * REGISTER_BYTES..][..BITS * REGISTER_BYTES];
        let block = &scales[group / format.groups() * format.scale_bytes()..][..format.scale_bytes()];
        let (scale, min) = scales_of::<V, SCALES>(block, group % GROUPS_PER_BLOCK);
        let mut pairs = [&[0u32; PAIRS]; R];
        for (r, pairs) in pairs.iter_mut().enumerate() {
            let at = ((first + r) * groups + group) * PAIRS;
            let Some(chunk) = rows.pairs[at..].first_chunk() else { unreachable!("a group has 16 pairs") };
            *pairs = chunk;
        }
        // Where both halves have one scale, they are one sum.
        let halves = if SCALES == SYMMETRIC_K { 2 } else { 1 };
        for half in 0..halves {
            let mut sums = [V::splat(0); R];
            for (r, sums) in sums.iter_mut().enumerate() {
                let [a, b] = rows.sums[(first + r) * groups + group];
                let sum = if halves == 1 { a + b } else { [a, b][half] };
                *sums = V::splat(-format.zero() * sum);
            }
            let registers = if halves == 1 { 0..4 } else { half * 2..half * 2 + 2 };
            unpack::<V, BITS>(
                values,
                registers,
                #[inline(always)]
                |step, w| {
                    for r in 0..R {
                        sums[r] = sums[r].add_products(w, pairs[r][step]);
                    }
                },
            );
            for (r, total) in totals.iter_mut().enumerate() {
                let at = (first + r) * groups + group;
                let factor = V::times(scale[half], V::splat_float(rows.scales[at]));
                *total = V::fused(sums[r].to_float(), factor, *total);
            }
        }
        if let Some(min) = min {
            for (r, total) in totals.iter_mut().enumerate() {
                let at = (first + r) * groups + group;
                let [a, b] = rows.sums[at];
                let sum = rows.scales[at] * (a + b) as f32;
                *total = V::fused(min, V::splat_float(sum), *total);
            }
        }
    }
    for (r, total) in totals.into_iter().enumerate() {
        for (out, total) in out.chunks_exact_mut(rows.count).zip(V::array(total)) {
            out[first + r] = total;
        }
    }
    R
}

/// The scales of the two halves of a group, and the minimum if the type has one.
#[inline(always)]
fn scales_of<V: Lanes, const SCALES: u8>(block: &[u8], group: usize) -> ([V::Float; 2], Option<V::Float>) {
    let d = V::load_half(chunk(block));
    match SCALES {
        SYMMETRIC => ([d; 2], None),
        AFFINE => ([d; 2], Some(V::load_half(chunk(&block[HALF_BYTES..])))),
        AFFINE_K => {
            let d_min = V::load_half(chunk(&block[HALF_BYTES..]));
            let factors = &block[2 * HALF_BYTES + group * 2 * TILE..];
            let scale = V::times(d, V::load_unsigned(chunk(factors)));
            let min = V::times(d_min, V::load_unsigned(chunk(&factors[TILE..])));
            ([scale; 2], Some(V::times(min, V::splat_float(-1.0))))
        }
        _ => {
            let factors = &block[HALF_BYTES + group * 2 * TILE..];
            let [first, second] = [V::load_signed(chunk(factors)), V::load_signed(chunk(&factors[TILE..]))];
            ([V::times(d, first), V::times(d, second)], None)
        }
    }
}

/// Calls `f` with the numbers of the pairs of values of a group and the registers of these pairs. `registers` is a range of
/// quarters of the group.
#[inline(always)]
fn unpack<V: Lanes, const BITS: usize>(
    values: &[u8],
    registers: std::ops::Range<usize>,
    mut f: impl FnMut(usize, V),
) {
    if BITS == 8 {
        let mask = V::splat(0x00FF_00FF);
        for (i, register) in values.chunks_exact(REGISTER_BYTES).enumerate() {
            let register = V::load(chunk(register));
            f(2 * i, register.and(mask));
            f(2 * i + 1, register.shift_right::<8>().and(mask));
        }
        return;
    }
    let mask = V::splat(0x000F_000F);
    let mut high = V::splat(0);
    for i in registers {
        let mut low = V::load(chunk(&values[i * REGISTER_BYTES..]));
        match BITS {
            5 if i == 0 => high = V::load(chunk(&values[LOW_BYTES..])),
            6 if i % 2 == 0 => high = V::load(chunk(&values[LOW_BYTES + i / 2 * REGISTER_BYTES..])),
            _ => {}
        }
        for step in 0..4 {
            let mut w = low.and(mask);
            low = low.shift_right::<4>();
            if BITS == 5 {
                w = w.or(high.shift_left::<4>().and(V::splat(0x0010_0010)));
                high = high.shift_right::<1>();
            }
            if BITS == 6 {
                w = w.or(high.shift_left::<4>().and(V::splat(0x0030_0030)));
                high = high.shift_right::<2>();
            }
            f(4 * i + step, w);
        }
    }
}

/// Writes the weights of a group, whose number in the row is `group`, to the starts of 32 rows of `out`, which begin at a
/// distance of `stride` elements: a row has the weights of one column of the tile.
#[inline(always)]
fn dequantize_group<V: Lanes, const BITS: usize, const SCALES: u8>(
    (values, scales): Tile<'_>,
    group: usize,
    out: &mut [f32],
    stride: usize,
) {
    let format = format::<BITS, SCALES>();
    let values = &values[group * BITS * REGISTER_BYTES..][..BITS * REGISTER_BYTES];
    let block = &scales[group / format.groups() * format.scale_bytes()..][..format.scale_bytes()];
    let (scale, min) = scales_of::<V, SCALES>(block, group % GROUPS_PER_BLOCK);
    let (one, zero) = (V::splat_float(1.0), V::splat_float(-format.zero() as f32));
    unpack::<V, BITS>(
        values,
        0..4,
        #[inline(always)]
        |step, w| {
            let scale = scale[step / (PAIRS / 2)];
            for (i, integer) in [w.and(V::splat(0xFFFF)), w.shift_right::<16>()].into_iter().enumerate() {
                let product = V::times(scale, V::fused(integer.to_float(), one, zero));
                let weight = if let Some(min) = min { V::fused(product, one, min) } else { product };
                out[(2 * step + i) * stride..][..TILE].copy_from_slice(&V::array(weight));
            }
        },
    );
}

/// The first bytes of a slice that has enough of them.
#[inline(always)]
fn chunk<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    let Some(chunk) = bytes.first_chunk() else { unreachable!("the slices of a tile are whole registers") };
    chunk
}
