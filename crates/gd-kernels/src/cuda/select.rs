//! `select` of CUDA tensors: the steps of `select/` on the CPU, each with its backward pass in candle's graph.
//!
//! Shapes as there; parameters, energies and records are f32. Nothing is copied to the host.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Tensor};

use super::Cuda;
use super::buffer::{Buffer, Rows, Vector};
use crate::cpu::rows::Dims;
use crate::error::Result;
use crate::fused::{Finished, attach1, attach2, attach3};
use crate::gpu::inverse::Inverse;
use crate::gpu::scan::Prior;
use crate::gpu::select::{self as gpu, Plan, Rule, Sizes};
use crate::gpu::{Gpu, Slice};
use crate::options::{Estimator, Gate};
use crate::scan::Candidates;
use crate::select::{Select, Selected};

/// One key or several for every query, and where each key is read.
struct Keys {
    index: Vector,
    plan: Plan,
    sizes: Sizes,
    /// Made by the first backward pass that needs it.
    inverse: OnceLock<Inverse<Buffer>>,
}

impl Keys {
    fn new(index: Vector, sizes: Sizes, rule: &Rule, device: &Cuda) -> Result<Arc<Self>> {
        let plan = Plan::new(&sizes, rule, &device.arch())?;
        Ok(Arc::new(Self { index, plan, sizes, inverse: OnceLock::new() }))
    }

    fn inverse(&self, device: &Cuda) -> Result<&Inverse<Buffer>> {
        if let Some(inverse) = self.inverse.get() {
            return Ok(inverse);
        }
        let inverse = Inverse::new(device, &self.sizes, self.index.slice())?;
        Ok(self.inverse.get_or_init(|| inverse))
    }

    /// `[B, Hq, N, K]`.
    fn shape(&self) -> (usize, usize, usize, usize) {
        (self.sizes.batch, self.sizes.q_heads, self.sizes.queries, self.sizes.slots)
    }
}

/// A selection on a device.
struct Selection<'a> {
    device: Arc<Cuda>,
    s: &'a Select<'a>,
    sizes: Sizes,
    rule: Rule,
    prior: Option<[usize; 2]>,
}

/// What every row chose.
struct Record {
    slot: Tensor,
    index: Tensor,
    nearest: Tensor,
    energy: Tensor,
    margin: Tensor,
    gate: Tensor,
}

/// One round: its output and record.
struct Step {
    y: Tensor,
    record: Record,
    coherence: Option<Tensor>,
}

