//! For tests: an emulated GPU whose tensors are those of the CPU, so that operators run the code of a CUDA or Metal build,
//! from the validation to the gradients.
//!
//! The GPU is any [`Gpu`] with its own memory, such as the emulator of `gd-testing`. Before a launch the contents of all
//! buffers are copied there, and afterwards they are copied back. This detects every access outside of the memory of a
//! tensor, and elements that a kernel does not write stay NaN.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, Tensor};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::backend::gpu::tensors::{TensorGpu, check_capacity};
use crate::backend::gpu::{Arch, Gpu, Launch, Slice, TensorMap};
use crate::error::{Error, Result};

thread_local! {
    static CURRENT: RefCell<Option<Emulated>> = const { RefCell::new(None) };
}

/// Calls `run` while `gpu` takes the place of the CPU on this thread: operators plan and launch as on that GPU, and
/// tensors on the CPU are its memory. Backward passes that `run` calls do the same.
pub fn emulate<G, R>(gpu: &Arc<G>, run: impl FnOnce() -> R) -> R
where
    G: Gpu + Send + Sync + 'static,
{
    /// Restores the previous GPU, also if `run` panics.
    struct Restore(Option<Emulated>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let any_gpu: Arc<dyn AnyGpu> = gpu.clone();
    let _restore = Restore(CURRENT.replace(Some(Emulated(any_gpu))));
    run()
}

/// The architecture of the emulated GPU of this thread, if there is one.
pub(crate) fn current() -> Option<Arch> {
    CURRENT.with_borrow(|current| current.as_ref().map(Gpu::arch))
}

/// A GPU without its type of buffers.
trait AnyGpu: Send + Sync {
    fn arch(&self) -> Arch;

    /// Runs a kernel over copies of `memory`, and copies them back. `places` are the indices in `memory` of the buffers of
    /// the launch, followed by that of the map.
    fn run(
        &self,
        map: Option<&TensorMap<'_, Buffer>>,
        launch: &Launch<'_, Buffer>,
        places: &[Option<usize>],
        memory: &mut [Vec<u8>],
    ) -> Result<()>;
}

impl<G: Gpu + Send + Sync> AnyGpu for G {
    fn arch(&self) -> Arch {
        Gpu::arch(self)
    }

    fn run(
        &self,
        map: Option<&TensorMap<'_, Buffer>>,
        launch: &Launch<'_, Buffer>,
        places: &[Option<usize>],
        memory: &mut [Vec<u8>],
    ) -> Result<()> {
        let copies = memory.iter().map(|bytes| self.upload(bytes)).collect::<Result<Vec<_>>>()?;
        let at =
            |slice: &Slice<'_, Buffer>, place: usize| Slice { buffer: &copies[place], offset: slice.offset };
        let buffers = launch.buffers.iter().zip(places);
        let on_gpu = Launch {
            kernel: launch.kernel,
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            params: launch.params.clone(),
            constants: launch.constants,
            buffers: buffers.map(|(slice, place)| Some(at(slice.as_ref()?, (*place)?))).collect(),
        };
        match (map, places.last()) {
            (Some(map), Some(Some(place))) => {
                let TensorMap { data, dtype, dims, strides, box_rows } = map;
                let data = at(data, *place);
                let map =
                    TensorMap { data, dtype: *dtype, dims: *dims, strides: *strides, box_rows: *box_rows };
                self.launch_mapped(&map, &on_gpu)?;
            }
            _ => self.launch(&on_gpu)?,
        }
        for (bytes, buffer) in memory.iter_mut().zip(&copies) {
            *bytes = self.download(buffer.into(), bytes.len())?;
        }
        Ok(())
    }
}

/// The GPU that is used in place of the CPU.
#[derive(Clone)]
pub(crate) struct Emulated(Arc<dyn AnyGpu>);

/// Memory of the emulated GPU.
#[derive(Debug)]
pub(crate) enum Buffer {
    /// What an operator allocated.
    Owned(Mutex<Vec<u8>>),
    /// The whole storage of a tensor, independent of the tensor's offset.
    Tensor(Tensor),
}

impl From<Tensor> for Buffer {
    fn from(t: Tensor) -> Self {
        Self::Tensor(t)
    }
}

impl Buffer {
    fn owned(bytes: Vec<u8>) -> Self {
        Self::Owned(Mutex::new(bytes))
    }

    /// The address of the memory, which buffers that share it have in common.
    fn address(&self) -> usize {
        match self {
            Self::Owned(bytes) => std::ptr::from_ref(bytes).addr(),
            Self::Tensor(t) => std::ptr::from_ref(&*t.storage_and_layout().0).addr(),
        }
    }

    fn read(&self) -> Result<Vec<u8>> {
        let t = match self {
            Self::Owned(bytes) => return Ok(bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            Self::Tensor(t) => t,
        };
        match &*t.storage_and_layout().0 {
            Storage::Cpu(storage) => Ok(bytes(storage)?.to_vec()),
            other => Err(Error::Invalid(format!(
                "a tensor on {:?} among those of the CPU",
                other.device().location()
            ))),
        }
    }

    fn write(&self, new: Vec<u8>) -> Result<()> {
        match self {
            Self::Owned(bytes) => *bytes.lock().unwrap_or_else(PoisonError::into_inner) = new,
            Self::Tensor(t) => t.inplace_op1(&Overwrite(new))?,
        }
        Ok(())
    }
}

/// The whole memory behind a tensor.
struct Overwrite(Vec<u8>);

impl InplaceOp1 for Overwrite {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        let new = &self.0[..];
        match storage {
            CpuStorage::U8(x) => x.copy_from_slice(new),
            CpuStorage::U32(x) => cast_slice_mut(x).copy_from_slice(new),
            CpuStorage::I32(x) => cast_slice_mut(x).copy_from_slice(new),
            CpuStorage::F32(x) => cast_slice_mut(x).copy_from_slice(new),
            CpuStorage::F16(x) => cast_slice_mut(x.reinterpret_cast_mut()).copy_from_slice(new),
            CpuStorage::BF16(x) => cast_slice_mut(x.reinterpret_cast_mut()).copy_from_slice(new),
            _ => return Err(unsupported().into()),
        }
        Ok(())
    }
}

fn bytes(storage: &CpuStorage) -> Result<&[u8]> {
    match storage {
        CpuStorage::U8(x) => Ok(x),
        CpuStorage::U32(x) => Ok(cast_slice(x)),
        CpuStorage::I32(x) => Ok(cast_slice(x)),
        CpuStorage::F32(x) => Ok(cast_slice(x)),
        CpuStorage::F16(x) => Ok(cast_slice(x.reinterpret_cast())),
        CpuStorage::BF16(x) => Ok(cast_slice(x.reinterpret_cast())),
        _ => Err(unsupported()),
    }
}

fn unsupported() -> Error {
    Error::Unsupported("a tensor of another dtype than f32, f16, bf16, i32, u32 and u8 on a GPU".into())
}

impl Gpu for Emulated {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.0.arch()
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::owned(vec![0xff; bytes]))
    }

    fn zeros(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::owned(vec![0; bytes]))
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        Ok(Buffer::owned(bytes.to_vec()))
    }

    fn download(&self, from: Slice<'_, Buffer>, bytes: usize) -> Result<Vec<u8>> {
        if let Buffer::Tensor(_) = from.buffer {
            return Err(Error::Invalid(
                "only buffers that an operator allocated are copied to the host".into(),
            ));
        }
        let all = from.buffer.read()?;
        match all.get(from.offset..from.offset + bytes) {
            Some(part) => Ok(part.to_vec()),
            None => Err(Error::Invalid(format!("{bytes} bytes from {} of {}", from.offset, all.len()))),
        }
    }

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(None, launch)
    }

    fn launch_mapped(&self, map: &TensorMap<'_, Buffer>, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(Some(map), launch)
    }
}

