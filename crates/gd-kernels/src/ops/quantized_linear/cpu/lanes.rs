//! Registers of 16 lanes.

use half::f16;

use crate::ops::quantized_linear::matrix::{REGISTER_BYTES, TILE};

/// 16 lanes of 32 bits, each of which is an integer or two integers of 16 bits, and 16 lanes in f32. All implementations
/// give the same bits.
pub(super) trait Lanes: Copy {
    /// 16 lanes in f32.
    type Float: Copy;

    /// The same integer in all lanes.
    fn splat(x: i32) -> Self;
    /// The lanes of [`REGISTER_BYTES`] bytes.
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self;
    /// The bits of both.
    fn and(self, mask: Self) -> Self;
    /// The bits of either.
    fn or(self, other: Self) -> Self;
    /// The lanes shifted to lower bits.
    fn shift_right<const N: u32>(self) -> Self;
    /// The lanes shifted to higher bits.
    fn shift_left<const N: u32>(self) -> Self;
    /// Adds the products of the two integers of 16 bits of every lane of `w` with those of `pair`.
    fn add_products(self, w: Self, pair: u32) -> Self;
    /// The integers in f32.
    fn to_float(self) -> Self::Float;

    /// The same number in all lanes.
    fn splat_float(x: f32) -> Self::Float;
    /// 16 numbers in f16.
    fn load_half(bytes: &[u8; 2 * TILE]) -> Self::Float;
    /// 16 integers from 0 to 255.
    fn load_unsigned(bytes: &[u8; TILE]) -> Self::Float;
    /// 16 integers from -128 to 127.
    fn load_signed(bytes: &[u8; TILE]) -> Self::Float;
    /// The products.
    fn times(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a b + c`, rounded once.
    fn fused(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// The lanes.
    fn array(x: Self::Float) -> [f32; TILE];
}

/// Lanes in an array, for processors whose instructions are not used here.
#[derive(Clone, Copy)]
pub(super) struct Portable([u32; TILE]);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(u32) -> u32) -> Self {
        Self(self.0.map(f))
    }
}

impl Lanes for Portable {
    type Float = [f32; TILE];

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self([x.cast_unsigned(); TILE])
    }

    #[inline(always)]
    fn load(bytes: &[u8; REGISTER_BYTES]) -> Self {
        Self(std::array::from_fn(|i| {
            u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        }))
    }

    #[inline(always)]
    fn and(self, mask: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & mask.0[i]))
    }

    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }

    #[inline(always)]
    fn shift_right<const N: u32>(self) -> Self {
        self.map(|x| x >> N)
    }

    #[inline(always)]
    fn shift_left<const N: u32>(self) -> Self {
        self.map(|x| x << N)
    }

    #[inline(always)]
    fn add_products(self, w: Self, pair: u32) -> Self {
        let [low, high] = [pair as i16, (pair >> 16) as i16].map(i32::from);
        Self(std::array::from_fn(|i| {
            let [w_low, w_high] = [w.0[i] as i16, (w.0[i] >> 16) as i16].map(i32::from);
            self.0[i].wrapping_add((w_low * low + w_high * high).cast_unsigned())
        }))
    }

    #[inline(always)]
    fn to_float(self) -> [f32; TILE] {
        self.0.map(|x| x.cast_signed() as f32)
    }

    #[inline(always)]
    fn splat_float(x: f32) -> [f32; TILE] {
        [x; TILE]
    }

    #[inline(always)]
    fn load_half(bytes: &[u8; 2 * TILE]) -> [f32; TILE] {
        std::array::from_fn(|i| f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn load_unsigned(bytes: &[u8; TILE]) -> [f32; TILE] {
        bytes.map(f32::from)
    }

    #[inline(always)]
    fn load_signed(bytes: &[u8; TILE]) -> [f32; TILE] {
        bytes.map(|x| f32::from(x.cast_signed()))
    }

    #[inline(always)]
    fn times(a: [f32; TILE], b: [f32; TILE]) -> [f32; TILE] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fused(a: [f32; TILE], b: [f32; TILE], c: [f32; TILE]) -> [f32; TILE] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn array(x: [f32; TILE]) -> [f32; TILE] {
        x
    }
}
