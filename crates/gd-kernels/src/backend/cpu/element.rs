//! Element types of the CPU operators, and the reductions over slices that they share.
//!
//! Stored elements are f64, f32, f16 or bf16; arithmetic runs in [`Element::Acc`], which is f64 for
//! f64 and f32 for the rest. Every loop has one fixed order of additions, so that results depend
//! neither on the thread count nor on the width of the machine's vectors.

use candle_core::{DType, WithDType};
use half::{bf16, f16};
use num_traits::Float;
use pulp::Simd;
use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{AddAssign, DivAssign, MulAssign};

/// The accumulator types: f32 and f64.
pub(crate) trait Real:
    Element<Acc = Self> + Float + Sum + AddAssign + MulAssign + DivAssign + Default + Debug
{
    /// `e^self` without branches, so that loops over it vectorise. f32: relative error below 3e-7,
    /// 0 below -87.3 and infinity above 88.3.
    fn exp_fast(self) -> Self;

    /// The nearest value to `x`.
    fn of(x: f64) -> Self;

    /// The value as f64.
    fn wide(self) -> f64;

    /// A number and a tie rank in one integer that orders by both.
    type Ranked: Copy + Ord + Send + Sync;

    /// The number, which is not NaN, before the rank; zeros of either sign are the same.
    fn ranked(self, tie: u32) -> Self::Ranked;

    /// The number and rank of an integer from [`Real::ranked`].
    fn unranked(ranked: Self::Ranked) -> (Self, u32);

    /// One register of this type under instruction set `S`.
    type Lanes<S: Simd>: Copy;

    /// A register with every lane `self`.
    fn splat<S: Simd>(self, simd: S) -> Self::Lanes<S>;

    /// `a * b + c` with one rounding.
    fn fused<S: Simd>(simd: S, a: Self::Lanes<S>, b: Self::Lanes<S>, c: Self::Lanes<S>) -> Self::Lanes<S>;

    /// The sum of the lanes.
    fn total<S: Simd>(simd: S, a: Self::Lanes<S>) -> Self;

    /// The result of a comparison of two registers, lane by lane.
    type Mask<S: Simd>: Copy;

    /// `a > b`; false for a NaN.
    fn greater<S: Simd>(simd: S, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Mask<S>;

    /// `a` where the mask holds, else `b`.
    fn pick<S: Simd>(simd: S, mask: Self::Mask<S>, a: Self::Lanes<S>, b: Self::Lanes<S>) -> Self::Lanes<S>;

    /// The lanes in which the mask holds, as bits.
    fn bits<S: Simd>(mask: Self::Mask<S>) -> u32;

    /// The slice as registers, without the remainder that does not fill one.
    fn lanes<S: Simd>(x: &[Self]) -> &[Self::Lanes<S>];

    /// As [`Real::lanes`], writable.
    fn lanes_mut<S: Simd>(x: &mut [Self]) -> &mut [Self::Lanes<S>];
}

/// The order of [`Real`] as integers: flipping the bits of negative numbers sorts them.
macro_rules! ranks {
    ($bits:ident, $wide:ident) => {
        type Ranked = $wide;

        #[inline(always)]
        fn ranked(self, tie: u32) -> $wide {
            let bits = (self + 0.0).to_bits().cast_signed();
            let order = bits ^ ((bits >> ($bits::BITS - 1)) & $bits::MAX);
            $wide::from(order) << 32 | $wide::from(tie)
        }

        #[inline(always)]
        fn unranked(ranked: $wide) -> (Self, u32) {
            let order = (ranked >> 32) as $bits;
            let bits = order ^ ((order >> ($bits::BITS - 1)) & $bits::MAX);
            (Self::from_bits(bits.cast_unsigned()), ranked as u32)
        }
    };
}

/// The register operations of [`Real`] by their names in pulp.
macro_rules! registers {
    ($word:ident, $lanes:ident, $mask:ident, $splat:ident, $fused:ident, $greater:ident, $select:ident, $as_simd:ident,
     $as_mut_simd:ident, $total:ident) => {
        type Lanes<S: Simd> = S::$lanes;
        type Mask<S: Simd> = S::$mask;

        #[inline(always)]
        fn splat<S: Simd>(self, simd: S) -> S::$lanes {
            simd.$splat(self)
        }

        #[inline(always)]
        fn fused<S: Simd>(simd: S, a: S::$lanes, b: S::$lanes, c: S::$lanes) -> S::$lanes {
            simd.$fused(a, b, c)
        }

        #[inline(always)]
        fn total<S: Simd>(simd: S, a: S::$lanes) -> Self {
            simd.$total(a)
        }

        #[inline(always)]
        fn greater<S: Simd>(simd: S, a: S::$lanes, b: S::$lanes) -> S::$mask {
            simd.$greater(a, b)
        }

        #[inline(always)]
        fn pick<S: Simd>(simd: S, mask: S::$mask, a: S::$lanes, b: S::$lanes) -> S::$lanes {
            simd.$select(mask, a, b)
        }

        #[inline(always)]
        fn bits<S: Simd>(mask: S::$mask) -> u32 {
            // One bit a lane with AVX-512, a bool without vectors, else as wide as the register.
            if const { size_of::<S::$mask>() == 1 } {
                u32::from(bytemuck::cast::<S::$mask, u8>(mask))
            } else if const { size_of::<S::$mask>() == 2 } {
                u32::from(bytemuck::cast::<S::$mask, u16>(mask))
            } else {
                let lanes: &[$word] = bytemuck::cast_slice(std::slice::from_ref(&mask));
                lanes.iter().enumerate().fold(0, |bits, (w, &x)| bits | u32::from(x != 0) << w)
            }
        }

        #[inline(always)]
        fn lanes<S: Simd>(x: &[Self]) -> &[S::$lanes] {
            S::$as_simd(x).0
        }

        #[inline(always)]
        fn lanes_mut<S: Simd>(x: &mut [Self]) -> &mut [S::$lanes] {
            S::$as_mut_simd(x).0
        }
    };
}

/// A stored element.
pub(crate) trait Element: WithDType {
    /// The accumulator type.
    type Acc: Real;

    /// Widens to the accumulator.
    fn up(self) -> Self::Acc;

    /// Rounds from the accumulator.
    fn down(x: Self::Acc) -> Self;

    /// A row in the accumulator type: the row itself if the types are the same, else widened into `buffer`, which has the
    /// same length.
    fn widened<'a>(row: &'a [Self], buffer: &'a mut [Self::Acc]) -> &'a [Self::Acc];
}

impl Real for f32 {
    ranks!(i32, i64);
    registers!(
        u32,
        f32s,
        m32s,
        splat_f32s,
        mul_add_f32s,
        greater_than_f32s,
        select_f32s,
        as_simd_f32s,
        as_mut_simd_f32s,
        reduce_sum_f32s
    );

    #[inline(always)]
    fn exp_fast(self) -> f32 {
        // Adding 1.5 * 2^23 rounds to the nearest integer n and leaves n in the low mantissa bits.
        const ROUND: f32 = 12_582_912.0;
        const LN2_HIGH: f32 = 0.693_145_75;
        const LN2_LOW: f32 = 1.428_606_8e-6;
        let shifted = self * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = self - n * LN2_HIGH - n * LN2_LOW;
        // Taylor on |r| <= ln(2) / 2: the first omitted term is r^8 / 8! < 6e-9.
        let p = 1.0 / 120.0 + r * (1.0 / 720.0 + r * (1.0 / 5040.0));
        let p = 0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * p));
        let p = 1.0 + r * (1.0 + r * p);
        let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
        let y = p * f32::from_bits(exponent);
        let y = if self < -87.3 { 0.0 } else { y };
        if self > 88.3 { f32::INFINITY } else { y }
    }

    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    ranks!(i64, i128);
    registers!(
        u64,
        f64s,
        m64s,
        splat_f64s,
        mul_add_f64s,
        greater_than_f64s,
        select_f64s,
        as_simd_f64s,
        as_mut_simd_f64s,
        reduce_sum_f64s
    );

    #[inline(always)]
    fn exp_fast(self) -> f64 {
        self.exp()
    }

    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }
}

