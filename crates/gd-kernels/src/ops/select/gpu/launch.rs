//! Launches of the steps of [`select`](crate::select) on a GPU, forward and backward.
//!
//! A warp computes one query row; a row has K slots, at most [`MAX_SLOTS`]. Gradients of keys and values are summed
//! over an inverse index (key -> slots, sorted) in a fixed order. Everything but q, k, v and their gradients is f32.
//!
//! q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, index and energy `[B, Hq, N, K]`; outputs are
//! contiguous.

use bytemuck::bytes_of;

use crate::backend::gpu::kernel::{ElementType, KernelOp, Variant};
use crate::backend::gpu::params::{
    CoherenceCode, EstimatorCode, READERS_PER_WARP, ScoreCode, SelectParams, TieCode,
};
use crate::backend::gpu::{Arch, Constants, Gpu, Launch, Prior, Slice, Tensor4, elements, grid, params};
use crate::error::{Error, Result};
use crate::ops::select::gpu::inverse_index::InverseIndex;
pub use crate::ops::select::options::Rule;
pub use crate::ops::select::sizes::Sizes;
use crate::options::Barrier;

/// Maximum number of candidates of a row, protected ones included.
pub const MAX_SLOTS: usize = params::MAX_SLOTS as usize;

impl Sizes {
    fn q_dims(&self) -> [usize; 4] {
        [self.batch, self.q_heads, self.queries, self.head_dim]
    }

    fn k_dims(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.head_dim]
    }

    fn v_dims(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.keys, self.value_dim]
    }

    fn y_dims(&self) -> [usize; 4] {
        [self.batch, self.q_heads, self.queries, self.value_dim]
    }
}

/// Sizes and options of a step that the kernels cover.
#[derive(Debug, Clone, Copy)]
pub struct SelectPlan {
    sizes: Sizes,
    params: SelectParams,
    variant: Variant,
}

