//! The steps of a selection on a GPU, each with its backward pass in candle's graph.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor};

use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::gpu::{Prior, Slice};
use crate::backend::graph::{Finished, attach1, attach2, attach3};
use crate::error::Result;
use crate::ops::select::gpu::inverse_index::InverseIndex;
use crate::ops::select::gpu::launch::{self as gpu, SelectPlan};
use crate::ops::select::rounds::{Record, Steps};
use crate::ops::select::{Rule, Sizes};

/// One key or several for every query.
pub(crate) struct Keys<B> {
    index: Vector<B>,
    plan: SelectPlan,
    sizes: Sizes,
    /// Computed by the first backward pass that needs it.
    inverse: OnceLock<InverseIndex<B>>,
}

impl<B: From<Tensor>> Keys<B> {
    fn inverse<G: TensorGpu<Buffer = B>>(&self, device: &G) -> Result<&InverseIndex<B>> {
        if let Some(inverse) = self.inverse.get() {
            return Ok(inverse);
        }
        let inverse = InverseIndex::new(device, &self.sizes, self.index.slice())?;
        Ok(self.inverse.get_or_init(|| inverse))
    }
}

/// A selection on a GPU.
pub(crate) struct GpuSteps<G> {
    device: Arc<G>,
    sizes: Sizes,
    rule: Rule,
    /// Batch entries and heads of the prior.
    prior: Option<[usize; 2]>,
}

impl<G: TensorGpu> GpuSteps<G> {
    pub(crate) fn new(device: &Device, sizes: Sizes, rule: Rule, prior: Option<[usize; 2]>) -> Result<Self> {
        Ok(Self { device: Arc::new(G::of(device)?), sizes, rule, prior })
    }

    fn keys_of(&self, index: Vector<G::Buffer>, sizes: Sizes) -> Result<Arc<Keys<G::Buffer>>> {
        let plan = SelectPlan::new(&sizes, &self.rule, &self.device.arch())?;
        Ok(Arc::new(Keys { index, plan, sizes, inverse: OnceLock::new() }))
    }
}

impl<G: TensorGpu> Steps for GpuSteps<G> {
    type Keys = Arc<Keys<G::Buffer>>;

    fn keys(&self, index: &Tensor) -> Result<Self::Keys> {
        self.keys_of(Vector::new(index, DType::I32)?, self.sizes)
    }

    fn single_keys(&self, index: &Tensor) -> Result<Self::Keys> {
        self.keys_of(Vector::new(index, DType::I32)?, self.sizes.single())
    }

    fn remaining_keys(&self, keys: &Self::Keys, record: &Record) -> Result<Self::Keys> {
        let remaining = self.device.allocate(4 * keys.sizes.rows() * keys.sizes.slots)?;
        let slot = Vector::new(&record.slot, DType::I32)?;
        gpu::remaining(&*self.device, &keys.plan, keys.index.slice(), slot.slice(), (&remaining).into())?;
        self.keys_of(Vector::owned(remaining), keys.sizes)
    }

    fn energy(
        &self,
        [q, k, aux]: [&Tensor; 3],
        keys: &Self::Keys,
        scanned: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (device, prior) = (&self.device, self.prior);
        let result = match scanned {
            Some(scanned) => Finished::copy_of(scanned)?,
            None => {
                let out = device.allocate(4 * keys.sizes.rows() * keys.sizes.slots)?;
                let x = Operands::new([q, k, aux], prior)?;
                gpu::energy(
                    &**device,
                    &keys.plan,
                    &x.pairs(keys),
                    x.prior(keys.sizes.q_heads).as_ref(),
                    (&out).into(),
                )?;
                device.finished(out, DType::F32, keys.sizes.slot_shape())?
            }
        };
        let (device, keys) = (device.clone(), keys.clone());
        Ok(attach3("candidate-energy", [q, k, aux], result, move |[q, k, aux], _, grad| {
            let x = Operands::new([q, k, aux], prior)?;
            let grad = Vector::new(grad, DType::F32)?;
            let [dq, dk, daux] = device.gradients([q, k, aux])?;
            let of_prior = Slice { buffer: &daux, offset: 4 * keys.sizes.q_heads };
            let out = gpu::PairGradients {
                q: (&dq).into(),
                k: (&dk).into(),
                beta: (&daux).into(),
                prior: prior.map(|dims| Prior { data: of_prior, dims }),
            };
            let inverse = keys.inverse(&*device)?;
            gpu::energy_backward(&*device, &keys.plan, &x.pairs(&keys), grad.slice(), inverse, &out)?;
            device.tensors([q, k, aux], [dq, dk, daux])
        })?)
    }

