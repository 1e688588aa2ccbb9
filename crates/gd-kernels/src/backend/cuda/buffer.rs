//! Memory of a CUDA device: a tensor that candle owns, or an allocation that becomes one.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop, sys,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, DType, Shape, Storage, StorageRef, Tensor};
use half::{bf16, f16};

use crate::backend::cuda::failed;
use crate::backend::gpu::tensors::check_capacity;
use crate::error::{Error, Result};

/// Memory of a CUDA device.
#[derive(Debug)]
pub enum Buffer {
    /// What an operator allocated.
    Owned(CudaSlice<u8>),
    /// The whole storage of a tensor, independent of the tensor's offset.
    Tensor(Tensor),
}

/// A buffer whose memory is neither moved nor freed while this value lives.
pub(super) enum Locked<'a> {
    Owned(&'a CudaSlice<u8>),
    Tensor(StorageRef<'a>),
}

impl From<Tensor> for Buffer {
    fn from(t: Tensor) -> Self {
        Self::Tensor(t)
    }
}

impl Buffer {
    pub(super) fn lock(&self) -> Locked<'_> {
        match self {
            Self::Owned(slice) => Locked::Owned(slice),
            Self::Tensor(t) => Locked::Tensor(t.storage_and_layout().0),
        }
    }

    pub(super) fn download(&self, stream: &Arc<CudaStream>, offset: usize, bytes: usize) -> Result<Vec<u8>> {
        let Self::Owned(slice) = self else {
            return Err(Error::Invalid(
                "only buffers that an operator allocated are copied to the host".into(),
            ));
        };
        let part = offset.checked_add(bytes).and_then(|end| slice.try_slice(offset..end));
        let part = part.ok_or_else(|| {
            Error::Invalid(format!(
                "a copy of {bytes} bytes from {offset} on, of a buffer of {}",
                slice.len()
            ))
        })?;
        stream.clone_dtoh(&part).map_err(|e| failed(format!("a copy of {bytes} bytes to the host"), e))
    }

    /// The buffer, which holds the elements of `shape` from its start, as storage for a tensor.
    pub(crate) fn into_storage(self, device: &CudaDevice, dtype: DType, shape: &Shape) -> Result<Storage> {
        let Self::Owned(slice) = self else {
            return Err(Error::Invalid("the buffer of a tensor cannot become another tensor".into()));
        };
        check_capacity(dtype, shape, slice.len())?;
        let n = shape.elem_count();
        let storage = match dtype {
            DType::U8 => typed::<u8>(slice, n, device),
            DType::U32 => typed::<u32>(slice, n, device),
            DType::I32 => typed::<i32>(slice, n, device),
            DType::F32 => typed::<f32>(slice, n, device),
            DType::F16 => typed::<f16>(slice, n, device),
            DType::BF16 => typed::<bf16>(slice, n, device),
            other => return Err(Error::Unsupported(format!("a result in {other:?} on a GPU"))),
        };
        Ok(Storage::Cuda(storage))
    }
}

/// The same memory, `n` elements of another type.
#[allow(unsafe_code)] // the memory goes from one owner to the other
fn typed<T: CudaDType + DeviceRepr>(slice: CudaSlice<u8>, n: usize, device: &CudaDevice) -> CudaStorage {
    let stream = slice.stream().clone();
    // SAFETY: the memory is large enough, aligned as every allocation is, and owned by nobody else from here
    // on; every bit pattern is a value of the types above.
    let mut slice: CudaSlice<T> = unsafe { stream.upgrade_device_ptr(slice.leak(), n) };
    // Other streams wait for what was written so far.
    drop(slice.device_ptr_mut(&stream));
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

impl Locked<'_> {
    /// Address and size in bytes, for work on `stream`; the third orders it with other streams when dropped.
    pub(super) fn pointer<'a>(
        &'a self,
        stream: &'a CudaStream,
    ) -> Result<(sys::CUdeviceptr, usize, SyncOnDrop<'a>)> {
        fn of<'a, T>(slice: &'a CudaSlice<T>, stream: &'a CudaStream) -> (u64, usize, SyncOnDrop<'a>) {
            let (pointer, record) = slice.device_ptr(stream);
            (pointer, slice.num_bytes(), record)
        }
        match self {
            Self::Owned(slice) => Ok(of(slice, stream)),
            Self::Tensor(storage) => match &**storage {
                Storage::Cuda(CudaStorage { slice, .. }) => match slice {
                    CudaStorageSlice::U8(s) => Ok(of(s, stream)),
                    CudaStorageSlice::U32(s) => Ok(of(s, stream)),
                    CudaStorageSlice::I32(s) => Ok(of(s, stream)),
                    CudaStorageSlice::F32(s) => Ok(of(s, stream)),
                    CudaStorageSlice::F16(s) => Ok(of(s, stream)),
                    CudaStorageSlice::BF16(s) => Ok(of(s, stream)),
                    _ => Err(Error::Unsupported(
                        "a tensor of another dtype than f32, f16, bf16, i32, u32 and u8 on a GPU".into(),
                    )),
                },
                other => Err(Error::Invalid(format!(
                    "a tensor on {:?} among those of a CUDA device",
                    other.device().location()
                ))),
            },
        }
    }
}