macro_rules! element {
    ($t:ty, $acc:ty, $up:expr, $down:expr, $widened:expr) => {
        impl Element for $t {
            type Acc = $acc;

            #[inline(always)]
            fn up(self) -> $acc {
                $up(self)
            }

            #[inline(always)]
            fn down(x: $acc) -> Self {
                $down(x)
            }

            #[inline(always)]
            fn widened<'a>(row: &'a [Self], buffer: &'a mut [$acc]) -> &'a [$acc] {
                $widened(row, buffer)
            }
        }
    };
}

/// A row of half precision as f32.
#[inline(always)]
fn widen<'a, T: Element>(row: &[T], buffer: &'a mut [T::Acc]) -> &'a [T::Acc] {
    buffer.iter_mut().zip(row).for_each(|(w, x)| *w = x.up());
    buffer
}

/// `f32::from` without its branch that makes a NaN quiet: a shift, which loops vectorise.
#[inline(always)]
fn bf16_up(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// `f32::from` in integer operations, which loops vectorise. The conversion of `half` checks for every element whether
/// the processor has an instruction for it.
#[inline(always)]
fn f16_up(x: f16) -> f32 {
    /// The exponent bits of an f16 at their position in an f32.
    const EXPONENT: u32 = 0x1f << 23;
    /// The difference of the exponent biases.
    const REBASE: u32 = (127 - 15) << 23;
    let bits = u32::from(x.to_bits());
    let shifted = (bits & 0x7fff) << 13;
    let rebased = shifted + REBASE;
    // Infinities and NaN have the greatest exponent in both types. A subnormal number is computed as the difference of
    // two normal numbers, which is exact.
    let special = f32::from_bits(rebased + REBASE);
    let subnormal = f32::from_bits(rebased + (1 << 23)) - f32::from_bits(REBASE + (1 << 23));
    let magnitude = match shifted & EXPONENT {
        EXPONENT => special,
        0 => subnormal,
        _ => f32::from_bits(rebased),
    };
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

element!(f64, f64, |x| x, |x| x, |row, _| row);
element!(f32, f32, |x| x, |x| x, |row, _| row);
element!(f16, f32, f16_up, f16::from_f32, widen);
element!(bf16, f32, bf16_up, bf16::from_f32, widen);

/// Runs `$body` with `$t` bound to the element type of `$dtype`; any other dtype ends the enclosing
/// function with an error that starts with `$name`.
macro_rules! by_float {
    ($name:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            ::candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            ::candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            ::candle_core::DType::F16 => {
                type $t = $crate::backend::cpu::element::F16;
                $body
            }
            ::candle_core::DType::BF16 => {
                type $t = $crate::backend::cpu::element::Bf16;
                $body
            }
            other => {
                return Err($crate::error::Error::Unsupported(format!(
                    "{}: dtype {other:?}; f64, f32, f16 and bf16 are supported",
                    $name
                ))
                .into());
            }
        }
    };
}
pub(crate) use by_float;

/// As [`by_float`] for queries of dtype `$dtype` and keys or values of dtype `$stored`: `$t` and `$s` are bound to their
/// element types, which are the same, or f32 and one of half precision.
macro_rules! by_stored {
    ($name:expr, $dtype:expr, $stored:expr, $t:ident, $s:ident => $body:expr) => {
        match ($dtype, $stored) {
            (::candle_core::DType::F32, ::candle_core::DType::F16) => {
                type $t = f32;
                type $s = $crate::backend::cpu::element::F16;
                $body
            }
            (::candle_core::DType::F32, ::candle_core::DType::BF16) => {
                type $t = f32;
                type $s = $crate::backend::cpu::element::Bf16;
                $body
            }
            (dtype, stored) if dtype != stored => {
                return Err($crate::error::Error::Unsupported(format!(
                    "{}: queries of {dtype:?} and keys or values of {stored:?}",
                    $name
                ))
                .into());
            }
            (dtype, _) => $crate::backend::cpu::element::by_float!($name, dtype, $t => {
                type $s = $t;
                $body
            }),
        }
    };
}
pub(crate) use by_stored;

/// The accumulator dtype of a tensor dtype.
pub(crate) fn acc_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}

