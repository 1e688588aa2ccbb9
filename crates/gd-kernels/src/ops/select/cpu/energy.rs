//! Energies of given candidates, differentiable in q, k, beta and the prior.

use std::sync::Arc;

use super::Keys;
use super::loops::{for_rows, for_rows2, head_sums, key_gradient};
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::view::View;
use crate::ops::scan::cpu::arguments::Prior;
use crate::ops::scan::cpu::block::pair_energy;
use crate::options::Score;

/// `(q, k, aux) -> energy [B, Hq, N, K]` where `aux` is beta `[Hq]` followed by the flat prior, in
/// the accumulator type. Slots without a key get +inf and no gradient.
pub(super) struct Energy {
    pub(super) keys: Arc<Keys>,
    pub(super) score: Score,
    /// The shape of the prior.
    pub(super) prior: Option<[usize; 3]>,
}

impl Energy {
    fn aux<'a, A: Real>(&self, aux: &'a [A]) -> (&'a [A], Option<Prior<A>>) {
        let (beta, prior) = aux.split_at(self.keys.sizes.q_heads);
        (beta, self.prior.map(|dims| Prior { data: prior.to_vec(), dims }))
    }

    /// The energies.
    pub(super) fn forward<T: Element, S: Element<Acc = T::Acc>>(
        &self,
        q: View<'_, T>,
        k: View<'_, S>,
        aux: &[T::Acc],
    ) -> Vec<T::Acc> {
        let (beta, prior) = self.aux(aux);
        let sizes = &self.keys.sizes;
        let mut out = vec![T::Acc::of(f64::INFINITY); self.keys.index.len()];
        for_rows(
            &mut out,
            sizes.slots,
            || (),
            #[inline(always)]
            |row, (), out| {
                let [b, h, hk, i] = sizes.coordinates(row);
                for (e, &j) in out.iter_mut().zip(self.keys.row(row)) {
                    if j >= 0 {
                        let bias = prior
                            .as_ref()
                            .map_or(T::Acc::of(0.0), |p| p.row(b, h, sizes.q_heads)[j as usize]);
                        *e = pair_energy(self.score, beta[h], bias, q.row(b, h, i), k.row(b, hk, j as usize));
                    }
                }
            },
        );
        out
    }

    /// Gradients of q, k (in T) and aux.
    pub(super) fn backward<T: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, T>,
        aux: &[T::Acc],
        grad: &[T::Acc],
    ) -> (Vec<T>, Vec<T>, Vec<T::Acc>) {
        let (sizes, d, zero) = (&self.keys.sizes, q.dims[3], T::Acc::of(0.0));
        let (beta, slots) = (&aux[..sizes.q_heads], sizes.slots);
        let two = T::Acc::of(2.0);
        // One pass over the candidates gives dq and d beta of the row.
        let mut dq = vec![T::down(zero); sizes.rows() * d];
        let mut dbeta = vec![zero; sizes.rows()];
        for_rows2(
            (&mut dq, d),
            (&mut dbeta, 1),
            || vec![zero; d],
            #[inline(always)]
            |row, sum, dq, dbeta| {
                let [b, h, hk, i] = sizes.coordinates(row);
                sum.fill(zero);
                let q = q.row(b, h, i);
                for (&g, &j) in grad[row * slots..(row + 1) * slots].iter().zip(self.keys.row(row)) {
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
                    // The derivative with respect to beta is the energy at beta = 1 without a prior.
                    dbeta[0] += g * pair_energy(self.score, T::Acc::of(1.0), zero, q, k);
                }
                dq.iter_mut().zip(sum).for_each(|(o, &mut s)| *o = T::down(s));
            },
        );
        let dk = key_gradient::<T>(
            &self.keys,
            d,
            #[inline(always)]
            |slot, [b, hk, j], sum| {
                let [_, h, _, i] = sizes.coordinates(slot / slots);
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
        let mut daux = head_sums(sizes, &dbeta);
        daux.extend(self.prior_gradient(grad));
        (dq, dk, daux)
    }

    /// The gradient of the prior b, by `d eps / d b = -1`, summed in the order of the rows.
    fn prior_gradient<A: Real>(&self, grad: &[A]) -> Vec<A> {
        let Some(dims) = self.prior else { return Vec::new() };
        let shape = Prior { data: Vec::<A>::new(), dims };
        let mut sum = vec![0f64; dims.iter().product()];
        let sizes = &self.keys.sizes;
        for (row, grad) in grad.chunks(sizes.slots).enumerate() {
            let [b, h, _, _] = sizes.coordinates(row);
            let base = shape.offset(b, h, sizes.q_heads);
            for (g, &j) in grad.iter().zip(self.keys.row(row)).filter(|(_, j)| **j >= 0) {
                sum[base + j as usize] -= g.wide();
            }
        }
        sum.into_iter().map(A::of).collect()
    }
}
