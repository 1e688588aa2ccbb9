//! The choice itself: one value row, or nothing, from the energies of the candidates.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, WithDType};

use crate::backend::cpu::element::{Element, Real, sum2};
use crate::backend::cpu::view::{View, flat, with_view};
use crate::by_float;
use crate::ops::select::cpu::choose::{Rule, Scratch, backward, choose, weights};
use crate::ops::select::cpu::rows::{Dims, for_rows, for_rows2, head_sums, key_gradient};

/// `(energy [B, Hq, N, K], v [B, Hk, M, Dv], threshold [Hq]) -> y [B, Hq, N, Dv]`; energy and
/// threshold in the accumulator type, a threshold of +inf excludes nothing.
pub(crate) struct Choose {
    pub(crate) dims: Dims,
    pub(crate) rule: Rule<f64>,
    pub(crate) index: Arc<Vec<i32>>,
}

/// What every row chose, `[B, Hq, N]` each.
pub(crate) struct Record<A> {
    /// Winning slot of the row.
    pub(crate) slot: Vec<Option<usize>>,
    pub(crate) index: Vec<i32>,
    /// The key of least energy, admitted or not; -1 in a row without candidates.
    pub(crate) nearest: Vec<i32>,
    pub(crate) energy: Vec<A>,
    pub(crate) margin: Vec<A>,
    pub(crate) gate: Vec<A>,
}

impl Choose {
    fn rule<A: Real>(&self) -> Rule<A> {
        let r = &self.rule;
        Rule {
            tie: r.tie,
            estimator: r.estimator,
            temperature: A::of(r.temperature),
            preserve: A::of(r.preserve),
            value: A::of(r.value),
            hardness: A::of(r.hardness),
            gate: r.gate.map(A::of),
        }
    }

    /// What the rows choose at these energies. An abstaining row has index -1, energy +inf, gate 0.
    pub(crate) fn record<A: Real>(&self, energy: &[A], tau: &[A]) -> Record<A> {
        let (rule, dims, n) = (self.rule::<A>(), &self.dims, self.dims.rows());
        let mut out = Record {
            slot: Vec::with_capacity(n),
            index: Vec::with_capacity(n),
            nearest: Vec::with_capacity(n),
            energy: Vec::with_capacity(n),
            margin: Vec::with_capacity(n),
            gate: Vec::with_capacity(n),
        };
        for (row, (energy, key)) in energy.chunks(dims.slots).zip(self.index.chunks(dims.slots)).enumerate() {
            let c = choose(&rule, energy, key, tau[dims.place(row)[1]]);
            out.slot.push(c.winner);
            out.index.push(c.winner.map_or(-1, |j| key[j]));
            out.nearest.push(c.nearest.map_or(-1, |j| key[j]));
            out.energy.push(c.winner.map_or(A::of(f64::INFINITY), |j| energy[j]));
            out.margin.push(c.margin);
            out.gate.push(if c.winner.is_some() { c.rho } else { A::of(0.0) });
        }
        out
    }

    fn forward<T: Element>(&self, energy: &[T::Acc], v: View<'_, T>, tau: &[T::Acc]) -> Vec<T> {
        let (rule, dims, len, zero) = (self.rule::<T::Acc>(), &self.dims, v.dims[3], T::Acc::of(0.0));
        let slots = dims.slots;
        let mut y = vec![T::down(zero); dims.rows() * len];
        for_rows(
            &mut y,
            len,
            || (vec![zero; slots], vec![zero; len]),
            #[inline(always)]
            |row, (w, sum), out| {
                let [b, h, hk, _] = dims.place(row);
                let (e, key) =
                    (&energy[row * slots..(row + 1) * slots], &self.index[row * slots..(row + 1) * slots]);
                weights(&rule, &choose(&rule, e, key, tau[h]), e, key, tau[h], w);
                sum.fill(zero);
                // A row of weight 0 is not read: a NaN in it must not reach the output.
                for (&w, &j) in w.iter().zip(key).filter(|(w, _)| **w != zero) {
                    let v = v.row(b, hk, j as usize);
                    sum.iter_mut().zip(v).for_each(|(s, v)| *s += w * v.up());
                }
                out.iter_mut().zip(sum).for_each(|(o, &mut s)| *o = T::down(s));
            },
        );
        y
    }