    fn barrier(&self, energy: &Tensor, keys: &Self::Keys, protected: &Tensor) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        let flags = Vector::new(protected, DType::U8)?;
        let out = device.allocate(4 * energy.elem_count())?;
        let e = Vector::new(energy, DType::F32)?;
        let rows = [e.slice(), keys.index.slice(), flags.slice()];
        gpu::barrier(&*device, &keys.plan, rows, (&out).into())?;
        let result = device.finished(out, DType::F32, keys.sizes.slot_shape())?;
        Ok(attach1("barrier", energy, result, move |energy, _, grad| {
            let (e, g) = (Vector::new(energy, DType::F32)?, Vector::new(grad, DType::F32)?);
            let [de] = device.gradients([energy])?;
            let rows = [e.slice(), keys.index.slice(), flags.slice()];
            gpu::barrier_backward(&*device, &keys.plan, rows, g.slice(), (&de).into())?;
            let [de] = device.tensors([energy], [de])?;
            Ok(de)
        })?)
    }

    fn choose(
        &self,
        [energy, v, tau]: [&Tensor; 3],
        keys: &Self::Keys,
        hardness: f64,
    ) -> Result<(Tensor, Record)> {
        let (device, keys, sizes) = (self.device.clone(), keys.clone(), self.sizes);
        let of_choice = if tau.rank() == 1 { sizes } else { sizes.rows_as_heads() };
        let plan = SelectPlan::new(&of_choice, &Rule { hardness, ..self.rule }, &device.arch())?;
        let rows = sizes.rows();
        let y = device.allocate(rows * sizes.value_dim * sizes.dtype.size_in_bytes())?;
        let column = || device.allocate(4 * rows);
        let record = [column()?, column()?, column()?, column()?, column()?, column()?];
        {
            let [slot, index, nearest, energies, margin, gate] = &record;
            let into = gpu::Record {
                slot: slot.into(),
                index: index.into(),
                nearest: nearest.into(),
                energy: energies.into(),
                margin: margin.into(),
                gate: gate.into(),
            };
            let x = Choice::new([energy, v, tau])?;
            gpu::choose(
                &*device,
                &plan,
                &x.candidates(&keys),
                &x.v.tensor4(),
                Some(&into),
                Some((&y).into()),
            )?;
        }
        let shape = sizes.row_shape();
        let [slot, index, nearest, energies, margin, gate] = record;
        let (int, float) = (
            |b: G::Buffer| device.tensor(b, DType::I32, shape),
            |b: G::Buffer| device.tensor(b, DType::F32, shape),
        );
        let record = Record {
            slot: int(slot)?,
            index: int(index)?,
            nearest: int(nearest)?,
            energy: float(energies)?,
            margin: float(margin)?,
            gate: float(gate)?,
        };
        let result = device.finished(y, sizes.dtype, sizes.output_shape())?;
        let y = attach3("choose", [energy, v, tau], result, move |[energy, v, tau], _, dy| {
            let x = Choice::new([energy, v, tau])?;
            let dy = match tau.rank() {
                1 => Rows::new(dy)?,
                _ => Rows::new(&dy.contiguous()?.reshape((1, sizes.rows(), 1, sizes.value_dim))?)?,
            };
            let [de, dv, dtau] = device.gradients([energy, v, tau])?;
            gpu::choose_backward(
                &*device,
                &plan,
                &x.candidates(&keys),
                &x.v.tensor4(),
                &dy.tensor4(),
                keys.inverse(&*device)?,
                [(&de).into(), (&dv).into(), (&dtau).into()],
            )?;
            device.tensors([energy, v, tau], [de, dv, dtau])
        })?;
        Ok((y, record))
    }

    fn coherence(&self, [q, k, aux]: [&Tensor; 3], keys: &Self::Keys) -> Result<Tensor> {
        let x = Operands::new([q, k, aux], None)?;
        let out = self.device.allocate(4 * keys.sizes.rows())?;
        let alpha = x.at(keys.sizes.q_heads);
        gpu::density(&*self.device, &keys.plan, &x.pairs(keys), alpha, None, Some((&out).into()))?;
        self.device.tensor(out, DType::F32, self.sizes.row_shape())
    }

    fn density(&self, [q, k, aux]: [&Tensor; 3], keys: &Self::Keys) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        let heads = keys.sizes.q_heads;
        let out = device.allocate(4 * keys.sizes.rows())?;
        {
            let x = Operands::new([q, k, aux], None)?;
            let (pairs, alpha) = (x.pairs(&keys), x.at(heads));
            gpu::density(&*device, &keys.plan, &pairs, alpha, Some((&out).into()), None)?;
        }
        let result = device.finished(out, DType::F32, keys.sizes.row_shape())?;
        Ok(attach3("coherence-density", [q, k, aux], result, move |[q, k, aux], _, grad| {
            let x = Operands::new([q, k, aux], None)?;
            let grad = Vector::new(grad, DType::F32)?;
            let [dq, dk, daux] = device.gradients([q, k, aux])?;
            let out =
                gpu::PairGradients { q: (&dq).into(), k: (&dk).into(), beta: (&daux).into(), prior: None };
            let dalpha = Slice { buffer: &daux, offset: 4 * heads };
            gpu::density_backward(
                &*device,
                &keys.plan,
                &x.pairs(&keys),
                x.at(heads),
                grad.slice(),
                keys.inverse(&*device)?,
                (&out, dalpha),
            )?;
            device.tensors([q, k, aux], [dq, dk, daux])
        })?)
    }

    fn residual(&self, [q, k]: [&Tensor; 2], keys: &Self::Keys) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        // `Operands` has a beta, which the kernels of this step do not read.
        let beta = Tensor::ones(keys.sizes.q_heads, DType::F32, q.device())?;
        let [out] = device.gradients([q])?;
        {
            let x = Operands::new([q, k, &beta], None)?;
            gpu::residual(&*device, &keys.plan, &x.pairs(&keys), (&out).into())?;
        }
        let result = device.finished(out, q.dtype(), q.dims())?;
        Ok(attach2("query-residual", q, k, result, move |q, k, dr| {
            let (x, dr) = (Operands::new([q, k, &beta], None)?, Rows::new(dr)?);
            let [dq, dk] = device.gradients([q, k])?;
            let (inverse, out) = (keys.inverse(&*device)?, [(&dq).into(), (&dk).into()]);
            gpu::residual_backward(&*device, &keys.plan, &x.pairs(&keys), &dr.tensor4(), inverse, out)?;
            device.tensors([q, k], [dq, dk])
        })?)
    }
}

