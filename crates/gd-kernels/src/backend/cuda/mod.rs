//! NVIDIA GPUs: the launches of [`crate::backend::gpu`] through cudarc, on the stream of candle's device.
//!
//! Everything is enqueued in the order of the calls, like candle's own kernels; only downloads wait for the device.

mod buffer;
mod modules;
mod tensor_map;

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute as Attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use candle_core::{CudaDevice, DType, Device, Shape, Storage, Tensor};

pub use self::buffer::Buffer;
pub use self::modules::kernel_hash;
use self::modules::{Function, Loaded};
use crate::backend::gpu::tensors::{PendingDownload, TensorGpu};
use crate::backend::gpu::{Arch, Gpu, Launch, Slice, TensorMap};
use crate::error::{Error, Result};

/// Dynamic shared memory of a kernel that does not need a raised limit.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A CUDA device of candle's, for launches.
pub struct Cuda {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    loaded: Arc<Loaded>,
}

impl Cuda {
    /// The GPU behind a tensor's device.
    ///
    /// # Errors
    /// A device that is not a CUDA device, or one whose limits cannot be read.
    pub fn new(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let stream = device.cuda_stream();
        let loaded = Loaded::of(stream.context())?;
        Ok(Self { device, stream, loaded })
    }
}

/// Opens GPU `number` for a program that creates no CUDA streams itself: tensors have no events that would order them
/// between streams, and freed memory stays in the pool of the program.
///
/// # Errors
/// No driver, no GPU, or none of this number.
#[allow(unsafe_code)] // turns the events off
pub fn open(number: usize) -> Result<Device> {
    let devices = count()?;
    if number >= devices {
        return Err(Error::Device(format!("this machine has {devices} CUDA devices, numbered from 0")));
    }
    let device = Device::new_cuda(number)?;
    // SAFETY: candle's device has one stream, and all work here is enqueued there.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    keep_memory(device.as_cuda_device()?.cuda_stream().context())
        .map_err(|e| failed("the memory pool of the device", e))?;
    Ok(device)
}

/// Keeps freed memory in the pool of this program. By default the driver releases the free memory whenever the host
/// synchronises with the device, and the next training step would allocate it again.
#[allow(unsafe_code)] // calls of the driver
fn keep_memory(context: &CudaContext) -> std::result::Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut all = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device exists, and the attribute is a number of 64 bits.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut all).cast())
    }
}

/// The number of GPUs of this machine, at least 1.
///
/// # Errors
/// No driver or no GPU.
pub fn count() -> Result<usize> {
    use sys::cudaError_enum::{CUDA_ERROR_NO_DEVICE, CUDA_ERROR_STUB_LIBRARY};
    let number = result::init().and_then(|()| CudaContext::device_count());
    match number {
        Ok(n) if n > 0 => Ok(n.unsigned_abs() as usize),
        Ok(_) | Err(DriverError(CUDA_ERROR_NO_DEVICE)) => {
            Err(Error::Device("this machine has no NVIDIA GPU that its driver detects".into()))
        }
        Err(DriverError(CUDA_ERROR_STUB_LIBRARY)) => Err(Error::Device(
            "this machine has no NVIDIA driver: libcuda.so.1 is the stub for linking".into(),
        )),
        Err(e) => Err(failed("the CUDA driver does not start", e)),
    }
}

/// The properties of a GPU.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Compute capability, such as 9.0.
    pub compute_capability: (i32, i32),
    /// Memory, in bytes.
    pub memory: usize,
    /// Free memory, in bytes.
    pub free: usize,
}

/// The properties of the GPU behind a device.
///
/// # Errors
/// A device that is not a CUDA device, or one that does not answer.
pub fn describe(device: &Device) -> Result<Description> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    let read = || -> std::result::Result<_, DriverError> {
        let (free, memory) = context.mem_get_info()?;
        let compute_capability = context.compute_capability()?;
        Ok(Description { name: context.name()?, compute_capability, memory, free })
    };
    read().map_err(|e| failed("the device does not answer", e))
}

/// A driver error with the action that failed.
fn failed(what: impl std::fmt::Display, e: DriverError) -> Error {
    Error::Device(format!("{what}: {e}"))
}

/// The limits of a context's device.
fn limits(context: &CudaContext) -> std::result::Result<Arch, DriverError> {
    let (major, minor) = context.compute_capability()?;
    let attribute = |a| context.attribute(a).map(i32::cast_unsigned);
    Ok(Arch {
        compute: (10 * major + minor).cast_unsigned(),
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        processors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    })
}

impl Gpu for Cuda {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.loaded.arch()
    }

    #[allow(unsafe_code)] // undefined contents are what the caller asks for
    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        // Kernels may take empty buffers, but the driver does not allocate 0 bytes.
        let slice = unsafe { self.stream.alloc::<u8>(bytes.max(1)) };
        slice.map(Buffer::Owned).map_err(|e| self.out_of_memory(bytes, e))
    }

    fn zeros(&self, bytes: usize) -> Result<Buffer> {
        let slice = self.stream.alloc_zeros::<u8>(bytes.max(1));
        slice.map(Buffer::Owned).map_err(|e| self.out_of_memory(bytes, e))
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let bytes = if bytes.is_empty() { &[0] } else { bytes };
        let slice = self.stream.clone_htod(bytes);
        slice.map(Buffer::Owned).map_err(|e| self.out_of_memory(bytes.len(), e))
    }

    fn download(&self, from: Slice<'_, Buffer>, bytes: usize) -> Result<Vec<u8>> {
        from.buffer.download(&self.stream, from.offset, bytes)
    }

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(None, launch)
    }

    fn launch_mapped(&self, map: &TensorMap<'_, Buffer>, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.start(Some(map), launch)
    }
}

