//! Operators on tensors of a GPU: the buffers of their operands, and results as tensors or as nodes of candle's graph.
//!
//! The code is the same for every kind of GPU: it needs [`TensorGpu`] besides [`Gpu`]. Nothing is copied to the host,
//! except by a scan in checked mode.

use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Shape, Storage, Tensor};

use crate::backend::gpu::{Gpu, RowSizes, Slice, Tensor4};
use crate::backend::graph::{Finished, with_contiguous_rows};
use crate::error::{Error, Result};

/// A GPU of candle: the memory of tensors can be used as its buffers, and its buffers can become tensors.
pub(crate) trait TensorGpu:
    Gpu<Buffer: From<Tensor> + Send + Sync + 'static> + Sized + Send + Sync + 'static
{
    /// The GPU behind a tensor's device.
    ///
    /// # Errors
    /// A device of another kind, or one whose limits cannot be read.
    fn of(device: &Device) -> Result<Self>;

    /// Turns a buffer with the elements of `shape` at its start into the storage of a tensor.
    ///
    /// # Errors
    /// A buffer that is too small or that belongs to a tensor, or a dtype that no operator returns.
    fn storage(&self, buffer: Self::Buffer, dtype: DType, shape: &Shape) -> Result<Storage>;

    /// Starts to copy an f32 tensor to the host. Where the device supports it, calling the result waits for this copy
    /// only and not for later launches.
    ///
    /// # Errors
    /// Errors of the device.
    fn start_download(&self, t: &Tensor) -> Result<PendingDownload> {
        let t = t.clone();
        Ok(Box::new(move || Ok(t.flatten_all()?.to_vec1()?)))
    }

    /// Turns a buffer into a result for candle's graph.
    fn finished(&self, buffer: Self::Buffer, dtype: DType, shape: impl Into<Shape>) -> Result<Finished> {
        let shape = shape.into();
        Ok(Finished::new(self.storage(buffer, dtype, &shape)?, shape))
    }

    /// Turns a buffer into a tensor without a gradient.
    fn tensor(&self, buffer: Self::Buffer, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let storage = self.storage(buffer, dtype, &shape)?;
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    /// Allocates contiguous buffers for the gradients of tensors, in their dtypes.
    fn gradients<const N: usize>(&self, of: [&Tensor; N]) -> Result<[Self::Buffer; N]> {
        let mut all = Vec::with_capacity(N);
        for t in of {
            all.push(self.allocate(t.elem_count() * t.dtype().size_in_bytes())?);
        }
        all.try_into().map_err(|_| Error::Invalid("as many buffers as tensors".into()))
    }

    /// Turns those buffers into tensors.
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
pub(crate) type PendingDownload = Box<dyn FnOnce() -> Result<Vec<f32>> + Send>;

/// Checks that a result of `shape` fits a buffer of `bytes` bytes.
pub(crate) fn check_capacity(dtype: DType, shape: &Shape, bytes: usize) -> Result<()> {
    if bytes < shape.elem_count() * dtype.size_in_bytes() {
        return Err(Error::Invalid(format!("{shape:?} {dtype:?} in a buffer of {bytes} bytes")));
    }
    Ok(())
}

/// A tensor `[batch, heads, rows, dim]` as kernels read it.
pub(crate) struct Rows<B> {
    buffer: B,
    offset: usize,
    strides: [usize; 3],
    dim: usize,
}

impl<B: From<Tensor>> Rows<B> {
    /// The buffer of a tensor of rank 4, which is copied if its last dimension is strided.
    pub(crate) fn new(t: &Tensor) -> Result<Self> {
        let t = with_contiguous_rows(&t.detach())?;
        let (_, _, _, dim) = t.dims4()?;
        let [b, h, n, _] = *t.stride() else { unreachable!("of rank 4") };
        let offset = t.layout().start_offset() * t.dtype().size_in_bytes();
        Ok(Self { buffer: t.into(), offset, strides: [b, h, n], dim })
    }

    /// The buffer of a tensor `[B, H, N, D]` as one of `[1, B H, N, D]`, copied if its heads are not at equal distances.
    pub(crate) fn with_heads_of_all_entries(t: &Tensor) -> Result<Self> {
        let heads = t.dims4()?.1;
        let rows = Self::new(t)?;
        if t.dim(0)? == 1 || rows.strides[0] == heads * rows.strides[1] {
            return Ok(rows);
        }
        Self::new(&t.detach().contiguous()?)
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
    /// The buffer of a tensor in `dtype`, which is copied if it is of another dtype or not contiguous.
    pub(crate) fn new(t: &Tensor, dtype: DType) -> Result<Self> {
        let t = t.detach().to_dtype(dtype)?;
        // candle has no GPU kernel that copies strided i32.
        let t = match dtype == DType::I32 && !t.is_contiguous() {
            true => t.to_device(&Device::Cpu)?.contiguous()?.to_device(t.device())?,
            false => t.contiguous()?,
        };
        Ok(Self::strided(t))
    }

    /// The buffer of a tensor with any strides, which the caller must know.
    pub(crate) fn strided(t: Tensor) -> Self {
        let offset = t.layout().start_offset() * t.dtype().size_in_bytes();
        Self { buffer: t.into(), offset }
    }

    /// A buffer that the operator allocated.
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
