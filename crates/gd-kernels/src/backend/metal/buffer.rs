//! Memory of an Apple GPU: a tensor that candle owns, or an allocation that becomes one.

use std::sync::Arc;

use candle_core::{DType, MetalDevice, MetalStorage, Shape, Storage, Tensor};
use candle_metal_kernels::metal;

use crate::backend::gpu::Slice;
use crate::backend::gpu::tensors::check_capacity;
use crate::error::{Error, Result};

/// Memory of an Apple GPU.
#[derive(Debug)]
pub enum Buffer {
    /// What an operator allocated, from candle's pool: reused in the order of the launches once it has no owner.
    Owned(Arc<metal::Buffer>),
    /// The whole storage of a tensor, independent of the tensor's offset.
    Tensor(Tensor),
}

impl From<Tensor> for Buffer {
    fn from(t: Tensor) -> Self {
        Self::Tensor(t)
    }
}

impl Buffer {
    /// Metal's own buffer.
    fn raw(&self) -> Result<metal::Buffer> {
        match self {
            Self::Owned(buffer) => Ok(metal::Buffer::clone(buffer)),
            Self::Tensor(t) => match &*t.storage_and_layout().0 {
                Storage::Metal(storage) => Ok(storage.buffer().clone()),
                other => Err(Error::Invalid(format!(
                    "a tensor on {:?} among those of a Metal device",
                    other.device().location()
                ))),
            },
        }
    }

    /// Metal's buffer of a slice, with `bytes` bytes from the slice's start on.
    pub(super) fn place(slice: &Slice<'_, Self>, bytes: usize) -> Result<(metal::Buffer, usize)> {
        let raw = slice.buffer.raw()?;
        match slice.offset.checked_add(bytes) {
            Some(end) if end <= raw.length() => Ok((raw, slice.offset)),
            _ => Err(Error::Invalid(format!(
                "{bytes} bytes from {} on, of a buffer of {}",
                slice.offset,
                raw.length()
            ))),
        }
    }

    /// The buffer, which holds the elements of `shape` from its start, as storage for a tensor.
    pub(super) fn into_storage(self, device: &MetalDevice, dtype: DType, shape: &Shape) -> Result<Storage> {
        let Self::Owned(buffer) = self else {
            return Err(Error::Invalid("the buffer of a tensor cannot become another tensor".into()));
        };
        check_capacity(dtype, shape, buffer.length())?;
        Ok(Storage::Metal(MetalStorage::new(buffer, device.clone(), shape.elem_count(), dtype)))
    }
}