/// The selection of validated tensors; q, k and v have contiguous rows.
pub(crate) fn select(
    dims: Dims,
    [q, k, v]: [&Tensor; 3],
    candidates: &Candidates,
    s: &Select,
) -> Result<Selected> {
    let device = Arc::new(Cuda::new(q.device())?);
    let sizes = Sizes {
        batch: dims.b,
        q_heads: dims.hq,
        kv_heads: dims.hk,
        queries: dims.n,
        keys: dims.m,
        head_dim: q.dim(3)?,
        value_dim: v.dim(3)?,
        slots: dims.slots,
        dtype: q.dtype(),
    };
    let rule = Rule {
        score: s.score,
        tie: s.tie,
        estimator: s.estimator,
        temperature: s.temperature,
        preserve: s.preserve_floor,
        value: s.value_floor,
        hardness: s.hardness,
        gate: match s.gate {
            Gate::Energy { temperature } => Some(temperature),
            Gate::None | Gate::Coherence => None,
        },
        barrier: s.barrier,
        coherence: s.coherence,
    };
    let vector = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(DType::F32)?.contiguous()?) };
    let beta = vector(s.beta)?;
    let tau = match s.threshold {
        Some(t) => vector(t)?,
        None => Tensor::full(f32::INFINITY, dims.hq, q.device())?,
    };
    let aux = match s.prior {
        Some(p) => Tensor::cat(&[&beta, &vector(&p.flatten_all()?)?], 0)?,
        None => beta.clone(),
    };
    let prior = s.prior.map(|p| p.dims3()).transpose()?.map(|(b, h, _)| [b, h]);
    let all = Selection { device: device.clone(), s, sizes, rule, prior };
    let mut keys = Keys::new(Vector::new(&candidates.index, DType::I32)?, sizes, &rule, &device)?;
    let mut query = q.clone();
    let (mut y, mut first) = (None::<Tensor>, None::<Step>);
    let count = s.rounds.map_or(1, |r| r.dims()[1]);
    for round in 0..count {
        let known = (round == 0).then_some(&candidates.energy);
        let mut energy = all.energy([&query, k, &aux], &keys, known)?;
        if let (Some(_), Some(flags)) = (s.barrier, &candidates.protected) {
            energy = all.barrier(&energy, &keys, Arc::new(Vector::new(flags, DType::U8)?))?;
        }
        let step = all.step([&query, k, v], &energy, &tau, &beta, &keys)?;
        // Weighted and added in f32: the weights' gradient is a sum over all rows.
        let out = match s.rounds {
            Some(w) => {
                let w = w.narrow(1, round, 1)?.reshape((1, dims.hq, 1, 1))?.to_dtype(DType::F32)?;
                step.y.to_dtype(DType::F32)?.broadcast_mul(&w)?
            }
            None => step.y.clone(),
        };
        y = Some(match y {
            Some(sum) => (sum + out)?,
            None => out,
        });
        if round + 1 < count {
            let rest = device.allocate(4 * sizes.rows() * sizes.slots)?;
            let slot = Vector::new(&step.record.slot, DType::I32)?;
            gpu::rest(&*device, &keys.plan, keys.index.slice(), slot.slice(), (&rest).into())?;
            keys = Keys::new(rest.into(), sizes, &rule, &device)?;
            query = all.residual([&query, k], &all.single(&step.record.index)?)?;
        }
        first.get_or_insert(step);
    }
    let (Some(y), Some(Step { record, coherence, .. })) = (y, first) else {
        unreachable!("at least one round")
    };
    let Record { index, energy, margin, gate, .. } = record;
    Ok(Selected { y: y.to_dtype(v.dtype())?, index, energy, margin, gate, coherence })
}

