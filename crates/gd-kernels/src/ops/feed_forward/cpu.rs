//! [`feed_forward`](super::feed_forward) as one operator, for trainings in f32 and f64 on the CPU.

use candle_core::{DType, Result, Tensor};

use crate::backend::cpu::product::{MatmulPrecision, Multiply, product, with_matmul_precision};
use crate::backend::cpu::view::add_rows;
use crate::backend::graph::attach3;
use crate::backend::span::{Pass, operator_span};
use crate::ops::linear::cpu::rows_of;
use crate::ops::rms_norm::cpu::backward as norm_backward;
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::cpu::joined_gradients;
use crate::ops::swiglu::swiglu;

/// The name of the operator in candle's graph.
const NAME: &str = "feed_forward";

/// The block for tensors of one dtype, which have been validated.
pub(super) fn feed_forward(
    x: &Tensor,
    (norm, eps): (&Tensor, f64),
    [gate, up, down]: [&Tensor; 3],
) -> Result<Tensor> {
    // An operator of candle has at most three arguments: x, the parameters with rows of C elements, and down.
    let inner = Tensor::cat(&[gate, up, &norm.unsqueeze(0)?], 0)?;
    match x.dtype() {
        DType::F64 => fused::<f64>(x, &inner, down, eps),
        _ => fused::<f32>(x, &inner, down, eps),
    }
}

/// Gate and up `[2 F, C]`, and the weight of the normalisation `[C]`.
fn parts(inner: &Tensor) -> Result<(Tensor, Tensor)> {
    let inner = inner.detach();
    let rows = inner.dim(0)? - 1;
    Ok((inner.narrow(0, 0, rows)?, inner.get(rows)?))
}

fn fused<T: Multiply>(x: &Tensor, inner: &Tensor, down: &Tensor, eps: f64) -> Result<Tensor> {
    let span = operator_span(NAME, Pass::Forward);
    let precision = MatmulPrecision::current();
    let rows = rows_of(x)?;
    let (gate_up, norm) = parts(inner)?;
    let width = down.dim(1)?;
    let normed = rms_norm(&rows, &norm, eps)?;
    let projected = product(&normed, &gate_up.t()?)?;
    let hidden = swiglu(&projected.narrow(1, 0, width)?, &projected.narrow(1, width, width)?)?;
    let mut y = T::product(&hidden, &down.detach().t()?)?;
    add_rows(&mut y, &rows)?;
    drop(span);
    attach3(NAME, [x, inner, down], (y, x.shape().clone()), move |[x, inner, down], _, dy| {
        with_matmul_precision(precision, || {
            let (rows, dy) = (rows_of(x)?, rows_of(dy)?);
            let (gate_up, norm) = parts(inner)?;
            let dhidden = product(&dy, down)?;
            let ddown = product(&dy.t()?, &hidden)?;
            let dprojected = joined_gradients::<T>(&projected, &dhidden)?;
            let dprojected = Tensor::from_vec(dprojected, projected.shape(), projected.device())?;
            let dgate_up = product(&dprojected.t()?, &normed)?;
            let [dx, dnorm] = norm_backward::<T>(&rows, &norm, &product(&dprojected, &gate_up)?, eps)?;
            let dx = (dx + dy)?.reshape(x.shape())?;
            Ok([dx, Tensor::cat(&[dgate_up, dnorm.unsqueeze(0)?], 0)?, ddown])
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed_forward;
    use crate::ops::agreement::{agree, noise};

    #[test]
    fn the_operator_agrees_with_its_composition() -> Result<()> {
        let composed = |t: &[Tensor]| {
            let n = rms_norm(&t[0], &t[1], 1e-3)?;
            let (gate, up) = (n.broadcast_matmul(&t[2].t()?)?, n.broadcast_matmul(&t[3].t()?)?);
            &t[0] + swiglu(&gate, &up)?.broadcast_matmul(&t[4].t()?)?
        };
        for lead in [&[40][..], &[3, 17], &[2, 3]] {
            let dtype = DType::F64;
            let x = noise(1, &[lead, &[10]].concat(), dtype)?;
            let weights =
                [noise(3, &[13, 10], dtype)?, noise(4, &[13, 10], dtype)?, noise(5, &[10, 13], dtype)?];
            let inputs = [&[x, noise(2, &[10], dtype)?][..], &weights].concat();
            agree(&inputs, |t| Ok(feed_forward(&t[0], (&t[1], 1e-3), [&t[2], &t[3], &t[4]])?), composed)?;
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let t = |shape: &[usize]| noise(1, shape, DType::F32);
        let error = feed_forward(&t(&[2, 4])?, (&t(&[4])?, 1e-6), [&t(&[6, 4])?, &t(&[5, 4])?, &t(&[4, 6])?]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("[6, 4]") && error.contains("[5, 4]"), "{error}");
        Ok(())
    }
}