/// The inputs of energies and densities.
struct Operands<B> {
    q: Rows<B>,
    k: Rows<B>,
    aux: Vector<B>,
    prior: Option<[usize; 2]>,
}

impl<B: From<Tensor>> Operands<B> {
    fn new([q, k, aux]: [&Tensor; 3], prior: Option<[usize; 2]>) -> Result<Self> {
        Ok(Self { q: Rows::new(q)?, k: Rows::new(k)?, aux: Vector::new(aux, DType::F32)?, prior })
    }

    fn pairs<'a>(&'a self, keys: &'a Keys<B>) -> gpu::Pairs<'a, B> {
        gpu::Pairs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.aux.slice(),
            index: keys.index.slice(),
        }
    }

    /// The auxiliary values from index `at`.
    fn at(&self, at: usize) -> Slice<'_, B> {
        let slice = self.aux.slice();
        Slice { offset: slice.offset + 4 * at, ..slice }
    }

    fn prior(&self, heads: usize) -> Option<Prior<'_, B>> {
        self.prior.map(|dims| Prior { data: self.at(heads), dims })
    }
}

/// The inputs of a choice. With a threshold per row, v has the key-value heads of all batch entries in one.
struct Choice<B> {
    energy: Vector<B>,
    v: Rows<B>,
    tau: Vector<B>,
}

impl<B: From<Tensor>> Choice<B> {
    fn new([energy, v, tau]: [&Tensor; 3]) -> Result<Self> {
        let energy = Vector::new(energy, DType::F32)?;
        let v = match tau.rank() {
            1 => Rows::new(v)?,
            _ => Rows::with_heads_of_all_entries(v)?,
        };
        Ok(Self { energy, v, tau: Vector::new(tau, DType::F32)? })
    }

    fn candidates<'a>(&'a self, keys: &'a Keys<B>) -> gpu::Candidates<'a, B> {
        let (energy, threshold) = (self.energy.slice(), self.tau.slice());
        gpu::Candidates { energy, index: keys.index.slice(), threshold }
    }
}
