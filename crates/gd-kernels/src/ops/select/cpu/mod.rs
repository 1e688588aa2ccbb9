//! The steps of `select` on the CPU.
//!
//! Loops run over query rows and over keys in tasks of a fixed size, and gradients of keys are summed over an inverse
//! index in the order of the rows, so that results have the same bits for any number of threads.

mod barrier;
mod choice;
mod coherence;
mod energy;
mod inverse_index;
mod loops;
mod residual;
mod row;

use std::sync::Arc;

use candle_core::Tensor;

use self::barrier::Lift;
use self::choice::Choice;
use self::coherence::Density;
use self::energy::Energy;
use self::residual::Residual;
use super::rounds::{Record, Steps};
use super::{Rule, Sizes};
use crate::backend::cpu::element::{Element, by_float, by_stored};
use crate::backend::cpu::view::with_view;
use crate::backend::graph::{attach1, attach2, attach3, with_contiguous_rows};
use crate::error::Result;

/// The keys of candidates, and the sizes of their tensor.
#[derive(Debug)]
pub(crate) struct Keys {
    /// `[B, Hq, N, K]`, -1 where unused.
    index: Vec<i32>,
    sizes: Sizes,
}

impl Keys {
    /// The keys of the slots of a row.
    #[inline(always)]
    fn row(&self, row: usize) -> &[i32] {
        &self.index[row * self.sizes.slots..(row + 1) * self.sizes.slots]
    }
}

/// A selection on the CPU.
pub(super) struct CpuSteps {
    pub(super) sizes: Sizes,
    pub(super) rule: Rule,
    /// The shape of the prior.
    pub(super) prior: Option<[usize; 3]>,
}

/// The elements of a tensor in row-major order.
fn values<T: candle_core::WithDType>(t: &Tensor) -> candle_core::Result<Vec<T>> {
    t.flatten_all()?.to_vec1()
}

impl Steps for CpuSteps {
    type Keys = Arc<Keys>;

    fn keys(&self, index: &Tensor) -> Result<Arc<Keys>> {
        Ok(Arc::new(Keys { index: values(index)?, sizes: self.sizes }))
    }

    fn single_keys(&self, index: &Tensor) -> Result<Arc<Keys>> {
        Ok(Arc::new(Keys { index: values(index)?, sizes: self.sizes.single() }))
    }

    fn remaining_keys(&self, keys: &Arc<Keys>, record: &Record) -> Result<Arc<Keys>> {
        let mut index = keys.index.clone();
        for (slots, winner) in index.chunks_mut(keys.sizes.slots).zip(values::<i32>(&record.slot)?) {
            match usize::try_from(winner) {
                Ok(winner) => slots[winner] = -1,
                Err(_) => slots.fill(-1),
            }
        }
        Ok(Arc::new(Keys { index, sizes: keys.sizes }))
    }

    fn energy(
        &self,
        [q, k, aux]: [&Tensor; 3],
        keys: &Arc<Keys>,
        scanned: Option<&Tensor>,
    ) -> Result<Tensor> {
        let energy = Energy { keys: keys.clone(), score: self.rule.score, prior: self.prior };
        let shape = keys.sizes.slot_shape().into();
        by_stored!("select", q.dtype(), k.dtype(), T, S => {
            type A = <T as Element>::Acc;
            let forward = match scanned {
                Some(scanned) => values::<A>(scanned)?,
                None => {
                    let aux = values::<A>(aux)?;
                    with_view::<T, _>(q, |q| with_view::<S, _>(k, |k| Ok(energy.forward(q, k, &aux))))?
                }
            };
            Ok(attach3("candidate-energy", [q, k, aux], (forward, shape), move |[q, k, aux], _, grad| {
                let (values_aux, grad) = (values::<A>(aux)?, values::<A>(grad)?);
                let (dq, dk, daux) = with_view::<T, _>(q, |q| {
                    with_view::<T, _>(k, |k| Ok(energy.backward(q, k, &values_aux, &grad)))
                })?;
                let device = q.device();
                Ok([
                    Tensor::from_vec(dq, q.shape(), device)?,
                    Tensor::from_vec(dk, k.shape(), device)?,
                    Tensor::from_vec(daux, aux.shape(), device)?,
                ])
            })?)
        })
    }

    fn barrier(&self, energy: &Tensor, keys: &Arc<Keys>, protected: &Tensor) -> Result<Tensor> {
        let Some(barrier) = self.rule.barrier else { return Ok(energy.clone()) };
        let lift = Lift { barrier, tie: self.rule.tie, keys: keys.clone(), protected: values(protected)? };
        by_float!("select", energy.dtype(), T => {
            type A = <T as Element>::Acc;
            let lifted = (lift.forward(&values::<A>(energy)?), energy.shape().clone());
            Ok(attach1("barrier", energy, lifted, move |energy, _, grad| {
                let denergy = lift.backward(&values::<A>(energy)?, &values::<A>(grad)?);
                Tensor::from_vec(denergy, energy.shape(), energy.device())
            })?)
        })
    }