impl SelectPlan {
    /// Checks the sizes and options.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &Sizes, rule: &Rule, arch: &Arch) -> Result<Self> {
        let variant = Variant::new("select", sizes.dtype, arch)?;
        let s = sizes;
        if s.slots == 0 || s.slots > MAX_SLOTS {
            return Err(Error::Unsupported(format!(
                "select: {} candidates a row on a GPU; 1 to {MAX_SLOTS} are supported",
                s.slots
            )));
        }
        let estimator = EstimatorCode::try_from(rule.estimator)?;
        let count = |n: &[usize]| n.iter().map(|&n| n as u128).product::<u128>();
        elements("index", count(&[s.rows(), s.slots]))?;
        elements("y", count(&[s.rows(), s.value_dim]))?;
        elements("q", count(&[s.rows(), s.head_dim]))?;
        elements("v", count(&[s.batch, s.kv_heads, s.keys, s.value_dim.max(s.head_dim)]))?;
        let barrier = rule.barrier.unwrap_or(Barrier {
            floor: 0.0,
            margin: 0.0,
            strength: 0.0,
            entropy_trigger: 0.0,
            slack: 0.0,
        });
        let params = SelectParams {
            batch: s.batch as u32,
            q_heads: s.q_heads as u32,
            kv_heads: s.kv_heads as u32,
            queries: s.queries as u32,
            keys: s.keys as u32,
            head_dim: s.head_dim as u32,
            value_dim: s.value_dim as u32,
            slots: s.slots as u32,
            score: ScoreCode::from(rule.score) as u32,
            tie: TieCode::from(rule.tie) as u32,
            estimator: estimator as u32,
            coherence: CoherenceCode::from(rule.coherence) as u32,
            temperature: rule.temperature as f32,
            preserve_floor: rule.preserve_floor as f32,
            value_floor: rule.value_floor as f32,
            hardness: rule.hard_share() as f32,
            gate_temperature: rule.gate_temperature.unwrap_or(0.0) as f32,
            admission: rule.admission as f32,
            gate_floor: rule.gradient.gate_floor as f32,
            temperature_spread: rule.gradient.temperature_spread as f32,
            picks: rule.picks as u32,
            null_candidate: u32::from(rule.gradient.null),
            barrier_floor: barrier.floor as f32,
            barrier_margin: barrier.margin as f32,
            barrier_strength: barrier.strength as f32,
            barrier_entropy: barrier.entropy_trigger as f32,
            barrier_slack: barrier.slack as f32,
            ..SelectParams::default()
        };
        Ok(Self { sizes: *sizes, params, variant })
    }

    fn q<B>(mut self, q: &Tensor4<'_, B>) -> Result<Self> {
        let p = &mut self.params;
        [p.q_batch, p.q_head, p.q_row] = q.checked("q", self.sizes.q_dims())?;
        Ok(self)
    }

    fn k<B>(mut self, k: &Tensor4<'_, B>) -> Result<Self> {
        let p = &mut self.params;
        [p.k_batch, p.k_head, p.k_row] = k.checked("k", self.sizes.k_dims())?;
        Ok(self)
    }

    fn v<B>(mut self, v: &Tensor4<'_, B>) -> Result<Self> {
        let p = &mut self.params;
        [p.v_batch, p.v_head, p.v_row] = v.checked("v", self.sizes.v_dims())?;
        Ok(self)
    }

    fn gradient<B>(mut self, d: &Tensor4<'_, B>, dims: [usize; 4]) -> Result<Self> {
        let p = &mut self.params;
        [p.d_batch, p.d_head, p.d_row] = d.checked("gradient", dims)?;
        Ok(self)
    }

    fn prior<B>(mut self, prior: Option<&Prior<'_, B>>) -> Self {
        let p = &mut self.params;
        [p.prior_batch, p.prior_heads] = prior.map_or([0, 0], |x| x.dims.map(|n| n as u32));
        self
    }

    /// Launches the kernel of `op` over `blocks` blocks.
    fn launch<'a, G: Gpu>(
        &self,
        gpu: &G,
        op: KernelOp,
        (blocks, threads): (usize, u32),
        buffers: Vec<Option<Slice<'a, G::Buffer>>>,
    ) -> Result<()> {
        gpu.launch(&Launch {
            kernel: self.variant.kernel(op),
            grid: grid(op.symbol(), blocks as u128)?,
            block: threads,
            shared_bytes: 0,
            params: bytes_of(&self.params).to_vec(),
            constants: Constants::default(),
            buffers,
        })
    }

    /// Launches the kernel of `op` with a warp for every row.
    fn by_rows<'a, G: Gpu>(
        &self,
        gpu: &G,
        op: KernelOp,
        buffers: Vec<Option<Slice<'a, G::Buffer>>>,
    ) -> Result<()> {
        self.launch(gpu, op, (self.sizes.rows().div_ceil(8), 256), buffers)
    }

    /// Sums over the slots that hold each key into `out` `[B, Hk, M, dim]`: first chunks of entries, each by a warp;
    /// then the partial sums of the segments that span several chunks.
    fn by_keys<'a, G: Gpu>(
        &self,
        gpu: &G,
        op: KernelOp,
        (inverse, dim): (&'a InverseIndex<G::Buffer>, usize),
        buffers: Vec<Option<Slice<'a, G::Buffer>>>,
        out: Slice<'a, G::Buffer>,
    ) -> Result<()> {
        let Sizes { batch, kv_heads, keys, slots, .. } = self.sizes;
        let warps = (self.sizes.rows() * slots).div_ceil(READERS_PER_WARP as usize);
        elements("parts", warps as u128 * 2 * dim as u128)?;
        let parts = gpu.allocate(warps * 2 * dim * 4)?;
        let [starts, segments, entries] = inverse.slices();
        let mut all = vec![Some(starts), Some(segments), Some(entries), Some((&parts).into())];
        all.extend(buffers);
        all.push(Some(out));
        self.launch(gpu, op, (warps.div_ceil(8), 256), all)?;
        // The kernel takes the length of a row as head_dim.
        let params = SelectParams { head_dim: dim as u32, ..self.params };
        let segments = batch * kv_heads * keys;
        let buffers = vec![Some(starts), Some((&parts).into()), Some(out)];
        let plan = Self { params, ..*self };
        plan.launch(gpu, KernelOp::AddPartials, (segments, 128), buffers)
    }

    /// Sums f32 rows `[B, Hq, N]` into heads `[Hq]`.
    fn head_sums<G: Gpu>(&self, gpu: &G, rows: &G::Buffer, out: Slice<'_, G::Buffer>) -> Result<()> {
        self.launch(gpu, KernelOp::HeadSums, (self.sizes.q_heads, 256), vec![Some(rows.into()), Some(out)])
    }
}