impl Emulated {
    fn start(&self, map: Option<&TensorMap<'_, Buffer>>, launch: &Launch<'_, Buffer>) -> Result<()> {
        let slices = launch.buffers.iter().map(Option::as_ref).chain(map.map(|map| Some(&map.data)));
        // Memory that several buffers share is copied once.
        let (mut distinct, mut places) = (Vec::<(usize, &Buffer)>::new(), Vec::new());
        for slice in slices {
            places.push(slice.map(|slice| {
                let address = slice.buffer.address();
                let index = distinct.iter().position(|(at, _)| *at == address);
                index.unwrap_or_else(|| {
                    distinct.push((address, slice.buffer));
                    distinct.len() - 1
                })
            }));
        }
        let before = distinct.iter().map(|(_, buffer)| buffer.read()).collect::<Result<Vec<_>>>()?;
        let mut memory = before.clone();
        self.0.run(map, launch, &places, &mut memory)?;
        for (((_, buffer), before), after) in distinct.iter().zip(before).zip(memory) {
            if after != before {
                buffer.write(after)?;
            }
        }
        Ok(())
    }
}

impl TensorGpu for Emulated {
    fn of(_: &Device) -> Result<Self> {
        CURRENT.with_borrow(|current| {
            current.clone().ok_or_else(|| Error::Device("no emulated GPU is active on this thread".into()))
        })
    }

    fn storage(&self, buffer: Buffer, dtype: DType, shape: &Shape) -> Result<Storage> {
        let Buffer::Owned(bytes) = buffer else {
            return Err(Error::Invalid("the buffer of a tensor cannot become another tensor".into()));
        };
        let bytes = bytes.into_inner().unwrap_or_else(PoisonError::into_inner);
        check_capacity(dtype, shape, bytes.len())?;
        fn typed<T: Pod>(bytes: &[u8]) -> Vec<T> {
            let mut all = vec![T::zeroed(); bytes.len() / size_of::<T>()];
            cast_slice_mut(&mut all).copy_from_slice(bytes);
            all
        }
        let bytes = &bytes[..shape.elem_count() * dtype.size_in_bytes()];
        Ok(Storage::Cpu(match dtype {
            DType::U8 => CpuStorage::U8(bytes.to_vec()),
            DType::U32 => CpuStorage::U32(typed(bytes)),
            DType::I32 => CpuStorage::I32(typed(bytes)),
            DType::F32 => CpuStorage::F32(typed(bytes)),
            DType::F16 => CpuStorage::F16(typed::<u16>(bytes).reinterpret_cast().to_vec()),
            DType::BF16 => CpuStorage::BF16(typed::<u16>(bytes).reinterpret_cast().to_vec()),
            other => return Err(Error::Unsupported(format!("a result in {other:?} on a GPU"))),
        }))
    }
}