    fn choose(
        &self,
        [energy, v, threshold]: [&Tensor; 3],
        keys: &Arc<Keys>,
        hardness: f64,
    ) -> Result<(Tensor, Record)> {
        let choice = Choice { rule: Rule { hardness, ..self.rule }, keys: keys.clone() };
        let (device, sizes) = (v.device(), &keys.sizes);
        by_stored!("select", self.sizes.dtype, v.dtype(), T, S => {
            type A = <T as Element>::Acc;
            let (e, t) = (values::<A>(energy)?, values::<A>(threshold)?);
            let choices = choice.choices(&e, &t);
            let y = with_view::<S, _>(v, |v| Ok(choice.forward::<T, S>(&e, v, &t)))?;
            let y = attach3("choose", [energy, v, threshold], (y, sizes.output_shape().into()),
                move |[energy, v, threshold], _, dy| {
                    let (e, t) = (values::<A>(energy)?, values::<A>(threshold)?);
                    let dy = with_contiguous_rows(dy)?;
                    let (de, dv, dt) = with_view::<T, _>(v, |v| {
                        with_view::<T, _>(&dy, |dy| Ok(choice.backward(&e, v, &t, dy)))
                    })?;
                    let device = v.device();
                    Ok([
                        Tensor::from_vec(de, energy.shape(), device)?,
                        Tensor::from_vec(dv, v.shape(), device)?,
                        Tensor::from_vec(dt, threshold.shape(), device)?,
                    ])
                })?;
            let shape = sizes.row_shape();
            let (ints, floats) =
                (|x: Vec<i32>| Tensor::from_vec(x, shape, device), |x: Vec<A>| Tensor::from_vec(x, shape, device));
            let record = Record {
                slot: ints(choices.slot)?,
                index: ints(choices.index)?,
                nearest: ints(choices.nearest)?,
                energy: floats(choices.energy)?,
                margin: floats(choices.margin)?,
                gate: floats(choices.gate)?,
            };
            Ok((y, record))
        })
    }

    fn coherence(&self, [q, k, aux]: [&Tensor; 3], keys: &Arc<Keys>) -> Result<Tensor> {
        let density = Density { mode: self.rule.coherence, keys: keys.clone() };
        by_stored!("select", q.dtype(), k.dtype(), T, S => {
            let aux = values::<<T as Element>::Acc>(aux)?;
            let points = with_view::<T, _>(q, |q| with_view::<S, _>(k, |k| Ok(density.points(q, k, &aux))))?;
            Ok(Tensor::from_vec(points, keys.sizes.row_shape(), q.device())?)
        })
    }

    fn density(&self, [q, k, aux]: [&Tensor; 3], keys: &Arc<Keys>) -> Result<Tensor> {
        let density = Density { mode: self.rule.coherence, keys: keys.clone() };
        let shape = keys.sizes.row_shape().into();
        by_stored!("select", q.dtype(), k.dtype(), T, S => {
            type A = <T as Element>::Acc;
            let rho = {
                let aux = values::<A>(aux)?;
                with_view::<T, _>(q, |q| with_view::<S, _>(k, |k| Ok(density.forward(q, k, &aux))))?
            };
            Ok(attach3("coherence-density", [q, k, aux], (rho, shape), move |[q, k, aux], _, grad| {
                let (values_aux, grad) = (values::<A>(aux)?, values::<A>(grad)?);
                let (dq, dk, daux) = with_view::<T, _>(q, |q| {
                    with_view::<T, _>(k, |k| Ok(density.backward(q, k, &values_aux, &grad)))
                })?;
                let device = q.device();
                Ok([
                    Tensor::from_vec(dq, q.shape(), device)?,
                    Tensor::from_vec(dk, k.shape(), device)?,
                    Tensor::from_vec(daux, aux.shape(), device)?,
                ])
            })?)
        })
    }

    fn residual(&self, [q, k]: [&Tensor; 2], keys: &Arc<Keys>) -> Result<Tensor> {
        let residual = Residual { keys: keys.clone() };
        by_stored!("select", q.dtype(), k.dtype(), T, S => {
            let r = with_view::<T, _>(q, |q| with_view::<S, _>(k, |k| Ok(residual.forward(q, k))))?;
            Ok(attach2("query-residual", q, k, (r, q.shape().clone()), move |q, k, dr| {
                let dr = with_contiguous_rows(dr)?;
                let (dq, dk) = with_view::<T, _>(q, |qv| {
                    with_view::<T, _>(k, |kv| with_view::<T, _>(&dr, |dr| Ok(residual.backward(qv, kv, dr))))
                })?;
                Ok([
                    Tensor::from_vec(dq, q.shape(), q.device())?,
                    Tensor::from_vec(dk, k.shape(), k.device())?,
                ])
            })?)
        })
    }
}