impl Selection<'_> {
    /// One key a query, i32 `[B, Hq, N]`.
    fn single(&self, index: &Tensor) -> Result<Arc<Keys>> {
        Keys::new(Vector::new(index, DType::I32)?, self.sizes.single(), &self.rule, &self.device)
    }

    /// Energies `[B, Hq, N, K]` of the candidates from q, k and `aux`: beta `[Hq]` and the flat prior.
    fn energy(&self, [q, k, aux]: [&Tensor; 3], keys: &Arc<Keys>, known: Option<&Tensor>) -> Result<Tensor> {
        let (device, prior) = (&self.device, self.prior);
        let result = match known {
            Some(known) => Finished::copy_of(known)?,
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
                device.finished(out, DType::F32, keys.shape())?
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
            let inverse = keys.inverse(&device)?;
            gpu::energy_backward(&*device, &keys.plan, &x.pairs(&keys), grad.slice(), inverse, &out)?;
            device.tensors([q, k, aux], [dq, dk, daux])
        })?)
    }

    fn barrier(&self, energy: &Tensor, keys: &Arc<Keys>, flags: Arc<Vector>) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        let out = device.allocate(4 * energy.elem_count())?;
        let e = Vector::new(energy, DType::F32)?;
        let rows = [e.slice(), keys.index.slice(), flags.slice()];
        gpu::barrier(&*device, &keys.plan, rows, (&out).into())?;
        let result = device.finished(out, DType::F32, keys.shape())?;
        Ok(attach1("barrier", energy, result, move |energy, grad| {
            let (e, g) = (Vector::new(energy, DType::F32)?, Vector::new(grad, DType::F32)?);
            let [de] = device.gradients([energy])?;
            let rows = [e.slice(), keys.index.slice(), flags.slice()];
            gpu::barrier_backward(&*device, &keys.plan, rows, g.slice(), (&de).into())?;
            let [de] = device.tensors([energy], [de])?;
            Ok(de)
        })?)
    }

    fn step(
        &self,
        [q, k, v]: [&Tensor; 3],
        energy: &Tensor,
        tau: &Tensor,
        beta: &Tensor,
        keys: &Arc<Keys>,
    ) -> Result<Step> {
        let hard = self.s.hardness;
        let (y, mut record) = self.choose([energy, v, tau], keys, hard)?;
        let aux = self.s.alpha.map(|a| Tensor::cat(&[beta, &a.to_dtype(DType::F32)?], 0)).transpose()?;
        let Some(aux) = aux else { return Ok(Step { y, record, coherence: None }) };
        let coherence = Some(self.points([q, k, &aux], &self.single(&record.index)?)?);
        if self.s.gate != Gate::Coherence {
            return Ok(Step { y, record, coherence });
        }
        // Of the nearest key even where it is not admitted: like the energy gate, it scales the
        // estimator's gradient there, so that a row can learn its way back.
        let rho = self.density([q, k, &aux], &self.single(&record.nearest)?)?;
        let admitted = record.energy.lt(f32::INFINITY)?.to_dtype(DType::F32)?;
        record.gate = (rho.detach() * admitted)?;
        let soft_only = self.s.estimator == Estimator::Blend || hard == 0.0;
        let scaled =
            |y: Tensor| -> Result<Tensor> { Ok(y.broadcast_mul(&rho.unsqueeze(3)?.to_dtype(v.dtype())?)?) };
        // The gate scales the selected row alone, not the soft mixture.
        let y = match (soft_only, hard == 1.0) {
            (true, _) => y,
            (false, true) => scaled(y)?,
            (false, false) => {
                let soft = (self.choose([energy, v, tau], keys, 0.0)?.0 * (1.0 - hard))?;
                (soft + (scaled(self.choose([energy, v, tau], keys, 1.0)?.0)? * hard)?)?
            }
        };
        Ok(Step { y, record, coherence })
    }

    /// The choice at the energies, and the values that it reads `[B, Hq, N, Dv]`.
    fn choose(
        &self,
        [energy, v, tau]: [&Tensor; 3],
        keys: &Arc<Keys>,
        hardness: f64,
    ) -> Result<(Tensor, Record)> {
        let (device, keys, sizes) = (self.device.clone(), keys.clone(), self.sizes);
        let plan = Plan::new(&sizes, &Rule { hardness, ..self.rule }, &device.arch())?;
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
        let shape = (sizes.batch, sizes.q_heads, sizes.queries);
        let [slot, index, nearest, energies, margin, gate] = record;
        let (int, float) = (
            |b: Buffer| device.tensor(b, DType::I32, shape),
            |b: Buffer| device.tensor(b, DType::F32, shape),
        );
        let record = Record {
            slot: int(slot)?,
            index: int(index)?,
            nearest: int(nearest)?,
            energy: float(energies)?,
            margin: float(margin)?,
            gate: float(gate)?,
        };
        let shape = (sizes.batch, sizes.q_heads, sizes.queries, sizes.value_dim);
        let result = device.finished(y, sizes.dtype, shape)?;
        let y = attach3("choose", [energy, v, tau], result, move |[energy, v, tau], _, dy| {
            let (x, dy) = (Choice::new([energy, v, tau])?, Rows::new(dy)?);
            let [de, dv, dtau] = device.gradients([energy, v, tau])?;
            gpu::choose_backward(
                &*device,
                &plan,
                &x.candidates(&keys),
                &x.v.tensor4(),
                &dy.tensor4(),
                keys.inverse(&device)?,
                (&de).into(),
                (&dv).into(),
                (&dtau).into(),
            )?;
            device.tensors([energy, v, tau], [de, dv, dtau])
        })?;
        Ok((y, record))
    }

    /// The coherence point of every row, f32 `[B, Hq, N]`; `aux` is beta and alpha `[2 Hq]`.
    fn points(&self, [q, k, aux]: [&Tensor; 3], keys: &Arc<Keys>) -> Result<Tensor> {
        let x = Operands::new([q, k, aux], None)?;
        let out = self.device.allocate(4 * keys.sizes.rows())?;
        let alpha = x.at(keys.sizes.q_heads);
        gpu::density(&*self.device, &keys.plan, &x.pairs(keys), alpha, None, Some((&out).into()))?;
        self.device.tensor(out, DType::F32, (self.sizes.batch, self.sizes.q_heads, self.sizes.queries))
    }

    /// The mixture density at that point.
    fn density(&self, [q, k, aux]: [&Tensor; 3], keys: &Arc<Keys>) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        let heads = keys.sizes.q_heads;
        let out = device.allocate(4 * keys.sizes.rows())?;
        {
            let x = Operands::new([q, k, aux], None)?;
            let (pairs, alpha) = (x.pairs(&keys), x.at(heads));
            gpu::density(&*device, &keys.plan, &pairs, alpha, Some((&out).into()), None)?;
        }
        let (b, h, n, _) = keys.shape();
        let result = device.finished(out, DType::F32, (b, h, n))?;
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
                keys.inverse(&device)?,
                &out,
                dalpha,
            )?;
            device.tensors([q, k, aux], [dq, dk, daux])
        })?)
    }

    /// The queries `[B, Hq, N, D]` without what their keys explain.
    fn residual(&self, [q, k]: [&Tensor; 2], keys: &Arc<Keys>) -> Result<Tensor> {
        let (device, keys) = (self.device.clone(), keys.clone());
        let [out] = device.gradients([q])?;
        {
            let x = Operands::new([q, k, &self.s.beta.to_dtype(DType::F32)?], None)?;
            gpu::residual(&*device, &keys.plan, &x.pairs(&keys), (&out).into())?;
        }
        let result = device.finished(out, q.dtype(), q.dims())?;
        // Not used there, but the kernels take it.
        let beta = Tensor::ones(keys.sizes.q_heads, DType::F32, q.device())?;
        Ok(attach2("query-residual", q, k, result, move |q, k, dr| {
            let (x, dr) = (Operands::new([q, k, &beta], None)?, Rows::new(dr)?);
            let [dq, dk] = device.gradients([q, k])?;
            let (inverse, out) = (keys.inverse(&device)?, [(&dq).into(), (&dk).into()]);
            gpu::residual_backward(&*device, &keys.plan, &x.pairs(&keys), &dr.tensor4(), inverse, out)?;
            device.tensors([q, k], [dq, dk])
        })?)
    }
}

