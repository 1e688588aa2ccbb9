//! Refinement: the residual of a query, without its component along the jump to its selected key.

use std::sync::Arc;

use super::Keys;
use super::loops::{for_rows, key_gradient};
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::view::View;

/// `(q, k) -> q - <q, g> g [B, Hq, N, D]`, g the jump direction from the query to its selected key;
/// a query without a key, or equal to its key, is not changed.
pub(super) struct Residual {
    /// One key for every query.
    pub(super) keys: Arc<Keys>,
}

/// `|delta|^2` and `<q, delta>` for `delta = k - q`.
#[inline(always)]
fn products<T: Element, S: Element<Acc = T::Acc>>(q: &[T], k: &[S]) -> (T::Acc, T::Acc) {
    let zero = T::Acc::of(0.0);
    q.iter().zip(k).fold((zero, zero), |(length, along), (q, k)| {
        let delta = k.up() - q.up();
        (length + delta * delta, along + q.up() * delta)
    })
}

impl Residual {
    /// The residual queries.
    pub(super) fn forward<T: Element, S: Element<Acc = T::Acc>>(
        &self,
        q: View<'_, T>,
        k: View<'_, S>,
    ) -> Vec<T> {
        let mut out = vec![T::down(T::Acc::of(0.0)); self.keys.sizes.rows() * q.dims[3]];
        for_rows(
            &mut out,
            q.dims[3],
            || (),
            #[inline(always)]
            |row, (), out| {
                let ([b, h, hk, i], j) = (self.keys.sizes.coordinates(row), self.keys.index[row]);
                let q = q.row(b, h, i);
                out.copy_from_slice(q);
                if j < 0 {
                    return;
                }
                let k = k.row(b, hk, j as usize);
                let (length, along) = products(q, k);
                if length > T::Acc::of(0.0) {
                    let c = along / length;
                    for ((o, q), k) in out.iter_mut().zip(q).zip(k) {
                        *o = T::down(q.up() - c * (k.up() - q.up()));
                    }
                }
            },
        );
        out
    }

    /// Gradients of q and k: with `c = <q, delta> / |delta|^2`, `r = q - c delta`.
    pub(super) fn backward<T: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, T>,
        dr: View<'_, T>,
    ) -> (Vec<T>, Vec<T>) {
        let (sizes, d, zero) = (&self.keys.sizes, q.dims[3], T::Acc::of(0.0));
        // Writes the contribution of one query to dk, and returns dc / |delta|^2:
        // dq = dr + dc delta / |delta|^2 - dk, and dk is the sum over the queries that selected the key.
        let delta_gradient = |q: &[T], k: &[T], dr: &[T], out: &mut [T::Acc]| -> T::Acc {
            let (length, along) = products(q, k);
            if length <= zero {
                out.fill(zero);
                return zero;
            }
            let c = along / length;
            let dc =
                -dr.iter().zip(q.iter().zip(k)).fold(zero, |s, (g, (q, k))| s + g.up() * (k.up() - q.up()));
            let two = T::Acc::of(2.0);
            for ((o, g), (q, k)) in out.iter_mut().zip(dr).zip(q.iter().zip(k)) {
                let delta = k.up() - q.up();
                // Divided first: the product alone may leave the range of f32.
                *o = -(c * g.up()) + (dc / length) * (q.up() - two * c * delta);
            }
            dc / length
        };
        let mut dq = vec![T::down(zero); sizes.rows() * d];
        for_rows(
            &mut dq,
            d,
            || vec![zero; d],
            #[inline(always)]
            |row, delta, out| {
                let ([b, h, hk, i], j) = (sizes.coordinates(row), self.keys.index[row]);
                let (q, dr) = (q.row(b, h, i), dr.row(b, h, i));
                if j < 0 {
                    out.copy_from_slice(dr);
                    return;
                }
                let k = k.row(b, hk, j as usize);
                let c = delta_gradient(q, k, dr, delta);
                for (((o, g), dd), (q, k)) in out.iter_mut().zip(dr).zip(delta.iter()).zip(q.iter().zip(k)) {
                    *o = T::down(g.up() + c * (k.up() - q.up()) - *dd);
                }
            },
        );
        let dk = key_gradient::<T>(
            &self.keys,
            d,
            #[inline(always)]
            |row, [b, hk, j], sum| {
                let [_, h, _, i] = sizes.coordinates(row);
                let mut delta = vec![zero; d];
                delta_gradient(q.row(b, h, i), k.row(b, hk, j), dr.row(b, h, i), &mut delta);
                sum.iter_mut().zip(&delta).for_each(|(s, &x)| *s += x);
            },
        );
        (dq, dk)
    }
}
