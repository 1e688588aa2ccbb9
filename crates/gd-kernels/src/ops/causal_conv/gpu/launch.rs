//! The depthwise causal convolution on a GPU; see [`crate::causal_conv`].
//!
//! x, y and their gradients `[B, N, C]`, weight `[C, W]`, past `[B, W - 1, C]`, all of one dtype; outputs,
//! weight and past are contiguous.

use bytemuck::{bytes_of, cast_slice};
use candle_core::DType;

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::params::{CONV_BLOCK_ROWS, CausalConvParams};
use crate::backend::gpu::{Arch, Constants, Gpu, KernelOp, Launch, Slice, Tensor4, elements, grid};
use crate::error::Result;

/// Channels of a thread block, one per thread.
const BLOCK_CHANNELS: usize = 128;

/// The sizes of a convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// B.
    pub batch: usize,
    /// N.
    pub rows: usize,
    /// C.
    pub channels: usize,
    /// W.
    pub width: usize,
    /// The dtype of all tensors.
    pub dtype: DType,
}

/// A convolution whose sizes the kernels cover.
#[derive(Debug, Clone)]
pub struct ConvPlan {
    sizes: Sizes,
    variant: Variant,
    /// For packed sequences: where the boundaries of each batch entry start in the rest of the table, `[B + 1]`, then
    /// all boundaries. Empty for one sequence per batch entry.
    table: Vec<i32>,
}

/// Rows `[B, N, C]` whose channels are contiguous.
#[derive(Debug)]
pub struct Rows<'a, B> {
    /// The first element.
    pub data: Slice<'a, B>,
    /// Strides of batch and rows, in elements.
    pub strides: [usize; 2],
}

impl<B> Rows<'_, B> {
    fn checked(&self, name: &str, s: &Sizes) -> Result<[u32; 2]> {
        let [batch, row] = self.strides;
        let rows = Tensor4 { data: self.data, strides: [batch, 0, row] };
        let [batch, _, row] = rows.checked(name, [s.batch, 1, s.rows, s.channels])?;
        Ok([batch, row])
    }
}

impl ConvPlan {
    /// Checks the sizes. `boundaries` are the validated ones of packed sequences: one list for all batch entries, or
    /// one for each.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(sizes: &Sizes, boundaries: Option<&[Vec<usize>]>, arch: &Arch) -> Result<Self> {
        let Sizes { batch, rows, channels, width, dtype } = *sizes;
        let variant = Variant::new("causal_conv", dtype, arch)?;
        elements("x", batch as u128 * rows as u128 * channels as u128)?;
        elements("weight", channels as u128 * width as u128)?;
        elements("rows and filter width", rows as u128 + width as u128)?;
        let mut table = Vec::new();
        if let Some(boundaries) = boundaries {
            let ends = |b: usize| &boundaries[if boundaries.len() == 1 { 0 } else { b }];
            let mut first = 0;
            for b in 0..=batch {
                table.push(first);
                first += if b < batch { ends(b).len() as i32 } else { 0 };
            }
            (0..batch).for_each(|b| table.extend(ends(b).iter().map(|&end| end as i32)));
        }
        let plan = Self { sizes: *sizes, variant, table };
        grid("causal_conv", plan.blocks() as u128)?;
        Ok(plan)
    }

    /// Chunks of rows of a batch entry.
    fn chunks(&self) -> usize {
        self.sizes.rows.div_ceil(CONV_BLOCK_ROWS as usize)
    }

    fn blocks(&self) -> usize {
        self.sizes.batch * self.chunks() * self.sizes.channels.div_ceil(BLOCK_CHANNELS)
    }

    fn table<G: Gpu>(&self, gpu: &G) -> Result<Option<G::Buffer>> {
        if self.table.is_empty() { Ok(None) } else { gpu.upload(cast_slice(&self.table)).map(Some) }
    }

    fn params(&self, [x_batch, x_row]: [u32; 2], [d_batch, d_row]: [u32; 2]) -> CausalConvParams {
        CausalConvParams {
            batch: self.sizes.batch as u32,
            rows: self.sizes.rows as u32,
            channels: self.sizes.channels as u32,
            width: self.sizes.width as u32,
            x_batch,
            x_row,
            d_batch,
            d_row,
            chunks: self.chunks() as u32,
            packed: u32::from(!self.table.is_empty()),
        }
    }

    fn launch<G: Gpu>(
        &self,
        gpu: &G,
        (op, blocks): (KernelOp, usize),
        params: &CausalConvParams,
        buffers: Vec<Option<Slice<'_, G::Buffer>>>,
    ) -> Result<()> {
        gpu.launch(&Launch {
            kernel: self.variant.kernel(op),
            grid: grid(op.symbol(), blocks as u128)?,
            block: BLOCK_CHANNELS as u32,
            shared_bytes: 0,
            params: bytes_of(params).to_vec(),
            constants: Constants::default(),
            buffers,
        })
    }
}

/// Computes y `[B, N, C]` from x, weight and the rows before the start, which are zeros where `past` is none.
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the GPU.
pub fn forward<G: Gpu>(
    gpu: &G,
    plan: &ConvPlan,
    x: &Rows<'_, G::Buffer>,
    weight: Slice<'_, G::Buffer>,
    past: Option<Slice<'_, G::Buffer>>,
    y: Slice<'_, G::Buffer>,
) -> Result<()> {
    let table = plan.table(gpu)?;
    let params = plan.params(x.checked("x", &plan.sizes)?, [0; 2]);
    let buffers = vec![Some(x.data), Some(weight), past, table.as_ref().map(Slice::from), Some(y)];
    plan.launch(gpu, (KernelOp::CausalConvForward, plan.blocks()), &params, buffers)
}

/// Computes dx `[B, N, C]` and dweight `[C, W]` from dy.
///
/// # Errors
/// As [`forward`].
pub fn backward<G: Gpu>(
    gpu: &G,
    plan: &ConvPlan,
    x: &Rows<'_, G::Buffer>,
    weight: Slice<'_, G::Buffer>,
    past: Option<Slice<'_, G::Buffer>>,
    dy: &Rows<'_, G::Buffer>,
    [dx, dweight]: [Slice<'_, G::Buffer>; 2],
) -> Result<()> {
    let Sizes { batch, channels, width, .. } = plan.sizes;
    let table = plan.table(gpu)?;
    let params = plan.params(x.checked("x", &plan.sizes)?, dy.checked("dy", &plan.sizes)?);
    let parts = gpu.allocate(batch * plan.chunks() * width * channels * 4)?;
    let mut buffers = vec![Some(x.data), Some(weight), past, table.as_ref().map(Slice::from)];
    buffers.extend([Some(dy.data), Some(dx), Some((&parts).into())]);
    plan.launch(gpu, (KernelOp::CausalConvBackward, plan.blocks()), &params, buffers)?;
    let blocks = (channels * width).div_ceil(BLOCK_CHANNELS);
    plan.launch(
        gpu,
        (KernelOp::CausalConvWeightGradient, blocks),
        &params,
        vec![Some((&parts).into()), Some(dweight)],
    )
}
