//! Rows of an embedding table.

#[cfg(feature = "gpu")]
mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_gpu;
use crate::error::Result;

/// The rows `ids` `[R]` of a table `[V, C]`, both on one device: `[R, C]`. On a GPU (ids u32, table f32, f16 or
/// bf16) each row's gradient is the sum of those of its reads, in their order.
///
/// # Errors
/// Tensors of other shapes, dtypes or devices. Ids beyond the table are not looked for on a GPU.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    on_gpu!(table.device(), G => crate::ops::embedding::gpu::embedding::<G>(table, ids));
    Ok(table.index_select(ids, 0)?)
}
