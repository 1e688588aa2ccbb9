//! The interface to GPUs: memory, and kernel launches over buffers and strides.
//!
//! Operators use a device through [`Gpu`]. CUDA, Metal, and the emulator that executes the kernel sources on the host
//! implement it, so that the same launch code runs on all of them. No function here waits for the device. Buffers that
//! an operator allocates are dropped after the launch that reads them, so memory must be freed in the order of the
//! launches.

mod codes;
#[cfg(feature = "emulate")]
mod emulated;
pub mod kernel;
pub(crate) mod mask;
pub mod params;
pub mod tensor_map;
pub(crate) mod tensors;

use std::fmt;

use candle_core::DType;

#[cfg(feature = "emulate")]
pub use self::emulated::emulate;
#[cfg(feature = "emulate")]
pub(crate) use self::emulated::{Emulated, current as emulated};
pub use self::kernel::{Kernel, KernelOp};
use self::kernel::{KernelTarget, Variant};
use self::params::{FeatureBit, MaskParams, MaskTableCode};
pub use self::tensor_map::TensorMap;
use crate::error::{Error, Result};

/// The properties of a device on which plans depend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability, 10 * major + minor; [`Arch::METAL`] for an Apple GPU.
    pub compute: u32,
    /// Most shared memory of a block, in bytes, after opting in (Metal: threadgroup memory).
    pub shared_bytes: u32,
    /// Multiprocessors (Metal: cores).
    pub processors: u32,
}

impl Arch {
    /// The value of `compute` for an Apple GPU, which runs the kernels of `kernels/metal`.
    pub const METAL: u32 = 0;

    /// Whether kernels of `kernels/metal` run on it.
    pub fn is_metal(&self) -> bool {
        self.compute == Self::METAL
    }

    /// The target of portable kernels.
    pub(crate) fn target(&self) -> KernelTarget {
        if self.is_metal() { KernelTarget::Metal } else { KernelTarget::Sm80 }
    }
}

/// A GPU: memory, and launches in the order of the calls.
pub trait Gpu {
    /// A part of its memory, aligned to at least 16 bytes, freed when dropped.
    type Buffer;

    /// The properties of the device.
    fn arch(&self) -> Arch;

    /// Memory with undefined contents.
    ///
    /// # Errors
    /// Out of memory, with the number of bytes.
    fn allocate(&self, bytes: usize) -> Result<Self::Buffer>;

    /// Memory of zeros.
    ///
    /// # Errors
    /// As [`Gpu::allocate`].
    fn zeros(&self, bytes: usize) -> Result<Self::Buffer>;

    /// Copies from the host.
    ///
    /// # Errors
    /// As [`Gpu::allocate`].
    fn upload(&self, bytes: &[u8]) -> Result<Self::Buffer>;

    /// Copies `bytes` bytes to the host, after all launches before.
    ///
    /// # Errors
    /// A copy beyond the buffer, or an earlier launch that failed.
    fn download(&self, from: Slice<'_, Self::Buffer>, bytes: usize) -> Result<Vec<u8>>;

    /// Starts a kernel: the params by value come first, then one pointer for each buffer (null for
    /// `None`).
    ///
    /// On Metal the params are bytes at buffer index 0 and the buffers follow at 1, 2, ..; a `None` is bound
    /// to any buffer. There are three function constants of type `uint`: bit n of constant 0 says whether the buffer of
    /// index n + 1 is present, 1 is [`Constants::features`], 2 is [`Constants::rows`]. Threadgroup memory of
    /// `shared_bytes`, rounded up to 16, is bound at index 0 unless it is 0.
    ///
    /// # Errors
    /// An unknown kernel, or a launch that the device refuses; names kernel, grid and block.
    fn launch(&self, launch: &Launch<'_, Self::Buffer>) -> Result<()>;

    /// The same for a kernel that loads a tensor with TMA: its map comes after the params.
    ///
    /// # Errors
    /// As [`Gpu::launch`]; a device without TMA refuses.
    fn launch_mapped(
        &self,
        map: &TensorMap<'_, Self::Buffer>,
        launch: &Launch<'_, Self::Buffer>,
    ) -> Result<()> {
        Err(Error::Unsupported(format!("{launch}: {map} on a device without TMA")))
    }
}

/// A place in a buffer.
#[derive(Debug)]
pub struct Slice<'a, B> {
    /// The buffer.
    pub buffer: &'a B,
    /// Where the slice starts, in bytes.
    pub offset: usize,
}

impl<B> Clone for Slice<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Slice<'_, B> {}

impl<'a, B> From<&'a B> for Slice<'a, B> {
    fn from(buffer: &'a B) -> Self {
        Self { buffer, offset: 0 }
    }
}