/// The f16 of [`by_float`].
pub(crate) type F16 = f16;
/// The bf16 of [`by_float`].
pub(crate) type Bf16 = bf16;

/// Independent partial sums of a reduction: enough for two 512-bit vectors of f32. Elements behind the last whole group
/// have a separate sum: the compiler stores partial sums that a loop of unknown length indexes in memory instead of
/// registers.
const LANES: usize = 32;

/// The sum of the lanes, whose number is a power of two: the upper half is added to the lower one until one is left.
#[inline(always)]
pub(crate) fn add_up<R: Real, const N: usize>(lanes: [R; N]) -> R {
    let mut lanes = lanes;
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            let upper = lanes[i + width];
            lanes[i] += upper;
        }
        width /= 2;
    }
    lanes[0]
}

/// `sum_i f(a_i)`.
#[inline(always)]
pub(crate) fn sum1<A: Copy, R: Real>(a: &[A], f: impl Fn(A) -> R) -> R {
    let mut lanes = [R::zero(); LANES];
    let (body, rest) = a.as_chunks::<LANES>();
    for a in body {
        for i in 0..LANES {
            lanes[i] += f(a[i]);
        }
    }
    let mut tail = R::zero();
    for &a in rest {
        tail += f(a);
    }
    add_up(lanes) + tail
}

