//! The CPU implementation of [`running_average`](super::running_average): the scalars of the recurrence, then the value
//! rows.

mod blocks;
mod weights;

use candle_core::Tensor;

use super::{AverageState, Sizes};
use crate::backend::cpu::element::{Element, by_float};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach3, with_contiguous_rows};
use crate::error::Result;

/// The averages and the last state of validated tensors.
pub(super) fn running_average(
    sizes: Sizes,
    inputs: [&Tensor; 3],
    state: Option<&AverageState>,
) -> Result<(Tensor, AverageState)> {
    by_float!("running_average", sizes.dtype, T => average::<T>(sizes, inputs, state))
}

/// [`running_average`] for one element type.
fn average<T: Element>(
    sizes: Sizes,
    inputs: [&Tensor; 3],
    state: Option<&AverageState>,
) -> Result<(Tensor, AverageState)> {
    let [_, _, v] = inputs;
    let device = v.device();
    let elements = |t: &Tensor| t.flatten_all()?.to_vec1::<T::Acc>();
    let start_log = state.map(|s| elements(&s.log_weight)).transpose()?;
    let start_mean = state.map(|s| elements(&s.mean)).transpose()?;
    let (weights, log) = with_rows::<T, _>(inputs, |[decay, write, _]| {
        weights::forward(sizes, decay, write, start_log.as_deref())
    })?;
    let (m, mean) =
        with_rows::<T, _>(inputs, |[_, _, v]| blocks::forward(sizes, v, &weights, start_mean.as_deref()))?;
    let state = AverageState {
        mean: Tensor::from_vec(mean, (sizes.batch, sizes.heads, sizes.dim), device)?,
        log_weight: Tensor::from_vec(log, (sizes.batch, sizes.heads), device)?,
    };
    let shape = (sizes.batch, sizes.heads, sizes.rows, sizes.dim).into();
    let m = attach3("running_average", inputs, (m, shape), move |inputs, m, dm| {
        let dm = with_contiguous_rows(dm)?;
        let (ms, ml) = m.storage_and_layout();
        let (ds, dl) = dm.storage_and_layout();
        let (m, dm) = (Rows::<T>::new(&ms, ml)?, Rows::<T>::new(&ds, dl)?);
        let (dv, dtake) = with_rows::<T, _>(inputs, |[_, _, v]| {
            blocks::backward(sizes, v, &m, &dm, &weights, start_mean.as_deref())
        })?;
        let (ddecay, dwrite) = with_rows::<T, _>(inputs, |[decay, _, _]| {
            weights::backward::<T>(sizes, decay, &weights, &dtake)
        })?;
        let [decay, write, v] = inputs;
        Ok([
            Tensor::from_vec(ddecay, decay.shape(), decay.device())?,
            Tensor::from_vec(dwrite, write.shape(), write.device())?,
            Tensor::from_vec(dv, v.shape(), v.device())?,
        ])
    })?;
    Ok((m, state))
}

/// Calls `f` with the rows of three tensors.
fn with_rows<T: Element, R>(
    [a, b, c]: [&Tensor; 3],
    f: impl FnOnce([&Rows<T>; 3]) -> R,
) -> candle_core::Result<R> {
    let ((a, al), (b, bl), (c, cl)) =
        (a.storage_and_layout(), b.storage_and_layout(), c.storage_and_layout());
    Ok(f([&Rows::new(&a, al)?, &Rows::new(&b, bl)?, &Rows::new(&c, cl)?]))
}
