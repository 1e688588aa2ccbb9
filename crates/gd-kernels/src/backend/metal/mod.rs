//! Apple GPUs: the launches of [`crate::backend::gpu`] through candle's Metal device and its command buffers.
//!
//! This code is type-checked for macOS (`scripts/ci/lint_metal.sh`), but it has not run on an Apple GPU.
//!
//! Everything is enqueued in the order of the calls, like candle's own kernels. Only downloads wait for the device, and
//! allocations when the memory is used up.

mod buffer;
mod pipelines;

use std::sync::Arc;

use candle_core::{DType, Device, MetalDevice, Shape, Storage};
use candle_metal_kernels::metal::{self, MetalDeviceType};
use objc2_metal::{MTLComputePipelineState, MTLDevice, MTLGPUFamily, MTLSize};

pub use self::buffer::Buffer;
use self::pipelines::Loaded;
pub use self::pipelines::kernel_hash;
use crate::backend::gpu::tensors::TensorGpu;
use crate::backend::gpu::{Arch, Gpu, Launch, Slice};
use crate::error::{Error, Result};

/// Threads of a simdgroup, as the kernels assume.
const SIMDGROUP: usize = 32;
/// Lengths and offsets of buffers are multiples of this many bytes.
const ALIGNMENT_BYTES: usize = 16;

/// A Metal device of candle's, for launches.
pub struct Metal {
    device: MetalDevice,
    loaded: Arc<Loaded>,
    arch: Arch,
}

impl Metal {
    /// The GPU behind a tensor's device.
    ///
    /// # Errors
    /// A device that is not a Metal device, or a GPU older than Apple's M1 and A14, without matrix instructions for
    /// simdgroups.
    pub fn new(device: &Device) -> Result<Self> {
        let device = device.as_metal_device()?.clone();
        let metal = device.metal_device();
        if !metal.as_ref().supportsFamily(MTLGPUFamily::Apple7) {
            return Err(Error::Device(format!(
                "the GPU {} is not of Apple's family 7 (M1, A14) or later",
                metal.as_ref().name()
            )));
        }
        let arch = Arch {
            compute: Arch::METAL,
            shared_bytes: metal.as_ref().maxThreadgroupMemoryLength() as u32,
            processors: cores(metal.device_type()),
        };
        let loaded = Loaded::of(metal);
        Ok(Self { device, loaded, arch })
    }

    /// Allocates memory with `make`, a function of candle that takes the number of bytes.
    fn allocate_with(
        &self,
        bytes: usize,
        make: impl FnOnce(usize) -> candle_core::Result<Arc<metal::Buffer>>,
    ) -> Result<Buffer> {
        // Kernels may take empty buffers, but Metal does not allocate 0 bytes.
        let bytes = bytes.max(1).next_multiple_of(ALIGNMENT_BYTES);
        let metal = self.device.metal_device();
        let longest = metal.as_ref().maxBufferLength();
        if bytes > longest {
            return Err(Error::Device(format!(
                "{:.1} MiB of GPU memory in one buffer; at most {:.0} MiB are supported",
                mib(bytes),
                mib(longest)
            )));
        }
        // candle releases freed buffers when the host synchronises.
        let fits = || {
            let taken = metal.current_allocated_size();
            (
                taken.saturating_add(bytes.next_power_of_two()) <= metal.recommended_max_working_set_size(),
                taken,
            )
        };
        if !fits().0 {
            self.device.wait_until_completed()?;
            if let (false, taken) = fits() {
                return Err(Error::Device(format!(
                    "{:.1} MiB of GPU memory; {:.0} MiB of the recommended {:.0} MiB are in use",
                    mib(bytes),
                    mib(taken),
                    mib(metal.recommended_max_working_set_size())
                )));
            }
        }
        make(bytes)
            .map(Buffer::Owned)
            .map_err(|e| Error::Device(format!("{:.1} MiB of GPU memory: {e}", mib(bytes))))
    }
}

/// Opens the system's GPU.
///
/// # Errors
/// No GPU that Metal supports, or one older than Apple family 7.
pub fn open() -> Result<Device> {
    // candle takes the first device of the list without checking that there is one.
    if metal::Device::all().is_empty() {
        return Err(Error::Device("this machine has no GPU that Metal supports".into()));
    }
    let device = Device::new_metal(0)?;
    Metal::new(&device)?;
    Ok(device)
}

/// The properties of a GPU.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Recommended limit of the memory in use, in bytes.
    pub memory: usize,
    /// Memory that this program has allocated, in bytes.
    pub taken: usize,
}

