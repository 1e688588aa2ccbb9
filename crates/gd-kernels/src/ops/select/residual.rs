//! Refinement: the part of a query that its selected key did not explain.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, WithDType};

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::view::{View, with_view};
use crate::by_float;
use crate::ops::select::cpu::rows::{Dims, for_rows, key_gradient};

/// `(q, k) -> q - <q, g> g [B, Hq, N, D]`, g the jump direction from the query to its selected key;
/// a query without a key, or on top of it, stays as it is.
pub(crate) struct Residual {
    pub(crate) dims: Dims,
    pub(crate) index: Arc<Vec<i32>>,
}

/// `|delta|^2` and `<q, delta>` for `delta = k - q`.
#[inline(always)]
fn products<T: Element>(q: &[T], k: &[T]) -> (T::Acc, T::Acc) {
    let zero = T::Acc::of(0.0);
    q.iter().zip(k).fold((zero, zero), |(length, along), (q, k)| {
        let delta = k.up() - q.up();
        (length + delta * delta, along + q.up() * delta)
    })
}

impl Residual {
    fn forward<T: Element>(&self, q: View<'_, T>, k: View<'_, T>) -> Vec<T> {
        let mut out = vec![T::down(T::Acc::of(0.0)); self.dims.rows() * q.dims[3]];
        for_rows(
            &mut out,
            q.dims[3],
            || (),
            #[inline(always)]
            |row, (), out| {
                let ([b, h, hk, i], j) = (self.dims.place(row), self.index[row]);
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
    fn backward<T: Element>(&self, q: View<'_, T>, k: View<'_, T>, dr: View<'_, T>) -> (Vec<T>, Vec<T>) {
        let (dims, d, zero) = (&self.dims, q.dims[3], T::Acc::of(0.0));
        // dk row by row; dq = dr + dc delta / |delta|^2 - dk, and dk again summed over its readers.
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
        let mut dq = vec![T::down(zero); dims.rows() * d];
        for_rows(
            &mut dq,
            d,
            || vec![zero; d],
            #[inline(always)]
            |row, delta, out| {
                let ([b, h, hk, i], j) = (dims.place(row), self.index[row]);
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
            dims,
            &self.index,
            d,
            #[inline(always)]
            |row, [b, hk, j], sum| {
                let [_, h, _, i] = dims.place(row);
                let mut delta = vec![zero; d];
                delta_gradient(q.row(b, h, i), k.row(b, hk, j), dr.row(b, h, i), &mut delta);
                sum.iter_mut().zip(&delta).for_each(|(s, &x)| *s += x);
            },
        );
        (dq, dk)
    }
}

impl CustomOp2 for Residual {
    fn name(&self) -> &'static str {
        "query-residual"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_float!("select", q.dtype(), T => {
            let residual = self.forward(View::<T>::new(q, ql)?, View::<T>::new(k, kl)?);
            Ok((T::to_cpu_storage_owned(residual), ql.shape().clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        _: &Tensor,
        dr: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dr = crate::backend::graph::with_contiguous_rows(dr)?;
        by_float!("select", q.dtype(), T => {
            let (dq, dk) = with_view::<T, _>(q, |qv| {
                with_view::<T, _>(k, |kv| with_view::<T, _>(&dr, |dr| Ok(self.backward(qv, kv, dr))))
            })?;
            Ok((
                Some(Tensor::from_vec(dq, q.shape(), q.device())?),
                Some(Tensor::from_vec(dk, k.shape(), k.device())?),
            ))
        })
    }
}
