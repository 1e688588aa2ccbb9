//! The causal convolution of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{TensorGpu, Vector};
use crate::backend::graph::{attach2, with_contiguous_rows};
use crate::error::Result;
use crate::ops::causal_conv::gpu::launch::{ConvPlan, Rows, Sizes, backward, forward};

/// A tensor `[B, N, C]` with contiguous channels, and the strides of batch and rows in elements.
struct StridedRows<B> {
    rows: Vector<B>,
    strides: [usize; 2],
}

impl<B: From<Tensor>> StridedRows<B> {
    fn new(t: &Tensor) -> candle_core::Result<Self> {
        let t = with_contiguous_rows(&t.detach())?;
        let [batch, row, _] = *t.stride() else { candle_core::bail!("{:?} is not [B, N, C]", t.dims()) };
        Ok(Self { rows: Vector::strided(t), strides: [batch, row] })
    }

    fn rows(&self) -> Rows<'_, B> {
        Rows { data: self.rows.slice(), strides: self.strides }
    }
}

/// y from x `[B, N, C]`, weight `[C, W]` and the rows before the start `[B, W - 1, C]`; validated.
pub(crate) fn convolve<G: TensorGpu>(
    x: &Tensor,
    weight: &Tensor,
    past: &Tensor,
    boundaries: Option<&[Vec<usize>]>,
) -> Result<Tensor> {
    let ((batch, rows, channels), width) = (x.dims3()?, weight.dim(1)?);
    let device = G::of(x.device())?;
    let dtype: DType = x.dtype();
    let sizes = Sizes { batch, rows, channels, width, dtype };
    let plan = ConvPlan::new(&sizes, boundaries, &device.arch())?;
    let past = Vector::<G::Buffer>::new(past, dtype)?;
    let out = device.allocate(x.elem_count() * dtype.size_in_bytes())?;
    let (x_rows, weight_values) = (StridedRows::new(x)?, Vector::new(weight, dtype)?);
    forward(&device, &plan, &x_rows.rows(), weight_values.slice(), Some(past.slice()), (&out).into())?;
    let result = device.finished(out, dtype, x.shape())?;
    Ok(attach2("causal_conv", x, weight, result, move |x, weight, dy| {
        let (x_rows, dy) = (StridedRows::new(x)?, StridedRows::new(dy)?);
        let weight_values = Vector::new(weight, dtype)?;
        let [dx, dw] = device.gradients([x, weight])?;
        let (past, out) = (Some(past.slice()), [(&dx).into(), (&dw).into()]);
        backward(&device, &plan, &x_rows.rows(), weight_values.slice(), past, &dy.rows(), out)?;
        device.tensors([x, weight], [dx, dw])
    })?)
}