/// Buffers for the choice of every row, `[B, Hq, N]` each; see [`crate::Selected`].
#[derive(Debug)]
pub struct Record<'a, B> {
    /// i32: the winning slot, -1 where the row abstains.
    pub slot: Slice<'a, B>,
    /// i32: its key.
    pub index: Slice<'a, B>,
    /// i32: the key of least energy, admitted or not.
    pub nearest: Slice<'a, B>,
    /// f32: the winner's energy, +inf where the row abstains.
    pub energy: Slice<'a, B>,
    /// f32: the energy of the next admitted candidate minus that of the winner, +inf without one.
    pub margin: Slice<'a, B>,
    /// f32: the energy gate, 0 where the row abstains.
    pub gate: Slice<'a, B>,
}

/// Candidates and the thresholds that admit them.
#[derive(Debug)]
pub struct Candidates<'a, B> {
    /// f32 `[B, Hq, N, K]`.
    pub energy: Slice<'a, B>,
    /// i32 `[B, Hq, N, K]`, -1 where unused.
    pub index: Slice<'a, B>,
    /// f32 `[Hq]`, +inf to admit all.
    pub threshold: Slice<'a, B>,
}

/// Computes the choice of every row: its record, and its output y `[B, Hq, N, Dv]`.
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn choose<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    c: &Candidates<'_, G::Buffer>,
    v: &Tensor4<'_, G::Buffer>,
    record: Option<&Record<'_, G::Buffer>>,
    y: Option<Slice<'_, G::Buffer>>,
) -> Result<()> {
    let mut buffers = vec![Some(c.energy), Some(c.index), Some(c.threshold), Some(v.data)];
    match record {
        Some(r) => buffers.extend([r.slot, r.index, r.nearest, r.energy, r.margin, r.gate].map(Some)),
        None => buffers.extend([None; 6]),
    }
    buffers.push(y);
    plan.v(v)?.by_rows(gpu, KernelOp::SelectForward, buffers)
}

/// Computes the gradients of the energies `[B, Hq, N, K]`, of v `[B, Hk, M, Dv]` and of the threshold `[Hq]` from dy.
///
/// # Errors
/// As [`choose`].
pub fn choose_backward<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    c: &Candidates<'_, G::Buffer>,
    v: &Tensor4<'_, G::Buffer>,
    dy: &Tensor4<'_, G::Buffer>,
    inverse: &InverseIndex<G::Buffer>,
    [denergy, dv, dthreshold]: [Slice<'_, G::Buffer>; 3],
) -> Result<()> {
    let plan = plan.v(v)?.gradient(dy, plan.sizes.y_dims())?;
    let rows = plan.sizes.rows();
    let (weights, dtau) = (gpu.allocate(rows * plan.sizes.slots * 4)?, gpu.allocate(rows * 4)?);
    let mut buffers = vec![Some(c.energy), Some(c.index), Some(c.threshold), Some(v.data), Some(dy.data)];
    buffers.extend([Some(denergy), Some((&weights).into()), Some((&dtau).into())]);
    plan.by_rows(gpu, KernelOp::SelectBackward, buffers)?;
    let buffers = vec![Some((&weights).into()), Some(dy.data)];
    plan.by_keys(gpu, KernelOp::ValueGradient, (inverse, plan.sizes.value_dim), buffers, dv)?;
    plan.head_sums(gpu, &dtau, dthreshold)
}

/// Computes `out` `[B, Hk, M, Dv]`: for every key the sum of the rows `d` `[B, Hq, N, Dv]` of the slots that hold it,
/// each times the slot's weight f32 `[B, Hq, N, K]`.
///
/// # Errors
/// As [`choose`].
pub fn sum_rows<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    inverse: &InverseIndex<G::Buffer>,
    weights: Slice<'_, G::Buffer>,
    d: &Tensor4<'_, G::Buffer>,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let plan = plan.gradient(d, plan.sizes.y_dims())?;
    plan.by_keys(
        gpu,
        KernelOp::ValueGradient,
        (inverse, plan.sizes.value_dim),
        vec![Some(weights), Some(d.data)],
        out,
    )
}

/// The inputs of energies.
#[derive(Debug)]
pub struct Pairs<'a, B> {
    /// `[B, Hq, N, D]`.
    pub q: Tensor4<'a, B>,
    /// `[B, Hk, M, D]`.
    pub k: Tensor4<'a, B>,
    /// f32 `[Hq]`.
    pub beta: Slice<'a, B>,
    /// i32 `[B, Hq, N, K]`, -1 where unused.
    pub index: Slice<'a, B>,
}

