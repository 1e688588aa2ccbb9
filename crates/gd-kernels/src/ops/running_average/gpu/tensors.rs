//! The gated running average of tensors.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::graph::attach3;
use crate::error::Result;
use crate::ops::running_average::gpu::launch::{AveragePlan, Inputs, State, backward, forward};
use crate::ops::running_average::{AverageState, Sizes};

/// decay, write `[B, H, N]` and v `[B, Hk, N, D]`.
struct Operands<B> {
    decay: Vector<B>,
    write: Vector<B>,
    v: Rows<B>,
}

impl<B: From<Tensor>> Operands<B> {
    fn new([decay, write, v]: [&Tensor; 3]) -> Result<Self> {
        let dtype = v.dtype();
        let (decay, write) = (Vector::new(decay, dtype)?, Vector::new(write, dtype)?);
        Ok(Self { decay, write, v: Rows::new(v)? })
    }

    fn inputs<'a>(&'a self, start: Option<&'a [Vector<B>; 2]>) -> Inputs<'a, B> {
        let start = start.map(|[mean, log]| State { mean: mean.slice(), log_weight: log.slice() });
        Inputs { decay: self.decay.slice(), write: self.write.slice(), v: self.v.tensor4(), start }
    }
}

/// The averages and the state after the last row, of validated tensors.
pub(crate) fn running_average<G: TensorGpu>(
    sizes: Sizes,
    inputs: [&Tensor; 3],
    state: Option<&AverageState>,
) -> Result<(Tensor, AverageState)> {
    let Sizes { batch, heads, rows, dim, dtype, .. } = sizes;
    let device = G::of(inputs[2].device())?;
    let plan = AveragePlan::new(&sizes, &device.arch())?;
    let wide = |t: &Tensor| Vector::<G::Buffer>::new(t, DType::F32);
    let start = state.map(|s| -> Result<_> { Ok([wide(&s.mean)?, wide(&s.log_weight)?]) }).transpose()?;
    let out = device.allocate(batch * heads * rows * dim * dtype.size_in_bytes())?;
    let (mean, log) = (device.allocate(batch * heads * dim * 4)?, device.allocate(batch * heads * 4)?);
    let last = State { mean: (&mean).into(), log_weight: (&log).into() };
    let operands = Operands::new(inputs)?;
    let weights = forward(&device, &plan, &operands.inputs(start.as_ref()), (&out).into(), &last)?;
    let state = AverageState {
        mean: device.tensor(mean, DType::F32, (batch, heads, dim))?,
        log_weight: device.tensor(log, DType::F32, (batch, heads))?,
    };
    let result = device.finished(out, dtype, (batch, heads, rows, dim))?;
    let m = attach3("running_average", inputs, result, move |inputs, m, dm| {
        let (operands, m, dm) = (Operands::new(inputs)?, Vector::new(m, dtype)?, Rows::new(dm)?);
        let gradients = device.gradients(inputs)?;
        let x = operands.inputs(start.as_ref());
        let into = [(&gradients[0]).into(), (&gradients[1]).into(), (&gradients[2]).into()];
        backward(&device, &plan, &x, &weights, m.slice(), &dm.tensor4(), into)?;
        device.tensors(inputs, gradients)
    })?;
    Ok((m, state))
}
