//! `select` of tensors: the flow of `select/` on the CPU over the steps of [`crate::ops::select::gpu::steps`].
//!
//! Parameters, energies and records are f32.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector};
use crate::error::Result;
use crate::ops::scan::Candidates;
use crate::ops::select::cpu::rows::Dims;
use crate::ops::select::gpu::launch as gpu;
use crate::ops::select::gpu::launch::{Rule, Sizes};
use crate::ops::select::gpu::steps::{Keys, Record, Selection};
use crate::ops::select::{Round, Select, Selected};
use crate::options::{Estimator, Gate};

/// One round: its output and record.
struct Step {
    y: Tensor,
    record: Record,
    coherence: Option<Tensor>,
}

/// The selection of validated tensors; q, k and v have contiguous rows.
pub(crate) fn select<G: TensorGpu>(
    dims: Dims,
    [q, k, v]: [&Tensor; 3],
    candidates: &Candidates,
    s: &Select,
) -> Result<Selected> {
    let device = Arc::new(G::of(q.device())?);
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
    let mut keys = Keys::new(Vector::new(&candidates.index, DType::I32)?, sizes, &rule, &*device)?;
    let mut query = q.clone();
    let (mut y, mut first, mut later) = (None::<Tensor>, None::<(Step, Tensor)>, Vec::new());
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
        if round > 0 {
            later.push(Round { index: step.record.index.clone(), y: out.detach() });
        }
        y = Some(match y {
            Some(sum) => (sum + out)?,
            None => out,
        });
        if round + 1 < count {
            let rest = device.allocate(4 * sizes.rows() * sizes.slots)?;
            let slot = Vector::new(&step.record.slot, DType::I32)?;
            gpu::rest(&*device, &keys.plan, keys.index.slice(), slot.slice(), (&rest).into())?;
            keys = Keys::new(Vector::owned(rest), sizes, &rule, &*device)?;
            query = all.residual([&query, k], &all.single(&step.record.index)?)?;
        }
        first.get_or_insert((step, energy.detach()));
    }
    let (Some(y), Some((Step { record, coherence, .. }, compared))) = (y, first) else {
        unreachable!("at least one round")
    };
    let Record { index, energy, margin, gate, .. } = record;
    let y = y.to_dtype(v.dtype())?;
    Ok(Selected { y, index, energy, margin, gate, coherence, compared, later })
}

impl<G: TensorGpu> Selection<'_, G> {
    /// One round.
    fn step(
        &self,
        [q, k, v]: [&Tensor; 3],
        energy: &Tensor,
        tau: &Tensor,
        beta: &Tensor,
        keys: &Arc<Keys<G::Buffer>>,
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
}