impl<B> Pairs<'_, B> {
    fn plan(&self, plan: &SelectPlan) -> Result<SelectPlan> {
        plan.q(&self.q)?.k(&self.k)
    }
}

/// Computes the energies of the candidates, f32 `[B, Hq, N, K]`, +inf in unused slots.
///
/// # Errors
/// As [`choose`].
pub fn energy<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    prior: Option<&Prior<'_, G::Buffer>>,
    energy: Slice<'_, G::Buffer>,
) -> Result<()> {
    let (q, k, beta, index) = (Some(x.q.data), Some(x.k.data), Some(x.beta), Some(x.index));
    let buffers = vec![q, k, beta, prior.map(|p| p.data), index, Some(energy)];
    x.plan(plan)?.prior(prior).by_rows(gpu, KernelOp::EnergyForward, buffers)
}

/// Buffers for the gradients of the inputs of energies: dq `[B, Hq, N, D]`, dk `[B, Hk, M, D]`, f32 dbeta `[Hq]` and,
/// if there is one, that of the prior in its shape.
#[derive(Debug)]
pub struct PairGradients<'a, B> {
    /// The gradient of q.
    pub q: Slice<'a, B>,
    /// The gradient of k.
    pub k: Slice<'a, B>,
    /// The gradient of beta.
    pub beta: Slice<'a, B>,
    /// The gradient of the prior, with the batch entries and heads of the prior.
    pub prior: Option<Prior<'a, B>>,
}

/// Computes the gradients of q, k, beta and the prior from that of the energies.
///
/// # Errors
/// As [`choose`].
pub fn energy_backward<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    gradient: Slice<'_, G::Buffer>,
    inverse: &InverseIndex<G::Buffer>,
    out: &PairGradients<'_, G::Buffer>,
) -> Result<()> {
    let plan = x.plan(plan)?;
    let dbeta = gpu.allocate(plan.sizes.rows() * 4)?;
    let (q, k, beta) = (Some(x.q.data), Some(x.k.data), Some(x.beta));
    let buffers = vec![q, k, beta, Some(x.index), Some(gradient), Some(out.q), Some((&dbeta).into())];
    plan.by_rows(gpu, KernelOp::EnergyBackward, buffers)?;
    plan.head_sums(gpu, &dbeta, out.beta)?;
    let dim = plan.sizes.head_dim;
    plan.by_keys(gpu, KernelOp::EnergyKeyGradient, (inverse, dim), vec![q, k, beta, Some(gradient)], out.k)?;
    if let Some(prior) = &out.prior {
        let values = prior.dims[0] * prior.dims[1] * plan.sizes.keys;
        // Summed like the gradients of keys, in f32; a row holds the prior heads of a key-value head.
        let plan = SelectPlan {
            variant: Variant { element: ElementType::F32, ..plan.variant },
            ..plan.prior(Some(prior))
        };
        let Sizes { batch, kv_heads, keys, .. } = plan.sizes;
        let rows = gpu.allocate(batch * prior.dims[1] * keys * 4)?;
        let dim = prior.dims[1] / kv_heads;
        plan.by_keys(gpu, KernelOp::PriorRows, (inverse, dim), vec![Some(gradient)], (&rows).into())?;
        let buffers = vec![Some((&rows).into()), Some(prior.data)];
        plan.launch(gpu, KernelOp::PriorGradient, (values.div_ceil(256), 256), buffers)?;
    }
    Ok(())
}

/// Computes the energies after the barrier of the rule; `flags` u8 `[B, Hq, N, K]` marks the protected candidates.
///
/// # Errors
/// As [`choose`].
pub fn barrier<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    [energy, index, flags]: [Slice<'_, G::Buffer>; 3],
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let blocks = plan.sizes.rows().div_ceil(128);
    plan.launch(
        gpu,
        KernelOp::BarrierForward,
        (blocks, 128),
        vec![Some(energy), Some(index), Some(flags), Some(out)],
    )
}

/// Computes the gradient of the energies before the barrier from the gradient of the energies after it.
///
/// # Errors
/// As [`choose`].
pub fn barrier_backward<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    [energy, index, flags]: [Slice<'_, G::Buffer>; 3],
    gradient: Slice<'_, G::Buffer>,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let buffers = vec![Some(energy), Some(index), Some(flags), Some(gradient), Some(out)];
    plan.launch(gpu, KernelOp::BarrierBackward, (plan.sizes.rows().div_ceil(128), 128), buffers)
}

