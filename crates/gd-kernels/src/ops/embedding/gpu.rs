//! Rows of an embedding table on a GPU, with a backward pass over an inverse index (row to its reads).
//!
//! In candle's own backward pass (`index_add`), each thread adds up all reads sequentially, which takes most of a
//! training step where the vocabulary is large. The sum here is that of the value gradient of a selection: the table is
//! the values of one head, and every read is a query that selected one row with weight 1.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::graph::{Finished, attach1};
use crate::error::{Error, Result};
use crate::ops::select::gpu::inverse_index::InverseIndex;
use crate::ops::select::gpu::launch::{Rule, SelectPlan, Sizes, sum_rows};

/// The rows `ids` u32 `[reads]` of a table `[V, C]`.
pub(crate) fn embedding<G: TensorGpu>(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((rows, _), reads) = (table.dims2()?, ids.dims1()?);
    if ids.dtype() != DType::U32 || reads == 0 || rows == 0 {
        return Err(Error::Invalid(format!(
            "embedding: ids {:?} {:?} of a table {:?}; u32 [reads] expected, none empty",
            ids.dims(),
            ids.dtype(),
            table.dims()
        )));
    }
    let device = G::of(table.device())?;
    let result = Finished::copy_of(&table.detach().index_select(ids, 0)?)?;
    let ids = Vector::new(ids, DType::U32)?;
    Ok(attach1("embedding", table, result, move |table, _, grad| {
        let (rows, width) = table.dims2()?;
        let sizes = Sizes {
            batch: 1,
            q_heads: 1,
            kv_heads: 1,
            queries: reads,
            keys: rows,
            head_dim: width,
            value_dim: width,
            slots: 1,
            dtype: table.dtype(),
        };
        let plan = SelectPlan::new(&sizes, &Rule::default(), &device.arch())?;
        let inverse = InverseIndex::new(&device, &sizes, ids.slice())?;
        let grad = Rows::new(&grad.reshape((1, 1, reads, width))?)?;
        let ones = Vector::new(&Tensor::ones(reads, DType::F32, table.device())?, DType::F32)?;
        let [out] = device.gradients([table])?;
        sum_rows(&device, &plan, &inverse, ones.slice(), &grad.tensor4(), (&out).into())?;
        let [out] = device.tensors([table], [out])?;
        Ok(out)
    })?)
}
