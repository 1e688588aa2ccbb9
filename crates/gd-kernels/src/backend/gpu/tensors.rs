//! The operators over tensors of a GPU: operands in, launches of [`crate::backend::gpu`], results back into candle's graph.
//!
//! One code for every backend: [`TensorGpu`] is all that it needs besides [`Gpu`]. Nothing is copied to the
//! host, unless a scan is checked.

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};

use crate::backend::gpu::{Gpu, RowSizes, Slice, Tensor4};
use crate::backend::graph::{Finished, with_contiguous_rows};
use crate::error::{Error, Result};

/// A GPU of candle's, whose buffers are the memory of tensors or become it.
pub(crate) trait TensorGpu:
    Gpu<Buffer: From<Tensor> + Send + Sync + 'static> + Sized + Send + Sync + 'static
{
    /// The GPU behind a tensor's device.
    ///
    /// # Errors
    /// A device of another kind, or one whose limits cannot be read.
    fn of(device: &Device) -> Result<Self>;

    /// A buffer that was filled with the elements of `shape` from its start, as storage for a tensor.
    ///
    /// # Errors
    /// A buffer that is too small or not the operator's own, or a dtype that no operator returns.
    fn storage(&self, buffer: Self::Buffer, dtype: DType, shape: &Shape) -> Result<Storage>;

    /// Begins to copy a few numbers, f32, to the host. Where the device can, what is returned waits for that copy
    /// alone, not for launches that follow it.
    ///
    /// # Errors
    /// What the device reports.
    fn reading(&self, t: &Tensor) -> Result<Reading> {
        let t = t.clone();
        Ok(Box::new(move || Ok(t.flatten_all()?.to_vec1()?)))
    }

    /// The same as a result for candle's graph.
    fn finished(&self, buffer: Self::Buffer, dtype: DType, shape: impl Into<Shape>) -> Result<Finished> {
        let shape = shape.into();
        Ok(Finished::new(self.storage(buffer, dtype, &shape)?, shape))
    }

    /// The same as a tensor without a gradient.
    fn tensor(&self, buffer: Self::Buffer, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let storage = self.storage(buffer, dtype, &shape)?;
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    /// Room for the gradients of tensors, contiguous in their own dtypes.
    fn gradients<const N: usize>(&self, of: [&Tensor; N]) -> Result<[Self::Buffer; N]> {
        let mut all = Vec::with_capacity(N);
        for t in of {
            all.push(self.allocate(t.elem_count() * t.dtype().size_in_bytes())?);
        }
        all.try_into().map_err(|_| Error::Invalid("as many buffers as tensors".into()))
    }

    /// Those gradients as tensors.
    fn tensors<const N: usize>(
        &self,
        of: [&Tensor; N],
        buffers: [Self::Buffer; N],
    ) -> candle_core::Result<[Tensor; N]> {
        let mut all = Vec::with_capacity(N);
        for (t, buffer) in of.iter().zip(buffers) {
            all.push(self.tensor(buffer, t.dtype(), t.shape())?);
        }
        all.try_into().map_err(|_| candle_core::Error::Msg("as many buffers as tensors".into()))
    }
}

/// Waits for a copy to the host, and returns it.
pub(crate) type Reading = Box<dyn FnOnce() -> Result<Vec<f32>> + Send>;

/// Refuses a result of `shape` in a buffer of `bytes` bytes.
pub(crate) fn check_room(dtype: DType, shape: &Shape, bytes: usize) -> Result<()> {
    if bytes < shape.elem_count() * dtype.size_in_bytes() {
        return Err(Error::Invalid(format!("{shape:?} {dtype:?} in a buffer of {bytes} bytes")));
    }
    Ok(())
}

/// A tensor `[batch, heads, rows, dim]` as the kernels read it.
pub(crate) struct Rows<B> {
    buffer: B,
    offset: usize,
    strides: [usize; 3],
    dim: usize,
}

impl<B: From<Tensor>> Rows<B> {
    /// A tensor of rank 4; one whose last dimension is strided is copied.
    pub(crate) fn new(t: &Tensor) -> Result<Self> {
        let t = with_contiguous_rows(&t.detach())?;
        let (_, _, _, dim) = t.dims4()?;
        let [b, h, n, _] = *t.stride() else { unreachable!("of rank 4") };
        let offset = t.layout().start_offset() * t.dtype().size_in_bytes();
        Ok(Self { buffer: t.into(), offset, strides: [b, h, n], dim })
    }

    pub(crate) fn tensor4(&self) -> Tensor4<'_, B> {
        Tensor4 { data: Slice { buffer: &self.buffer, offset: self.offset }, strides: self.strides }
    }

    /// Elements of a row.
    pub(crate) fn dim(&self) -> usize {
        self.dim
    }
}

/// A contiguous tensor of any rank.
pub(crate) struct Vector<B> {
    buffer: B,
    offset: usize,
}

impl<B: From<Tensor>> Vector<B> {
    /// A tensor in `dtype`; copied where it is in another one, or not contiguous.
    pub(crate) fn new(t: &Tensor, dtype: DType) -> Result<Self> {
        let t = t.detach().to_dtype(dtype)?;
        // candle has no kernel there that copies strided i32.
        let t = match dtype == DType::I32 && !t.is_contiguous() {
            true => t.to_device(&Device::Cpu)?.contiguous()?.to_device(t.device())?,
            false => t.contiguous()?,
        };
        Ok(Self::strided(t))
    }

    /// A tensor as it lies; its strides are the caller's to know.
    pub(crate) fn strided(t: Tensor) -> Self {
        let offset = t.layout().start_offset() * t.dtype().size_in_bytes();
        Self { buffer: t.into(), offset }
    }

    /// What an operator has allocated.
    pub(crate) fn owned(buffer: B) -> Self {
        Self { buffer, offset: 0 }
    }

    pub(crate) fn slice(&self) -> Slice<'_, B> {
        Slice { buffer: &self.buffer, offset: self.offset }
    }
}

/// A tensor of any rank from 1 on, as the kernels read it.
pub(crate) fn view<B: From<Tensor>>(t: &Tensor) -> Result<(Rows<B>, RowSizes)> {
    let mut t = with_contiguous_rows(&t.detach())?;
    if t.rank() > 4 {
        t = t.flatten(0, t.rank() - 4)?;
    }
    while t.rank() < 4 {
        t = t.unsqueeze(0)?;
    }
    let (batch, heads, rows, dim) = t.dims4()?;
    Ok((Rows::new(&t)?, RowSizes { batch, heads, rows, dim, dtype: t.dtype() }))
}
