//! Energies of given candidates, differentiable in q, k, beta and the prior.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::view::{View, flat, with_view};
use crate::by_float;
use crate::ops::scan::cpu::arguments::Prior;
use crate::ops::scan::cpu::block::pair_energy;
use crate::ops::select::cpu::rows::{Dims, for_rows, for_rows2, head_sums, key_gradient};
use crate::options::Score;

/// `(q, k, aux) -> energy [B, Hq, N, K]` where `aux` is beta `[Hq]` followed by the flat prior, in
/// the accumulator type. Slots without a key get +inf and no gradient.
pub(crate) struct Energy {
    pub(crate) dims: Dims,
    pub(crate) score: Score,
    pub(crate) index: Arc<Vec<i32>>,
    pub(crate) prior: Option<[usize; 3]>,
    /// Energies already known from the scan of the same q and k.
    pub(crate) known: Option<Tensor>,
}

impl Energy {
    fn aux<'a, A: Real>(&self, aux: &'a [A]) -> (&'a [A], Option<Prior<A>>) {
        let (beta, prior) = aux.split_at(self.dims.hq);
        (beta, self.prior.map(|dims| Prior { data: prior.to_vec(), dims }))
    }

    fn forward<T: Element>(&self, q: View<'_, T>, k: View<'_, T>, aux: &[T::Acc]) -> Vec<T::Acc> {
        let (beta, prior) = self.aux(aux);
        let dims = &self.dims;
        let mut out = vec![T::Acc::of(f64::INFINITY); self.index.len()];
        for_rows(
            &mut out,
            dims.slots,
            || (),
            #[inline(always)]
            |row, (), out| {
                let [b, h, hk, i] = dims.place(row);
                for (e, &j) in out.iter_mut().zip(&self.index[row * dims.slots..]) {
                    if j >= 0 {
                        let bias =
                            prior.as_ref().map_or(T::Acc::of(0.0), |p| p.row(b, h, dims.hq)[j as usize]);
                        *e = pair_energy(self.score, beta[h], bias, q.row(b, h, i), k.row(b, hk, j as usize));
                    }
                }
            },
        );
        out
    }

    /// Gradients of q, k (in T) and aux.
    fn backward<T: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, T>,
        aux: &[T::Acc],
        grad: &[T::Acc],
    ) -> (Vec<T>, Vec<T>, Vec<T::Acc>) {
        let (dims, d, zero) = (&self.dims, q.dims[3], T::Acc::of(0.0));
        let (beta, slots) = (&aux[..dims.hq], dims.slots);
        let two = T::Acc::of(2.0);
        // One pass over the candidates gives dq and d beta of the row.
        let mut dq = vec![T::down(zero); dims.rows() * d];
        let mut dbeta = vec![zero; dims.rows()];
        for_rows2(
            (&mut dq, d),
            (&mut dbeta, 1),
            || vec![zero; d],
            #[inline(always)]
            |row, sum, dq, dbeta| {
                let [b, h, hk, i] = dims.place(row);
                sum.fill(zero);
                let q = q.row(b, h, i);
                for (&g, &j) in grad[row * slots..(row + 1) * slots].iter().zip(&self.index[row * slots..]) {
                    if j < 0 || g == zero {
                        continue;
                    }
                    let k = k.row(b, hk, j as usize);
                    match self.score {
                        Score::Energy => {
                            let c = two * beta[h] * g;
                            for ((s, q), k) in sum.iter_mut().zip(q).zip(k) {
                                *s += c * (q.up() - k.up());
                            }
                        }
                        Score::Dot => {
                            let c = -(beta[h] * g);
                            for (s, k) in sum.iter_mut().zip(k) {
                                *s += c * k.up();
                            }
                        }
                    }
                    // The derivative by beta is the energy at beta 1, without a prior.
                    dbeta[0] += g * pair_energy(self.score, T::Acc::of(1.0), zero, q, k);
                }
                dq.iter_mut().zip(sum).for_each(|(o, &mut s)| *o = T::down(s));
            },
        );
        let dk = key_gradient::<T>(
            dims,
            &self.index,
            d,
            #[inline(always)]
            |slot, [b, hk, j], sum| {
                let [_, h, _, i] = dims.place(slot / slots);
                let g = grad[slot];
                if g == zero {
                    return;
                }
                let (q, k) = (q.row(b, h, i), k.row(b, hk, j));
                match self.score {
                    Score::Energy => {
                        let c = two * beta[h] * g;
                        for ((s, q), k) in sum.iter_mut().zip(q).zip(k) {
                            *s += c * (k.up() - q.up());
                        }
                    }
                    Score::Dot => {
                        let c = -(beta[h] * g);
                        sum.iter_mut().zip(q).for_each(|(s, q)| *s += c * q.up());
                    }
                }
            },
        );
        let mut daux = head_sums(dims, &dbeta);
        daux.extend(self.prior_gradient(grad));
        (dq, dk, daux)
    }

    /// `d eps / d b = -1`, summed in the order of the rows.
    fn prior_gradient<A: Real>(&self, grad: &[A]) -> Vec<A> {
        let Some(dims) = self.prior else { return Vec::new() };
        let shape = Prior { data: Vec::<A>::new(), dims };
        let mut sum = vec![0f64; dims.iter().product()];
        for (row, (grad, index)) in
            grad.chunks(self.dims.slots).zip(self.index.chunks(self.dims.slots)).enumerate()
        {
            let [b, h, _, _] = self.dims.place(row);
            let base = shape.offset(b, h, self.dims.hq);
            for (g, &j) in grad.iter().zip(index).filter(|(_, j)| **j >= 0) {
                sum[base + j as usize] -= g.wide();
            }
        }
        sum.into_iter().map(A::of).collect()
    }
}

impl CustomOp3 for Energy {
    fn name(&self) -> &'static str {
        "candidate-energy"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        aux: &CpuStorage,
        al: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let Dims { b, hq, n, slots, .. } = self.dims;
        let shape = Shape::from((b, hq, n, slots));
        by_float!("select", q.dtype(), T => {
            type A = <T as Element>::Acc;
            let energy = match &self.known {
                Some(known) => known.flatten_all()?.to_vec1::<A>()?,
                None => self.forward(View::<T>::new(q, ql)?, View::<T>::new(k, kl)?, flat::<A>(aux, al)?),
            };
            Ok((A::to_cpu_storage_owned(energy), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        aux: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let device = q.device();
        by_float!("select", q.dtype(), T => {
            type A = <T as Element>::Acc;
            let (values, grads) = (aux.to_vec1::<A>()?, grad.flatten_all()?.to_vec1::<A>()?);
            let (dq, dk, daux) = with_view::<T, _>(q, |qv| {
                with_view::<T, _>(k, |kv| Ok(self.backward(qv, kv, &values, &grads)))
            })?;
            Ok((
                Some(Tensor::from_vec(dq, q.shape(), device)?),
                Some(Tensor::from_vec(dk, k.shape(), device)?),
                Some(Tensor::from_vec(daux, aux.shape(), device)?),
            ))
        })
    }
}