/// `sum_i f(a_i, b_i)`; both of the same length.
#[inline(always)]
pub(crate) fn sum2<A: Copy, B: Copy, R: Real>(a: &[A], b: &[B], f: impl Fn(A, B) -> R) -> R {
    let mut lanes = [R::zero(); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    let mut tail = R::zero();
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        tail += f(a, b);
    }
    add_up(lanes) + tail
}

/// `sum_i f(a_i, b_i, c_i)`; all of the same length.
#[inline(always)]
pub(crate) fn sum3<A: Copy, B: Copy, C: Copy, R: Real>(
    a: &[A],
    b: &[B],
    c: &[C],
    f: impl Fn(A, B, C) -> R,
) -> R {
    let mut lanes = [R::zero(); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (c, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i], c[i]);
        }
    }
    let mut tail = R::zero();
    for ((&a, &b), &c) in a_rest.iter().zip(b_rest).zip(c_rest) {
        tail += f(a, b, c);
    }
    add_up(lanes) + tail
}

/// The greatest element, or minus infinity of an empty slice. NaN is ignored.
#[inline(always)]
pub(crate) fn maximum<T: Element>(a: &[T]) -> T::Acc {
    let mut lanes = [T::Acc::neg_infinity(); LANES];
    let pick = |s: &mut T::Acc, a: T| {
        let a = a.up();
        *s = if a > *s { a } else { *s };
    };
    let body = a.len() / LANES * LANES;
    for a in a[..body].chunks_exact(LANES) {
        lanes.iter_mut().zip(a).for_each(|(s, &a)| pick(s, a));
    }
    let mut most = T::Acc::neg_infinity();
    a[body..].iter().for_each(|&a| pick(&mut most, a));
    lanes.into_iter().fold(most, |s, a| if a > s { a } else { s })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_safe_at_the_ends() {
        for i in -87_200..88_200 {
            let x = i as f32 * 1e-3;
            let (got, want) = (f64::from(x.exp_fast()), f64::from(x).exp());
            assert!((got - want).abs() <= 3e-7 * want, "exp({x}): {got} instead of {want}");
        }
        assert_eq!(f32::NEG_INFINITY.exp_fast(), 0.0);
        assert_eq!((-1e30f32).exp_fast(), 0.0);
        assert_eq!(f32::INFINITY.exp_fast(), f32::INFINITY);
        assert!(f32::NAN.exp_fast().is_nan());
    }

    #[test]
    fn every_half_number_widens_as_in_the_half_crate() {
        for bits in 0..=u16::MAX {
            for (got, want) in [
                (f16_up(f16::from_bits(bits)), f16::from_bits(bits).to_f32()),
                (bf16_up(bf16::from_bits(bits)), bf16::from_bits(bits).to_f32()),
            ] {
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{bits:#06x}: {got} instead of {want}");
            }
        }
    }

    #[test]
    fn ranked_numbers_order_as_the_numbers_and_then_by_the_rank() {
        let sorted = [f32::NEG_INFINITY, -1e30, -2.0, -1e-40, 0.0, 1e-40, 1.0, 3.5, f32::INFINITY];
        for pair in sorted.windows(2) {
            assert!(
                pair[0].ranked(9) < pair[1].ranked(3)
                    && f64::from(pair[0]).ranked(9) < f64::from(pair[1]).ranked(3)
            );
            assert!(pair[0].ranked(2) < pair[0].ranked(u32::MAX));
            assert_eq!(f32::unranked(pair[0].ranked(7)), (pair[0], 7));
            assert_eq!(f64::unranked(f64::from(pair[1]).ranked(8)), (f64::from(pair[1]), 8));
        }
        assert!((-0f32).ranked(1) > 0f32.ranked(0) && (-0f64).ranked(1) > 0f64.ranked(0));
    }

    #[test]
    fn reductions_cover_every_element() {
        for n in [0usize, 1, 31, 32, 33, 65] {
            let a: Vec<f64> = (0..n).map(|i| i as f64 + 1.0).collect();
            let s: f64 = a.iter().sum();
            let s2: f64 = a.iter().map(|x| x * x).sum();
            let s3: f64 = a.iter().map(|x| x * x * x).sum();
            assert_eq!(sum1(&a, |x| x), s);
            assert_eq!(sum2(&a, &a, |x, y| x * y), s2);
            assert_eq!(sum3(&a, &a, &a, |x, y, z| x * y * z), s3);
            assert_eq!(maximum(&a), if n == 0 { f64::NEG_INFINITY } else { n as f64 });
        }
    }
}