/// Computes the candidates without the winners `slot` i32 `[B, Hq, N]`: i32 `[B, Hq, N, K]`. A row that abstained has
/// none.
///
/// # Errors
/// As [`choose`].
pub fn remaining<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    index: Slice<'_, G::Buffer>,
    slot: Slice<'_, G::Buffer>,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let entries = plan.sizes.rows() * plan.sizes.slots;
    plan.launch(
        gpu,
        KernelOp::SelectRemaining,
        (entries.div_ceil(256), 256),
        vec![Some(index), Some(slot), Some(out)],
    )
}

/// Computes the mixture density at the coherence point of one key for every query, and the point u*, f32 `[B, Hq, N]`
/// each; the plan is that of `Sizes::single`.
///
/// # Errors
/// As [`choose`].
pub fn density<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    alpha: Slice<'_, G::Buffer>,
    rho: Option<Slice<'_, G::Buffer>>,
    point: Option<Slice<'_, G::Buffer>>,
) -> Result<()> {
    let (q, k, beta) = (Some(x.q.data), Some(x.k.data), Some(x.beta));
    let buffers = vec![q, k, beta, Some(alpha), Some(x.index), rho, point];
    x.plan(plan)?.by_rows(gpu, KernelOp::DensityForward, buffers)
}

/// Computes the gradients of q, k, beta and alpha `[Hq]` from that of the density.
///
/// # Errors
/// As [`choose`].
pub fn density_backward<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    alpha: Slice<'_, G::Buffer>,
    gradient: Slice<'_, G::Buffer>,
    inverse: &InverseIndex<G::Buffer>,
    (out, dalpha): (&PairGradients<'_, G::Buffer>, Slice<'_, G::Buffer>),
) -> Result<()> {
    let plan = x.plan(plan)?;
    let rows = plan.sizes.rows() * 4;
    let (factor, dbeta, dalphas) = (gpu.allocate(rows)?, gpu.allocate(rows)?, gpu.allocate(rows)?);
    let (q, k, beta) = (Some(x.q.data), Some(x.k.data), Some(x.beta));
    let mut buffers = vec![q, k, beta, Some(alpha), Some(x.index), Some(gradient), Some(out.q)];
    buffers.extend([&factor, &dbeta, &dalphas].map(|b| Some(b.into())));
    plan.by_rows(gpu, KernelOp::DensityBackward, buffers)?;
    plan.head_sums(gpu, &dbeta, out.beta)?;
    plan.head_sums(gpu, &dalphas, dalpha)?;
    let dim = plan.sizes.head_dim;
    plan.by_keys(gpu, KernelOp::DensityKeyGradient, (inverse, dim), vec![q, k, Some((&factor).into())], out.k)
}

/// Computes the queries `[B, Hq, N, D]` without their components along the jumps to one key each; the plan is that of
/// `Sizes::single`, beta is not used.
///
/// # Errors
/// As [`choose`].
pub fn residual<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    out: Slice<'_, G::Buffer>,
) -> Result<()> {
    let buffers = vec![Some(x.q.data), Some(x.k.data), Some(x.index), Some(out)];
    x.plan(plan)?.by_rows(gpu, KernelOp::ResidualForward, buffers)
}

/// Computes the gradients of q `[B, Hq, N, D]` and k `[B, Hk, M, D]` from that of the residual queries.
///
/// # Errors
/// As [`choose`].
pub fn residual_backward<G: Gpu>(
    gpu: &G,
    plan: &SelectPlan,
    x: &Pairs<'_, G::Buffer>,
    gradient: &Tensor4<'_, G::Buffer>,
    inverse: &InverseIndex<G::Buffer>,
    [dq, dk]: [Slice<'_, G::Buffer>; 2],
) -> Result<()> {
    let plan = x.plan(plan)?.gradient(gradient, plan.sizes.q_dims())?;
    let (q, k) = (Some(x.q.data), Some(x.k.data));
    plan.by_rows(gpu, KernelOp::ResidualBackward, vec![q, k, Some(x.index), Some(gradient.data), Some(dq)])?;
    let dim = plan.sizes.head_dim;
    plan.by_keys(gpu, KernelOp::ResidualKeyGradient, (inverse, dim), vec![q, k, Some(gradient.data)], dk)
}
