//! Rows of an embedding table.

#[cfg(feature = "gpu")]
mod gpu;

use candle_core::Tensor;

use crate::backend::dispatch::on_gpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;

/// The rows `ids` of an embedding table.
///
/// * `table`: `[V, C]`, f64, f32, f16 or bf16 on the CPU; f32, f16 or bf16 on a GPU.
/// * `ids`: u32 `[R]`, each below V, on the device of the table.
///
/// Returns `[R, C]` in the dtype of the table. The table gets a gradient: that of a row is the sum of the gradients of
/// its reads. On a GPU the sum is in the order of the reads, so that it has the same bits in every run.
///
/// # Errors
/// Tensors of other shapes, dtypes or devices, and on the CPU an id of V or more. Ids are not checked on a GPU, since
/// that would wait for the device.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
///
/// let table = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let ids = Tensor::new(&[1u32, 0, 1], &Device::Cpu)?;
/// let rows = gd_kernels::embedding(&table, &ids)?;
/// assert_eq!(rows.to_vec2::<f32>()?, [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let _span = operator_span("embedding", Pass::Forward);
    on_gpu!(table.device(), G => crate::ops::embedding::gpu::embedding::<G>(table, ids));
    Ok(table.index_select(ids, 0)?)
}
