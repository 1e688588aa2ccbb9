//! Rows as 8-bit integers with what is known of their error.
//!
//! `x = scale * Q + r` with `|Q_d| <= 127`, and stored upper bounds of `|r|` (the error) and of
//! `max(|x|, |scale * Q|)` (the norm).

use crate::backend::cpu::element::{Element, Real, sum1, sum2};

/// Keys of a panel.
pub(crate) const KEYS: usize = 32;
/// Products that one instruction adds up.
pub(crate) const STEP: usize = 4;

/// Magnitudes outside of which a row is not quantised: between them no product, square or sum of a
/// bound leaves the range of f32.
const SAFE: std::ops::Range<f32> = 1e-12..1e15;

/// What makes up for rounding in the bounds themselves.
const ROUND_UP: f32 = 1.0 + 1e-4;

/// 1.5 * 2^23: added to a small number it leaves no bits for a fraction.
const ROUND: f32 = 12_582_912.0;

/// What a quantised row carries beside its integers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    pub(crate) scale: f32,
    /// At least the norm of what the integers leave out; +inf for a row that is not quantised.
    pub(crate) error: f32,
    /// At least the norm of the row, and of its quantised form.
    pub(crate) norm: f32,
}

/// Quantises a row; one that holds NaN, infinities or magnitudes beyond [`SAFE`] becomes zeros with
/// infinite error.
#[inline(always)]
pub(crate) fn quantize<T: Element>(row: &[T], out: &mut [i8]) -> Scale {
    let up = |x: T| x.up().wide() as f32;
    // Without their sign, numbers are ordered as their bits are, NaN above infinity.
    let bits = |x: T| up(x).to_bits() & 0x7fff_ffff;
    let most = row.iter().fold(0, |most, &x| bits(x).max(most));
    let (most, finite) = (f32::from_bits(most), most < f32::INFINITY.to_bits());
    if most == 0.0 && finite {
        out.fill(0);
        return Scale { scale: 0.0, error: 0.0, norm: 0.0 };
    }
    if !finite || !SAFE.contains(&most) {
        out.fill(0);
        return Scale { scale: 0.0, error: f32::INFINITY, norm: f32::INFINITY };
    }
    let (scale, inverse) = (most / 127.0, 127.0 / most);
    for (o, &x) in out.iter_mut().zip(row) {
        // The sum's mantissa ends in the nearest integer, whose last byte is Q: at most 127, since
        // neither the inverse nor the product is off by half a unit.
        *o = (up(x) * inverse + ROUND).to_bits() as i8;
    }
    let square = sum1(
        row,
        #[inline(always)]
        |x| up(x) * up(x),
    );
    let left: f32 = sum2(
        row,
        out,
        #[inline(always)]
        |x, q| {
            let r = (-scale).mul_add(f32::from(q), up(x));
            r * r
        },
    );
    let error = left.sqrt() * ROUND_UP;
    Scale { scale, error, norm: square.sqrt() * ROUND_UP + error }
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