    /// Gradients of energy, v and threshold.
    fn backward<T: Element>(
        &self,
        energy: &[T::Acc],
        v: View<'_, T>,
        tau: &[T::Acc],
        dy: View<'_, T>,
    ) -> (Vec<T::Acc>, Vec<T>, Vec<T::Acc>) {
        let (rule, dims, zero) = (self.rule::<T::Acc>(), &self.dims, T::Acc::of(0.0));
        let slots = dims.slots;
        let mut de = vec![zero; dims.rows() * slots];
        // Of each row K value weights and the threshold's gradient.
        let mut rest = vec![zero; dims.rows() * (slots + 1)];
        for_rows2(
            (&mut de, slots),
            (&mut rest, slots + 1),
            || (vec![zero; slots], Scratch::new(slots)),
            #[inline(always)]
            |row, (a, scratch), de, rest| {
                let [b, h, hk, i] = dims.place(row);
                let (e, key) =
                    (&energy[row * slots..(row + 1) * slots], &self.index[row * slots..(row + 1) * slots]);
                let dy = dy.row(b, h, i);
                for (a, &j) in a.iter_mut().zip(key) {
                    *a =
                        if j < 0 { zero } else { sum2(dy, v.row(b, hk, j as usize), |d, v| d.up() * v.up()) };
                }
                let c = choose(&rule, e, key, tau[h]);
                let (dv, dtau) = rest.split_at_mut(slots);
                dtau[0] = backward(&rule, &c, e, key, tau[h], a, scratch, de, dv);
            },
        );
        let dtau: Vec<T::Acc> = rest.iter().skip(slots).step_by(slots + 1).copied().collect();
        let dv = key_gradient::<T>(
            dims,
            &self.index,
            v.dims[3],
            #[inline(always)]
            |slot, _, sum| {
                let (row, s) = (slot / slots, slot % slots);
                let w = rest[row * (slots + 1) + s];
                if w != zero {
                    let [b, h, _, i] = dims.place(row);
                    sum.iter_mut().zip(dy.row(b, h, i)).for_each(|(s, d)| *s += w * d.up());
                }
            },
        );
        (de, dv, head_sums(dims, &dtau))
    }
}

impl CustomOp3 for Choose {
    fn name(&self) -> &'static str {
        "choose"
    }

    fn cpu_fwd(
        &self,
        energy: &CpuStorage,
        el: &Layout,
        v: &CpuStorage,
        vl: &Layout,
        tau: &CpuStorage,
        tl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_float!("select", v.dtype(), T => {
            type A = <T as Element>::Acc;
            let view = View::<T>::new(v, vl)?;
            let shape = Shape::from((self.dims.b, self.dims.hq, self.dims.n, view.dims[3]));
            let y = self.forward(flat::<A>(energy, el)?, view, flat::<A>(tau, tl)?);
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    fn bwd(
        &self,
        energy: &Tensor,
        v: &Tensor,
        tau: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let device = v.device();
        let dy = crate::backend::graph::with_contiguous_rows(dy)?;
        by_float!("select", v.dtype(), T => {
            type A = <T as Element>::Acc;
            let (e, t) = (energy.flatten_all()?.to_vec1::<A>()?, tau.to_vec1::<A>()?);
            let (de, dv, dtau) = with_view::<T, _>(v, |vv| {
                with_view::<T, _>(&dy, |dy| Ok(self.backward(&e, vv, &t, dy)))
            })?;
            Ok((
                Some(Tensor::from_vec(de, energy.shape(), device)?),
                Some(Tensor::from_vec(dv, v.shape(), device)?),
                Some(Tensor::from_vec(dtau, tau.shape(), device)?),
            ))
        })
    }
}
