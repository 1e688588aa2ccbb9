//! The gated running average on a GPU; see [`crate::running_average`].
//!
//! decay, write `[B, H, N]`, v `[B, Hk, N, D]`, m `[B, H, N, D]`, of one dtype; states f32, mean `[B, H, D]` and
//! log weight `[B, H]`. All but v and dm are contiguous.

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::{AVERAGE_BLOCK_STEPS, AVERAGE_SCAN_THREADS, RunningAverageParams};
use crate::backend::gpu::{Arch, Constants, Gpu, KernelOp, Launch, Slice, Tensor4, elements, grid};
use crate::error::{Error, Result};
pub use crate::ops::running_average::Sizes;
use bytemuck::bytes_of;

/// Maximum number of elements of a value row: each has a thread of the block.
pub const MAX_DIM: usize = 1024;

/// A running average whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct AveragePlan {
    sizes: Sizes,
    variant: Variant,
}

/// The step weights of a forward pass, which the backward pass reads again.
#[derive(Debug)]
pub struct Weights<B> {
    /// keep and take of every step, f32 `[B, H, N, 2]`.
    steps: B,
}

/// A state: mean f32 `[B, H, D]`, log weight f32 `[B, H]`.
#[derive(Debug)]
pub struct State<'a, B> {
    /// The average.
    pub mean: Slice<'a, B>,
    /// log d.
    pub log_weight: Slice<'a, B>,
}

/// The inputs of an average.
#[derive(Debug)]
pub struct Inputs<'a, B> {
    /// `[B, H, N]`.
    pub decay: Slice<'a, B>,
    /// `[B, H, N]`.
    pub write: Slice<'a, B>,
    /// `[B, Hk, N, D]`.
    pub v: Tensor4<'a, B>,
    /// The state before row 0; none at the start of a sequence.
    pub start: Option<State<'a, B>>,
}

impl AveragePlan {
    /// Checks the sizes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &Sizes, arch: &Arch) -> Result<Self> {
        let variant = Variant::new("running_average", sizes.dtype, arch)?;
        if sizes.dim > MAX_DIM {
            return Err(Error::Unsupported(format!(
                "running_average: value rows of {} on a GPU; at most {MAX_DIM} are supported",
                sizes.dim
            )));
        }
        let plan = Self { sizes: *sizes, variant };
        // In the backward pass, every warp of a row writes a partial product.
        let wide = sizes.dim.max(2).max(sizes.dim.div_ceil(32));
        elements("m", plan.sizes.sequences() as u128 * sizes.rows as u128 * wide as u128)?;
        let shared_bytes = sizes.heads / sizes.value_heads * plan.threads() as usize * 4;
        if shared_bytes > arch.shared_bytes as usize {
            return Err(Error::Unsupported(format!(
                "running_average: {} heads a value head of {} need {shared_bytes} bytes of shared memory; {} are available",
                sizes.heads / sizes.value_heads,
                sizes.dim,
                arch.shared_bytes
            )));
        }
        Ok(plan)
    }

    /// Blocks of steps of a sequence.
    fn blocks(&self) -> usize {
        self.sizes.rows.div_ceil(AVERAGE_BLOCK_STEPS as usize)
    }

    /// Threads of a block: one for each element of a row, in whole warps.
    fn threads(&self) -> u32 {
        self.sizes.dim.next_multiple_of(32) as u32
    }

    fn params(
        &self,
        [v_batch, v_head, v_row]: [u32; 3],
        [d_batch, d_head, d_row]: [u32; 3],
    ) -> RunningAverageParams {
        let Sizes { batch, heads, value_heads, rows, dim, .. } = self.sizes;
        RunningAverageParams {
            batch: batch as u32,
            heads: heads as u32,
            value_heads: value_heads as u32,
            rows: rows as u32,
            dim: dim as u32,
            blocks: self.blocks() as u32,
            v_batch,
            v_head,
            v_row,
            d_batch,
            d_head,
            d_row,
        }
    }

    fn launch<G: Gpu>(
        &self,
        gpu: &G,
        op: KernelOp,
        (blocks, block, shared_bytes): (usize, u32, u32),
        params: &RunningAverageParams,
        buffers: Vec<Option<Slice<'_, G::Buffer>>>,
    ) -> Result<()> {
        let grid = grid("running_average", blocks as u128)?;
        let kernel = self.variant.kernel(op);
        let (params, constants) = (bytes_of(params).to_vec(), Constants::default());
        gpu.launch(&Launch { kernel, grid, block, shared_bytes, params, constants, buffers })
    }

    /// Buffers for the carry of every block of steps, f32 `[B * H, blocks, D]`, and for the combined keep and take of
    /// its steps, f32 `[B * H, blocks, 2]`.
    fn carry<G: Gpu>(&self, gpu: &G) -> Result<[G::Buffer; 2]> {
        let blocks = self.sizes.sequences() * self.blocks();
        Ok([gpu.allocate(blocks * self.sizes.dim * 4)?, gpu.allocate(blocks * 8)?])
    }

    fn v_dims(&self) -> [usize; 4] {
        let Sizes { batch, value_heads, rows, dim, .. } = self.sizes;
        [batch, value_heads, rows, dim]
    }

    fn m_dims(&self) -> [usize; 4] {
        let Sizes { batch, heads, rows, dim, .. } = self.sizes;
        [batch, heads, rows, dim]
    }
}