/// A tensor `[batch, heads, rows, dim]` whose last dimension is contiguous.
#[derive(Debug)]
pub struct Tensor4<'a, B> {
    /// Its first element.
    pub data: Slice<'a, B>,
    /// Strides of batch, heads and rows, in elements.
    pub strides: [usize; 3],
}

impl<B> Clone for Tensor4<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Tensor4<'_, B> {}

impl<'a, B> Tensor4<'a, B> {
    /// A contiguous tensor `[_, heads, rows, dim]`.
    pub fn contiguous(data: impl Into<Slice<'a, B>>, [heads, rows, dim]: [usize; 3]) -> Self {
        Self { data: data.into(), strides: [heads * rows * dim, rows * dim, dim] }
    }

    /// The strides as the kernels take them; refuses a tensor `dims` that 31 bits cannot address.
    pub(crate) fn checked(&self, name: &str, dims: [usize; 4]) -> Result<[u32; 3]> {
        let last = dims.iter().zip(&self.strides).map(|(n, s)| (n.max(&1) - 1) as u128 * *s as u128);
        elements(name, last.sum::<u128>() + dims[3] as u128)?;
        // A stride that is never taken may be anything.
        let stride = |at: usize| if dims[at] > 1 { self.strides[at] as u32 } else { 0 };
        Ok([stride(0), stride(1), stride(2)])
    }

    /// Whether every row starts at a multiple of 16 bytes.
    pub(crate) fn is_aligned(&self, dtype: DType, dims: [usize; 4]) -> bool {
        let bytes = dtype.size_in_bytes();
        let strides = self.strides.iter().zip(dims).all(|(s, n)| n <= 1 || (s * bytes).is_multiple_of(16));
        strides && self.data.offset.is_multiple_of(16) && (dims[3] * bytes).is_multiple_of(16)
    }
}

/// Values that are the same in many launches, for which Metal specialises a kernel when it compiles it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Constants {
    /// Bits of [`params::FeatureBit`].
    pub features: u32,
    /// Query rows of a decoding block that are used, at most.
    pub rows: u32,
}

impl Constants {
    /// The constants for a mask, whether rows allow 16-byte loads, and whether there is a prior.
    pub(crate) fn new(mask: &MaskParams, vector_loads: bool, prior: bool) -> Self {
        let features = [
            (FeatureBit::Causal, mask.causal != 0),
            (FeatureBit::Window, mask.window != 0),
            (FeatureBit::Table, mask.table != MaskTableCode::None as u32),
            (FeatureBit::Boundaries, mask.table == MaskTableCode::Boundaries as u32),
            (FeatureBit::VectorLoads, vector_loads),
            (FeatureBit::Prior, prior),
        ];
        let features = features.iter().filter(|(_, set)| *set).map(|(bit, _)| *bit as u32).sum();
        Self { features, rows: 0 }
    }
}

/// One kernel launch.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// The kernel.
    pub kernel: Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The operator's params struct, by value.
    pub params: Vec<u8>,
    /// The function constants on Metal; CUDA reads these values from the params.
    pub constants: Constants,
    /// The kernel's pointers, in order.
    pub buffers: Vec<Option<Slice<'a, B>>>,
}

impl<B> fmt::Display for Launch<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { kernel, grid: [x, y, z], block, shared_bytes, .. } = self;
        write!(f, "{kernel}: {x} x {y} x {z} blocks of {block} threads, {shared_bytes} bytes shared")
    }
}

