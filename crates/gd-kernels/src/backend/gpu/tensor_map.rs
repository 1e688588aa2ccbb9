//! Tensor maps for the TMA unit of Hopper GPUs: address, sizes and strides of a tensor, and the box that one copy loads.

use std::fmt;

use candle_core::{DType, Tensor};

use crate::backend::gpu::{Slice, Tensor4};
use crate::error::{Error, Result};

/// Bytes of a row of a box: the widest that TMA swizzles.
pub const BOX_BYTES: usize = 128;
/// Most rows of a box.
const MAX_ROWS: usize = 256;
/// Alignment of addresses and strides, in bytes.
const ALIGN: usize = 16;

/// A tensor `[batch, heads, rows, dim]` of 16-bit elements for TMA. A copy loads a box of `box_rows` rows and 64 elements
/// of each, with zeros outside the tensor, and swizzles it by 128 bytes.
#[derive(Debug)]
pub struct TensorMap<'a, B> {
    /// Its first element.
    pub data: Slice<'a, B>,
    /// f16 or bf16.
    pub dtype: DType,
    /// Batch, heads, rows, dim.
    pub dims: [usize; 4],
    /// Strides of batch, heads and rows, in bytes.
    pub strides: [usize; 3],
    /// Rows of a box.
    pub box_rows: usize,
}

impl<B> fmt::Display for TensorMap<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { dtype, dims, strides, box_rows, .. } = self;
        let columns = BOX_BYTES / dtype.size_in_bytes();
        write!(
            f,
            "{} {dims:?} at strides of {strides:?} bytes, boxes of {box_rows} x {columns}",
            dtype.as_str()
        )
    }
}

impl<'a, B> TensorMap<'a, B> {
    /// The map of a tensor `dims` whose boxes have `box_rows` rows.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the tensor and the property that TMA does not support: see [`suits`].
    pub fn new(
        name: &str,
        tensor: &Tensor4<'a, B>,
        dtype: DType,
        dims: [usize; 4],
        box_rows: usize,
    ) -> Result<Self> {
        if !(1..=MAX_ROWS).contains(&box_rows) {
            return Err(Error::Unsupported(format!(
                "{name}: a box of {box_rows} rows; 1 to {MAX_ROWS} are supported"
            )));
        }
        suits(dtype, dims, tensor.strides, tensor.data.offset)
            .map_err(|why| Error::Unsupported(format!("{name} for TMA: {why}")))?;
        let bytes = dtype.size_in_bytes();
        // The stride of a dimension of size 1 is not used, but the driver checks it.
        let stride = |at: usize| if dims[at] > 1 { tensor.strides[at] * bytes } else { dims[3] * bytes };
        let strides = [stride(0), stride(1), stride(2)];
        Ok(Self { data: tensor.data, dtype, dims, strides, box_rows })
    }
}

/// Checks that TMA can load a tensor `dims` of `strides` (in elements) that starts `offset` bytes into a buffer: 16-bit
/// elements, no empty dimension, address and strides at multiples of 16 bytes, no stride of 0.
///
/// # Errors
/// The property that it does not support, with the values.
pub fn suits(
    dtype: DType,
    dims: [usize; 4],
    strides: [usize; 3],
    offset: usize,
) -> std::result::Result<(), String> {
    if !matches!(dtype, DType::F16 | DType::BF16) {
        return Err(format!("dtype {}; f16 and bf16 are supported", dtype.as_str()));
    }
    if dims.contains(&0) {
        return Err(format!("dims {dims:?} are empty"));
    }
    let bytes = dtype.size_in_bytes();
    if !offset.is_multiple_of(ALIGN) || !(dims[3] * bytes).is_multiple_of(ALIGN) {
        return Err(format!(
            "offset {offset} and rows of {} bytes; multiples of {ALIGN} are supported",
            dims[3] * bytes
        ));
    }
    let taken = strides.iter().zip(dims).filter(|(_, n)| *n > 1).map(|(s, _)| s * bytes);
    match taken.into_iter().find(|s| *s == 0 || !s.is_multiple_of(ALIGN)) {
        Some(bad) => Err(format!("a stride of {bad} bytes; positive multiples of {ALIGN} are supported")),
        None => Ok(()),
    }
}

/// Whether TMA can load a tensor of rank 4, which is copied first if its last dimension is strided.
pub(crate) fn loadable(t: &Tensor) -> bool {
    let &[batch, heads, rows, dim] = t.dims() else { return false };
    let dims = [batch, heads, rows, dim];
    let (strides, offset) = match *t.stride() {
        [b, h, n, 1] => ([b, h, n], t.layout().start_offset() * t.dtype().size_in_bytes()),
        _ => ([heads * rows * dim, rows * dim, dim], 0),
    };
    suits(t.dtype(), dims, strides, offset).is_ok()
}