/// The properties of the GPU behind a device.
///
/// # Errors
/// A device that is not a Metal device.
pub fn describe(device: &Device) -> Result<Description> {
    let metal = device.as_metal_device()?.metal_device();
    Ok(Description {
        name: metal.as_ref().name().to_string(),
        memory: metal.recommended_max_working_set_size(),
        taken: metal.current_allocated_size(),
    })
}

/// The number of cores of a typical GPU of this class; Metal does not report the number.
fn cores(class: MetalDeviceType) -> u32 {
    match class {
        MetalDeviceType::Phone => 5,
        MetalDeviceType::BasePro | MetalDeviceType::Medium => 10,
        MetalDeviceType::Max => 32,
        MetalDeviceType::Ultra => 64,
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

impl Gpu for Metal {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.arch
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        self.allocate_with(bytes, |n| self.device.new_buffer_builder().with_size_for(n, DType::U8).build())
    }

    fn zeros(&self, bytes: usize) -> Result<Buffer> {
        self.allocate_with(bytes, |n| self.device.new_buffer_builder().with_zeros(n).build())
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        self.allocate_with(bytes.len(), |n| {
            let mut padded = bytes.to_vec();
            padded.resize(n, 0);
            self.device.new_buffer_with_data(&padded)
        })
    }

    #[allow(unsafe_code)] // reads memory that the GPU has filled
    fn download(&self, from: Slice<'_, Buffer>, bytes: usize) -> Result<Vec<u8>> {
        // Copies are of whole words; an operator's own buffers end with one.
        let length = bytes.next_multiple_of(4);
        let (source, offset) = Buffer::place(&from, length)?;
        let host = self.device.new_buffer_builder().with_size(length.max(ALIGNMENT_BYTES)).build()?;
        self.device.blit_command_encoder()?.copy_from_buffer(&source, offset, &host, 0, length);
        self.device.flush_and_wait_current()?;
        // Waits for earlier command buffers too.
        self.device.wait_until_completed()?;
        // SAFETY: the host can read this memory. No other code has access to it, and the GPU has finished writing.
        Ok(unsafe { std::slice::from_raw_parts(host.contents(), bytes) }.to_vec())
    }

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        let refused = |why: String| Error::Device(format!("Metal cannot launch {launch}: {why}"));
        let place =
            |slice: &Option<Slice<'_, Buffer>>| slice.as_ref().map(|s| Buffer::place(s, 0)).transpose();
        let places = launch.buffers.iter().map(place).collect::<Result<Vec<_>>>()?;
        let Some((any, _)) = places.iter().flatten().next() else {
            return Err(refused("it has no buffers".into()));
        };
        let present = places.iter().enumerate().map(|(n, place)| u32::from(place.is_some()) << n).sum();
        let constants = [present, launch.constants.features, launch.constants.rows];
        let pipeline = self.loaded.pipeline(launch.kernel, constants)?;
        let (threads, width) =
            (pipeline.max_total_threads_per_threadgroup(), pipeline.as_ref().threadExecutionWidth());
        if launch.block as usize > threads || width != SIMDGROUP {
            return Err(refused(format!(
                "it can have {threads} threads in simdgroups of {width}; {SIMDGROUP} are expected"
            )));
        }
        let shared_bytes = (launch.shared_bytes as usize).next_multiple_of(ALIGNMENT_BYTES);
        let own = pipeline.as_ref().staticThreadgroupMemoryLength();
        if own + shared_bytes > self.arch.shared_bytes as usize {
            return Err(refused(format!(
                "{own} static and {shared_bytes} dynamic bytes exceed the {} bytes of threadgroup memory",
                self.arch.shared_bytes
            )));
        }
        let guard = self.device.command_encoder()?;
        let encoder: &metal::ComputeCommandEncoder = guard.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        encoder.set_bytes_directly(0, launch.params.len(), launch.params.as_ptr().cast());
        for (n, place) in places.iter().enumerate() {
            let (buffer, offset) = place.as_ref().map_or((any, 0), |(buffer, offset)| (buffer, *offset));
            // candle orders launches by the buffers that they write. Which these are is not known here, so that all of
            // them are declared as outputs.
            encoder.set_output_buffer(n + 1, Some(buffer), offset);
        }
        if shared_bytes > 0 {
            encoder.set_threadgroup_memory_length(0, shared_bytes);
        }
        let [width, height, depth] = launch.grid.map(|n| n as usize);
        let threads = MTLSize { width: launch.block as usize, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(MTLSize { width, height, depth }, threads);
        Ok(())
    }
}

impl TensorGpu for Metal {
    fn of(device: &Device) -> Result<Self> {
        Self::new(device)
    }

    fn storage(&self, buffer: Buffer, dtype: DType, shape: &Shape) -> Result<Storage> {
        buffer.into_storage(&self.device, dtype, shape)
    }
}
