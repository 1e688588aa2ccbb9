//! Rows of an embedding table.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::gpu::on_gpu;

/// The rows `ids` u32 `[R]` of a table `[V, C]`, both on one device: `[R, C]`. On a GPU (f32, f16 or bf16) each
/// row's gradient is the sum of those of its reads, in their order.
///
/// # Errors
/// Tensors of other shapes, dtypes or devices. Ids beyond the table are not looked for on a GPU.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((rows, _), reads) = (table.dims2()?, ids.dims1()?);
    if ids.dtype() != DType::U32 || reads == 0 || rows == 0 {
        return Err(Error::Invalid(format!(
            "embedding: ids {:?} {:?} of a table {:?}; u32 [reads] expected, none empty",
            ids.dims(),
            ids.dtype(),
            table.dims()
        )));
    }
    on_gpu!(table.device(), G => crate::gpu::tensors::embedding::embedding::<G>(table, ids));
    Ok(table.index_select(ids, 0)?)
}