/// What energies and densities are computed from.
struct Operands {
    q: Rows,
    k: Rows,
    aux: Vector,
    prior: Option<[usize; 2]>,
}

impl Operands {
    fn new([q, k, aux]: [&Tensor; 3], prior: Option<[usize; 2]>) -> Result<Self> {
        Ok(Self { q: Rows::new(q)?, k: Rows::new(k)?, aux: Vector::new(aux, DType::F32)?, prior })
    }

    fn pairs<'a>(&'a self, keys: &'a Keys) -> gpu::Pairs<'a, Buffer> {
        gpu::Pairs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.aux.slice(),
            index: keys.index.slice(),
        }
    }

    /// The auxiliary values from number `at` on.
    fn at(&self, at: usize) -> Slice<'_, Buffer> {
        let slice = self.aux.slice();
        Slice { offset: slice.offset + 4 * at, ..slice }
    }

    fn prior(&self, heads: usize) -> Option<Prior<'_, Buffer>> {
        self.prior.map(|dims| Prior { data: self.at(heads), dims })
    }
}

/// What a choice is made from.
struct Choice {
    energy: Vector,
    v: Rows,
    tau: Vector,
}

impl Choice {
    fn new([energy, v, tau]: [&Tensor; 3]) -> Result<Self> {
        let energy = Vector::new(energy, DType::F32)?;
        Ok(Self { energy, v: Rows::new(v)?, tau: Vector::new(tau, DType::F32)? })
    }

    fn candidates<'a>(&'a self, keys: &'a Keys) -> gpu::Candidates<'a, Buffer> {
        let (energy, threshold) = (self.energy.slice(), self.tau.slice());
        gpu::Candidates { energy, index: keys.index.slice(), threshold }
    }
}
