//! Quantisation of rows to 8-bit integers, with bounds of the error.
//!
//! `x = scale * Q + r` with `|Q_d| <= 127`. Stored are upper bounds of `|r|` (the error) and of `max(|x|, |scale * Q|)`
//! (the norm).

use crate::backend::cpu::element::{Element, Real, sum1, sum2};

/// Keys of a panel.
pub(crate) const KEYS: usize = 32;
/// Products that one instruction adds up.
pub(crate) const STEP: usize = 4;

/// Rows with a greatest magnitude outside this range are not quantised: within it no product, square or sum of a bound
/// leaves the range of f32.
const QUANTIZABLE_MAGNITUDES: std::ops::Range<f32> = 1e-12..1e15;

/// Factor that covers the rounding of the bounds themselves.
const BOUND_SAFETY_FACTOR: f32 = 1.0 + 1e-4;

/// 1.5 * 2^23: adding it to a small number rounds the number to an integer.
const ROUND_TO_INTEGER: f32 = 12_582_912.0;

/// Scale and error bounds of a quantised row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    pub(crate) scale: f32,
    /// Upper bound of the norm of the quantisation error; +inf for a row that is not quantised.
    pub(crate) error: f32,
    /// Upper bound of the norms of the row and of its quantised form.
    pub(crate) norm: f32,
}

/// Quantises a row; one that holds NaN, infinities or magnitudes outside [`QUANTIZABLE_MAGNITUDES`] becomes zeros with
/// infinite error.
#[inline(always)]
pub(crate) fn quantize<T: Element>(row: &[T], out: &mut [i8]) -> Scale {
    let up = |x: T| x.up().wide() as f32;
    // Without the sign bit, the bits of floats are ordered as the floats, with NaN above infinity.
    let bits = |x: T| up(x).to_bits() & 0x7fff_ffff;
    let most = row.iter().fold(0, |most, &x| bits(x).max(most));
    let (most, finite) = (f32::from_bits(most), most < f32::INFINITY.to_bits());
    if most == 0.0 && finite {
        out.fill(0);
        return Scale { scale: 0.0, error: 0.0, norm: 0.0 };
    }
    if !finite || !QUANTIZABLE_MAGNITUDES.contains(&most) {
        out.fill(0);
        return Scale { scale: 0.0, error: f32::INFINITY, norm: f32::INFINITY };
    }
    let (scale, inverse) = (most / 127.0, 127.0 / most);
    for (o, &x) in out.iter_mut().zip(row) {
        // The mantissa of the sum ends with the nearest integer, whose last byte is Q. |Q| is at most 127, because the
        // errors of the inverse and of the product are below half a unit.
        *o = (up(x) * inverse + ROUND_TO_INTEGER).to_bits() as i8;
    }
    let square = sum1(
        row,
        #[inline(always)]
        |x| up(x) * up(x),
    );
    let error2: f32 = sum2(
        row,
        out,
        #[inline(always)]
        |x, q| {
            let r = (-scale).mul_add(f32::from(q), up(x));
            r * r
        },
    );
    let error = error2.sqrt() * BOUND_SAFETY_FACTOR;
    Scale { scale, error, norm: square.sqrt() * BOUND_SAFETY_FACTOR + error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_hold_and_unsafe_rows_are_marked() {
        let mut out = [0i8; 5];
        for row in [
            [1.0f32, -2.0, 0.5, 3.3, -0.01],
            [1e-12, 0.0, -3e-13, 1e-20, 5e-13],
            [9e14, 1.0, -1e-30, 8e14, 3.0],
            [127.0, -127.0, 64.0, 0.0, 1.0],
        ] {
            let s = quantize(&row, &mut out);
            let r: Vec<f64> =
                row.iter().zip(out).map(|(x, q)| f64::from(*x) - f64::from(s.scale) * f64::from(q)).collect();
            let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
            let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let coarse: Vec<f64> = out.iter().map(|&q| f64::from(q) * f64::from(s.scale)).collect();
            assert!(
                norm(&r) <= f64::from(s.error) && f64::from(s.error) <= norm(&wide) * 0.01,
                "{row:?} {s:?}"
            );
            assert!(norm(&wide).max(norm(&coarse)) <= f64::from(s.norm), "{row:?} {s:?}");
            assert!(out.iter().any(|q| q.abs() == 127), "{out:?}");
        }
        assert_eq!(quantize(&[0f32; 5], &mut out), Scale { scale: 0.0, error: 0.0, norm: 0.0 });
        for bad in [f32::NAN, f32::INFINITY, 1e16, 1e-13] {
            assert_eq!(quantize(&[bad, 0.0, 0.0, 0.0, 0.0], &mut out).error, f32::INFINITY, "{bad}");
            assert_eq!(out, [0; 5]);
        }
    }
}
