//! Storage types and the accumulators they are computed in.

use half::{bf16, f16};
use num_traits::Float;
use pulp::Simd;

/// An accumulator: f32 for f32, f16 and bf16 tensors, f64 for f64 tensors (gradient checks).
pub(crate) trait Real:
    Float
    + candle_core::WithDType
    + std::iter::Sum
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::ops::DivAssign
    + Send
    + Sync
    + 'static
{
    /// One register of this type under instruction set `S`.
    type Lanes<S: Simd>: Copy;
    /// A register with every lane `x`.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Lanes<S>;
    /// `a * b + c` with one rounding.
    fn fused<S: Simd>(simd: S, a: Self::Lanes<S>, b: Self::Lanes<S>, c: Self::Lanes<S>) -> Self::Lanes<S>;
    /// The whole registers of a slice; a remainder is left out.
    fn lanes<S: Simd>(x: &[Self]) -> &[Self::Lanes<S>];
    /// As `lanes`, writable.
    fn lanes_mut<S: Simd>(x: &mut [Self]) -> &mut [Self::Lanes<S>];
    /// Rounds an f64.
    fn of(x: f64) -> Self;
    /// Widens to f64.
    fn wide(self) -> f64;
}

macro_rules! real {
    ($t:ty, $v:ident, $splat:ident, $fma:ident, $lanes:ident, $lanes_mut:ident) => {
        impl Real for $t {
            type Lanes<S: Simd> = S::$v;
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$v {
                simd.$splat(x)
            }
            #[inline(always)]
            fn fused<S: Simd>(simd: S, a: S::$v, b: S::$v, c: S::$v) -> S::$v {
                simd.$fma(a, b, c)
            }
            #[inline(always)]
            fn lanes<S: Simd>(x: &[Self]) -> &[S::$v] {
                S::$lanes(x).0
            }
            #[inline(always)]
            fn lanes_mut<S: Simd>(x: &mut [Self]) -> &mut [S::$v] {
                S::$lanes_mut(x).0
            }
            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self as f64
            }
        }
    };
}
real!(f32, f32s, splat_f32s, mul_add_f32s, as_simd_f32s, as_mut_simd_f32s);
real!(f64, f64s, splat_f64s, mul_add_f64s, as_simd_f64s, as_mut_simd_f64s);

/// A tensor's element type.
pub(crate) trait Element: candle_core::WithDType + Send + Sync + 'static {
    /// What it is computed in.
    type Acc: Real;
    /// Widens to the accumulator (exact).
    fn acc(self) -> Self::Acc;
    /// Rounds an accumulator to nearest.
    fn round(x: Self::Acc) -> Self;
}

macro_rules! element {
    ($t:ty, $acc:ty, $x:ident => $widen:expr, $y:ident => $round:expr) => {
        impl Element for $t {
            type Acc = $acc;
            #[inline(always)]
            fn acc(self) -> $acc {
                let $x = self;
                $widen
            }
            #[inline(always)]
            fn round($y: $acc) -> Self {
                $round
            }
        }
    };
}
element!(f32, f32, x => x, y => y);
element!(f64, f64, x => x, y => y);
element!(f16, f32, x => x.to_f32(), y => f16::from_f32(y));
element!(bf16, f32, x => x.to_f32(), y => bf16::from_f32(y));

/// Runs `$body` with `$T` bound to the element type of a floating `DType`.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::error::Error::Unsupported(format!(
                "dtype {other:?}; f32, f16, bf16 and f64 are supported"
            ))
            .into()),
        }
    };
}
pub(crate) use with_element;

/// The accumulator dtype of a tensor dtype.
pub(crate) fn acc_dtype(dtype: candle_core::DType) -> candle_core::DType {
    if dtype == candle_core::DType::F64 { dtype } else { candle_core::DType::F32 }
}