/// Most blocks of a grid along x, the only dimension that plans use.
pub(crate) const MAX_BLOCKS: u128 = i32::MAX as u128;

/// The grid of `blocks` blocks; refuses more than a grid can have.
pub(crate) fn grid(op: &str, blocks: u128) -> Result<[u32; 3]> {
    match blocks {
        1..=MAX_BLOCKS => Ok([blocks as u32, 1, 1]),
        _ => Err(Error::Unsupported(format!(
            "{op}: a grid of {blocks} blocks; 1 to {MAX_BLOCKS} are supported"
        ))),
    }
}

/// Threads of a block of [`launch`].
pub(crate) const THREADS: usize = 256;

/// Starts a kernel with blocks of [`THREADS`] threads, without dynamic shared memory and function constants.
pub(crate) fn launch<G: Gpu>(
    gpu: &G,
    kernel: Kernel,
    blocks: usize,
    params: &impl bytemuck::Pod,
    buffers: Vec<Option<Slice<'_, G::Buffer>>>,
) -> Result<()> {
    gpu.launch(&Launch {
        grid: grid(kernel.op().symbol(), blocks as u128)?,
        kernel,
        block: THREADS as u32,
        shared_bytes: 0,
        params: bytemuck::bytes_of(params).to_vec(),
        constants: Constants::default(),
        buffers,
    })
}

/// The sizes of tensors `[batch, heads, rows, dim]` of which a kernel processes one row per warp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowSizes {
    /// B.
    pub batch: usize,
    /// H.
    pub heads: usize,
    /// N.
    pub rows: usize,
    /// C.
    pub dim: usize,
    /// The dtype of all tensors.
    pub dtype: DType,
}

impl RowSizes {
    pub(crate) fn dims(&self) -> [usize; 4] {
        [self.batch, self.heads, self.rows, self.dim]
    }

    /// The number of rows.
    pub(crate) fn count(&self) -> usize {
        self.batch * self.heads * self.rows
    }

    /// Blocks of a launch in which every warp takes a row.
    pub(crate) fn blocks(&self) -> usize {
        self.count().div_ceil(THREADS / 32)
    }

    /// The variant of the kernels for operator `op`; refuses what they do not cover.
    pub(crate) fn checked(&self, op: &str, arch: &Arch) -> Result<Variant> {
        let variant = Variant::new(op, self.dtype, arch)?;
        let count = self.dims().iter().map(|&n| n as u128).product();
        if count == 0 {
            let [b, h, n, c] = self.dims();
            return Err(Error::Unsupported(format!("{op}: a tensor [{b}, {h}, {n}, {c}] is empty")));
        }
        elements("x", count)?;
        Ok(variant)
    }
}

/// Refuses a tensor of 2^31 elements or more: kernels address elements by 31 bits.
pub(crate) fn elements(name: &str, count: u128) -> Result<u32> {
    match u32::try_from(count) {
        Ok(n) if n < 1 << 31 => Ok(n),
        _ => Err(Error::Unsupported(format!("{name} spans {count} elements; fewer than 2^31 are supported"))),
    }
}

/// Refuses a device without the instructions of the kernels.
pub(crate) fn require_compute(op: &str, arch: &Arch) -> Result<()> {
    if arch.is_metal() || arch.compute >= 80 {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{op} on compute capability {}.{}; 8.0 and later are supported",
        arch.compute / 10,
        arch.compute % 10
    )))
}

/// A key prior, f32 `[B|1, Hq|Hk, M]`, contiguous.
#[derive(Debug)]
pub struct Prior<'a, B> {
    /// Its values: finite or -inf.
    pub data: Slice<'a, B>,
    /// Batch and heads.
    pub dims: [usize; 2],
}

impl<B> Prior<'_, B> {
    /// Batch and heads as the kernels take them: zeros without a prior.
    pub(crate) fn sizes(prior: Option<&Self>) -> [u32; 2] {
        prior.map_or([0, 0], |p| p.dims.map(|n| n as u32))
    }
}

impl<B> Clone for Prior<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Prior<'_, B> {}
