//! The feed-forward block of a transformer: normalisation, SwiGLU (Shazeer, arXiv 2002.05202) and residual connection.

mod cpu;

use candle_core::Tensor;

use crate::backend::cpu::product::computes;
use crate::error::{Error, Result};
use crate::ops::linear::{linear, linears};
use crate::ops::rms_norm::rms_norm;
use crate::ops::swiglu::swiglu;

/// `x + swiglu(n gateᵀ, n upᵀ) downᵀ` with `n = rms_norm(x, norm)`.
///
/// * `x`: `[.., C]`, f64, f32, f16 or bf16.
/// * `norm`: the weight `[C]` of the normalisation, and the number that it adds to the mean of the squares.
/// * `gate`, `up`: `[F, C]`; `down`: `[C, F]`.
///
/// Returns `[.., C]` in the dtype of `x`. All tensors get gradients. On the CPU a training in f32 or f64 computes the block
/// as one operator with one backward pass: candle adds every gradient between two operators to a tensor of zeros first,
/// which takes longer than the products. Elsewhere the block is composed of the operators of this crate.
///
/// # Errors
/// [`Error::Invalid`] if the shapes do not fit, else those of [`rms_norm`](crate::rms_norm), [`linear`](crate::linear) and
/// [`swiglu`](crate::swiglu).
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// let (x, zeros) = (Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, |shape| {
///     Tensor::zeros(shape, DType::F32, &Device::Cpu)
/// });
/// let norm = Tensor::ones(4, DType::F32, &Device::Cpu)?;
/// let (up, down) = (zeros((8, 4))?, zeros((4, 8))?);
/// let y = gd_kernels::feed_forward(&x, (&norm, 1e-6), [&up, &up, &down])?;
/// assert_eq!(y.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn feed_forward(x: &Tensor, norm: (&Tensor, f64), [gate, up, down]: [&Tensor; 3]) -> Result<Tensor> {
    let fits = match (x.dims(), norm.0.dims(), gate.dims(), up.dims(), down.dims()) {
        ([.., c], [n], [f, g], [u, v], [d, e]) => {
            [n, g, v, d].iter().all(|size| *size == c) && f == u && u == e
        }
        _ => false,
    };
    if !fits {
        return Err(Error::Invalid(format!(
            "feed_forward: x {:?}, norm {:?}, gate {:?}, up {:?} and down {:?}; [.., C], [C], [F, C], [F, C] and [C, F] \
             expected",
            x.dims(),
            norm.0.dims(),
            gate.dims(),
            up.dims(),
            down.dims()
        )));
    }
    let rows: usize = x.dims().iter().rev().skip(1).product();
    let parameters = [norm.0, gate, up, down];
    let one_dtype = parameters.iter().all(|t| t.dtype() == x.dtype());
    let differentiate = parameters.iter().chain(&[x]).any(|t| t.track_op());
    if one_dtype && differentiate && computes(rows, x.dtype(), x.device()) {
        return Ok(cpu::feed_forward(x, norm, [gate, up, down])?);
    }
    let n = rms_norm(x, norm.0, norm.1)?;
    let [gate, up] = linears(&n, [(gate, None), (up, None)])?;
    Ok((x + linear(&swiglu(&gate, &up)?, down, None)?)?)
}