/// Computes the averages m `[B, H, N, D]` and the state after the last row; returns the step weights for [`backward`].
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn forward<G: Gpu>(
    gpu: &G,
    plan: &AveragePlan,
    x: &Inputs<'_, G::Buffer>,
    m: Slice<'_, G::Buffer>,
    last: &State<'_, G::Buffer>,
) -> Result<Weights<G::Buffer>> {
    let params = plan.params(x.v.checked("v", plan.v_dims())?, [0; 3]);
    let (sequences, blocks, threads) = (plan.sizes.sequences(), plan.blocks(), plan.threads());
    let steps = gpu.allocate(sequences * plan.sizes.rows * 8)?;
    let [carry, joint] = plan.carry(gpu)?;
    let (v, weights) = (Some(x.v.data), Some(Slice::from(&steps)));
    let (carry, joint) = (Some(Slice::from(&carry)), Some(Slice::from(&joint)));
    let start = x.start.as_ref();
    let mut buffers = vec![Some(x.decay), Some(x.write), start.map(|s| s.log_weight), weights];
    buffers.push(Some(last.log_weight));
    plan.launch(
        gpu,
        KernelOp::RunningAverageWeights,
        (sequences, AVERAGE_SCAN_THREADS, 0),
        &params,
        buffers,
    )?;
    let shape = (sequences * blocks, threads, 0);
    plan.launch(gpu, KernelOp::RunningAveragePartial, shape, &params, vec![v, weights, carry, joint])?;
    let buffers = vec![joint, start.map(|s| s.mean), carry, Some(last.mean)];
    plan.launch(gpu, KernelOp::RunningAverageCarry, (sequences, threads, 0), &params, buffers)?;
    plan.launch(gpu, KernelOp::RunningAverageRows, shape, &params, vec![v, weights, carry, Some(m)])?;
    Ok(Weights { steps })
}

/// Computes the gradients of decay, write `[B, H, N]` and v `[B, Hk, N, D]` from dm; `m` is the result of [`forward`].
///
/// # Errors
/// As [`forward`].
pub fn backward<G: Gpu>(
    gpu: &G,
    plan: &AveragePlan,
    x: &Inputs<'_, G::Buffer>,
    weights: &Weights<G::Buffer>,
    m: Slice<'_, G::Buffer>,
    dm: &Tensor4<'_, G::Buffer>,
    [ddecay, dwrite, dv]: [Slice<'_, G::Buffer>; 3],
) -> Result<()> {
    let params = plan.params(x.v.checked("v", plan.v_dims())?, dm.checked("dm", plan.m_dims())?);
    let (sequences, blocks, threads) = (plan.sizes.sequences(), plan.blocks(), plan.threads());
    let Sizes { batch, heads, value_heads, rows, .. } = plan.sizes;
    let [carry, joint] = plan.carry(gpu)?;
    let dtake = gpu.allocate(sequences * rows * (threads as usize / 32) * 4)?;
    let (carry, joint, dtake) = (Slice::from(&carry), Slice::from(&joint), Slice::from(&dtake));
    let steps = Slice::from(&weights.steps);
    let buffers = vec![Some(dm.data), Some(steps), Some(carry), Some(joint)];
    let shape = (sequences * blocks, threads, 0);
    plan.launch(gpu, KernelOp::RunningAveragePartialBackward, shape, &params, buffers)?;
    let shape = (sequences, threads, 0);
    plan.launch(gpu, KernelOp::RunningAverageCarryBackward, shape, &params, vec![Some(joint), Some(carry)])?;
    let mut buffers = vec![Some(x.v.data), Some(m), Some(dm.data), Some(steps), Some(carry)];
    buffers.extend([x.start.as_ref().map(|s| s.mean), Some(dv), Some(dtake)]);
    let shared_bytes = (heads / value_heads) as u32 * threads * 4;
    let shape = (batch * value_heads * blocks, threads, shared_bytes);
    plan.launch(gpu, KernelOp::RunningAverageRowsBackward, shape, &params, buffers)?;
    let buffers = vec![Some(x.decay), Some(steps), Some(dtake), Some(ddecay), Some(dwrite)];
    plan.launch(
        gpu,
        KernelOp::RunningAverageWeightsBackward,
        (sequences, AVERAGE_SCAN_THREADS, 0),
        &params,
        buffers,
    )
}
