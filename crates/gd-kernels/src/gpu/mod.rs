//! The operators on a GPU, whichever it is: problem -> plan -> launches, over buffers and strides.
//!
//! [`Gpu`] is all that an operator needs of a device. CUDA through cudarc, Metal, and the emulator
//! that executes the kernel sources on the host implement it, so that one launch code drives them all.
//! No function here waits for the device; buffers that a function allocates for itself are dropped
//! after the launch that reads them, so freeing must be ordered like launches.

pub mod average;
pub mod conv;
pub mod decode;
pub mod inverse;
pub mod mask;
pub mod params;
pub mod quantize;
pub mod scan;
pub mod select;

use std::fmt;

use candle_core::DType;

use crate::error::{Error, Result};

/// What the plans need to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability, 10 * major + minor.
    pub compute: u32,
    /// Most shared memory of a block, in bytes, after opting in.
    pub shared_bytes: u32,
    /// Multiprocessors.
    pub processors: u32,
}

/// A GPU: memory, and launches in the order of the calls.
pub trait Gpu {
    /// A part of its memory, at least 16-byte aligned, freed when dropped.
    type Buffer;

    /// Its limits.
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
    /// # Errors
    /// An unknown kernel, or a launch that the device refuses; names kernel, grid and block.
    fn launch(&self, launch: &Launch<'_, Self::Buffer>) -> Result<()>;
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
    pub(crate) fn aligned(&self, dtype: DType, dims: [usize; 4]) -> bool {
        let bytes = dtype.size_in_bytes();
        let strides = self.strides.iter().zip(dims).all(|(s, n)| n <= 1 || (s * bytes).is_multiple_of(16));
        strides && self.data.offset.is_multiple_of(16) && (dims[3] * bytes).is_multiple_of(16)
    }
}

/// One kernel launch.
#[derive(Debug)]
pub struct Launch<'a, B> {
    /// Its name, which holds operator, dtype, head_dim and architecture.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The operator's params struct, by value.
    pub params: Vec<u8>,
    /// The kernel's pointers, in order.
    pub buffers: Vec<Option<Slice<'a, B>>>,
}

impl<B> fmt::Display for Launch<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Launch { kernel, grid: [x, y, z], block, shared_bytes, .. } = self;
        write!(f, "{kernel}: {x} x {y} x {z} blocks of {block} threads, {shared_bytes} bytes shared")
    }
}

/// Most blocks of a grid along x, to which every plan here maps.
pub(crate) const MAX_BLOCKS: u128 = i32::MAX as u128;

/// The grid of `blocks` blocks; refuses more than a grid can have.
pub(crate) fn grid(op: &str, blocks: u128) -> Result<[u32; 3]> {
    match blocks {
        1..=MAX_BLOCKS => Ok([blocks as u32, 1, 1]),
        _ => Err(Error::Unsupported(format!("{op}: a grid of {blocks} blocks; 1 to {MAX_BLOCKS} are"))),
    }
}

/// Refuses a tensor of 2^31 elements or more: kernels address elements by 31 bits.
pub(crate) fn elements(name: &str, count: u128) -> Result<u32> {
    match u32::try_from(count) {
        Ok(n) if n < 1 << 31 => Ok(n),
        _ => Err(Error::Unsupported(format!("{name} spans {count} elements; fewer than 2^31 are"))),
    }
}

/// The kernels' name of a dtype.
pub(crate) fn dtype_name(op: &str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        _ => {
            Err(Error::Unsupported(format!("{op}: dtype {} on a GPU; f32, f16 and bf16 are", dtype.as_str())))
        }
    }
}

/// Refuses a device without the instructions of the kernels.
pub(crate) fn require_compute(op: &str, arch: &Arch) -> Result<()> {
    if arch.compute >= 80 {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{op} on compute capability {}.{}; 8.0 or more is",
        arch.compute / 10,
        arch.compute % 10
    )))
}