impl TensorGpu for Cuda {
    fn of(device: &Device) -> Result<Self> {
        Self::new(device)
    }

    fn storage(&self, buffer: Buffer, dtype: DType, shape: &Shape) -> Result<Storage> {
        buffer.into_storage(&self.device, dtype, shape)
    }

    fn start_download(&self, t: &Tensor) -> Result<PendingDownload> {
        let what = || format!("a copy of {} numbers to the host", t.elem_count());
        if !t.is_contiguous() {
            return Err(Error::Invalid(format!("{}: the tensor is strided", what())));
        }
        let (storage, layout) = t.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else {
            return Err(Error::Invalid(format!("{}: a tensor on {:?}", what(), t.device().location())));
        };
        let (first, count) = (layout.start_offset(), t.elem_count());
        let from = storage.as_cuda_slice::<f32>()?.slice(first..first + count);
        let mut host = self.loaded.pinned(count).map_err(|e| failed(what(), e))?;
        // The slice records an event after the copy; reading the slice waits for that event.
        self.stream.memcpy_dtoh(&from, &mut host).map_err(|e| failed(what(), e))?;
        let loaded = self.loaded.clone();
        Ok(Box::new(move || {
            let numbers = host.as_slice().map(<[f32]>::to_vec);
            let numbers = numbers.map_err(|e| failed(format!("a copy of {count} numbers to the host"), e))?;
            loaded.reuse(host);
            Ok(numbers)
        }))
    }
}

impl Cuda {
    fn start(&self, map: Option<&TensorMap<'_, Buffer>>, launch: &Launch<'_, Buffer>) -> Result<()> {
        let refused = |e| failed(format!("CUDA refused the launch of {launch}"), e);
        let kernel = self.loaded.kernel(launch.kernel)?;
        if launch.shared_bytes > DEFAULT_SHARED_BYTES {
            kernel.allow_shared(launch.shared_bytes).map_err(refused)?;
        }
        // Every buffer stays locked until the launch is enqueued; memory is freed in the order of the stream.
        let slices = || launch.buffers.iter().map(Option::as_ref).chain([map.map(|map| &map.data)]);
        let places: Vec<_> = slices().map(|slice| slice.map(|s| s.buffer.lock())).collect();
        let mut pointers = Vec::with_capacity(places.len());
        let mut recorded = Vec::with_capacity(places.len());
        for (place, slice) in places.iter().zip(slices()) {
            let mut pointer = 0;
            if let (Some(place), Some(slice)) = (place, slice) {
                let (start, bytes, record) = place.pointer(&self.stream)?;
                if slice.offset > bytes {
                    return Err(Error::Invalid(format!(
                        "{}: a pointer {} bytes into a buffer of {bytes}",
                        launch.kernel, slice.offset
                    )));
                }
                pointer = start + slice.offset as u64;
                recorded.push(record);
            }
            pointers.push(pointer);
        }
        // The last is that of the mapped tensor.
        let first = pointers.pop().unwrap_or_default();
        let map = map.map(|map| tensor_map::encode(map, first)).transpose()?;
        self.enqueue(&kernel, launch, map, &mut pointers).map_err(refused)
    }

    #[allow(unsafe_code)] // the arguments are those that the launch code and the kernel agree on
    fn enqueue(
        &self,
        kernel: &Function,
        launch: &Launch<'_, Buffer>,
        mut map: Option<sys::CUtensorMap>,
        pointers: &mut [sys::CUdeviceptr],
    ) -> std::result::Result<(), DriverError> {
        self.stream.context().bind_to_thread()?;
        let params = launch.params.as_ptr().cast_mut().cast::<c_void>();
        let mut arguments = vec![params];
        arguments.extend(map.as_mut().map(|map| std::ptr::from_mut(map).cast::<c_void>()));
        arguments.extend(pointers.iter_mut().map(|p| std::ptr::from_mut(p).cast::<c_void>()));
        let [x, y, z] = launch.grid;
        // SAFETY: the driver copies the arguments, which outlive the call: the params struct, the map of
        // a kernel that has one, and then one pointer for each buffer, all of them to memory of this context.
        unsafe {
            result::launch_kernel(
                kernel.function(),
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared_bytes,
                self.stream.cu_stream(),
                &mut arguments,
            )
        }
    }

    fn out_of_memory(&self, bytes: usize, e: DriverError) -> Error {
        let mib = |n: usize| n as f64 / (1 << 20) as f64;
        let left = match self.stream.context().mem_get_info() {
            Ok((free, total)) => format!(", of {:.0} MiB {:.0} are free", mib(total), mib(free)),
            Err(_) => String::new(),
        };
        failed(format!("{:.1} MiB of GPU memory{left}", mib(bytes)), e)
    }
}
