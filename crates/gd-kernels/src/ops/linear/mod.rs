//! A projection whose weights may be stored in half precision: `y = x Wᵀ + b`.

pub(crate) mod cpu;
mod direct;
mod dropout;
mod low_rank;

use candle_core::Tensor;

pub use self::dropout::Dropout;
pub use self::low_rank::{LowRank, low_rank_linear};

use crate::backend::cpu::product::computes;
use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// Projects the last dimension of `x`: `x weightᵀ + bias`.
///
/// * `x`: `[.., I]`, f64, f32, f16 or bf16.
/// * `weight`: `[O, I]`, in the dtype of `x` or another one.
/// * `bias`: `[O]`, in any of these dtypes.
///
/// Returns `[.., O]` in the dtype of `x`. All tensors get gradients, in their own dtypes.
///
/// f16 or bf16 weights with f32 activations give the result of the same weights widened to f32, from half the memory;
/// the time of a decoding step is mostly that of reading the weights. On the CPU, up to 8 rows of `x` in f32 are computed in
/// one pass over the stored weights in f32, f16 or bf16. A row then has the same bits in any of these dtypes that represent its
/// weights, for any other rows beside it, any number of threads and any instruction set; weights in f32 whose rows are not
/// contiguous are left to candle. More rows, and other devices, use a matrix product with widened weights. On the CPU
/// products of 32 rows or more in f32 and f64 are computed in register tiles here, others by candle; those in f32 also with
/// factors rounded to bf16, see [`with_matmul_precision`](crate::with_matmul_precision).
///
/// # Errors
/// [`Error::Invalid`] if `x` is a scalar, or its last dimension is not that of `weight`.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// let weight = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?.to_dtype(DType::BF16)?;
/// let x = Tensor::new(&[[1f32, 10.0]], &Device::Cpu)?;
/// assert_eq!(gd_kernels::linear(&x, &weight, None)?.to_vec2::<f32>()?, [[21.0, 43.0, 65.0]]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let [y] = linears(x, [(weight, bias)])?;
    Ok(y)
}

/// Projects the last dimension of `x` by several weights, each with a bias or none: the results of [`linear`], with the same
/// bits. On the CPU, up to 8 rows of `x` in f32 are multiplied by all weights in one parallel loop, so that the threads wait
/// for one another once and not for each weight.
///
/// # Errors
/// As [`linear`].
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
///
/// let (a, b) = (Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?, Tensor::new(&[[3f32, 4.0], [5.0, 6.0]], &Device::Cpu)?);
/// let x = Tensor::new(&[[1f32, 10.0]], &Device::Cpu)?;
/// let [y, z] = gd_kernels::linears(&x, [(&a, None), (&b, None)])?;
/// assert_eq!(y.to_vec2::<f32>()?, [[21.0]]);
/// assert_eq!(z.to_vec2::<f32>()?, [[43.0, 65.0]]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn linears<const N: usize>(
    x: &Tensor,
    projections: [(&Tensor, Option<&Tensor>); N],
) -> Result<[Tensor; N]> {
    let _span = operator_span("linear", Pass::Forward);
    let weights = projections.map(|(weight, _)| weight);
    for weight in weights {
        let (_, inputs) = weight.dims2()?;
        if x.dims().last() != Some(&inputs) {
            return Err(Error::Invalid(format!(
                "linear: the last dimension of x {:?} is not that of the weight {:?}",
                x.dims(),
                weight.dims()
            )));
        }
    }
    let mut products = match on_cpu(x.device()) && weights.iter().all(|weight| cpu::is_direct(x, weight)) {
        true => cpu::direct(x, &weights)?,
        false => weights.iter().map(|weight| project(x, weight)).collect::<Result<Vec<_>>>()?,
    };
    for (y, (_, bias)) in products.iter_mut().zip(projections) {
        if let Some(bias) = bias {
            *y = y.broadcast_add(&bias.to_dtype(y.dtype())?)?;
        }
    }
    let Ok(products) = products.try_into() else { unreachable!("a product for each weight") };
    Ok(products)
}

/// `x weightᵀ` for validated tensors.
fn project(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !on_cpu(x.device()) {
        return Ok(product(x, &weight.to_dtype(x.dtype())?)?);
    }
    match cpu::is_direct(x, weight) {
        true => Ok(cpu::direct(x, &[weight])?.remove(0)),
        false => cpu::many_rows(x, weight),
    }
}

/// `x weightᵀ` for tensors of one dtype. Contiguous leading dimensions are folded into the rows of one product, which is
/// much quicker than a batch of products.
fn product(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let rows: usize = x.dims().iter().rev().skip(1).product();
    match *x.dims() {
        [.., _, _] if computes(rows, x.dtype(), x.device()) => cpu::product(x, weight),
        [.., _, inputs] if x.rank() > 2 && x.is_contiguous() => {
            let mut dims = x.dims().to_vec();
            dims[x.rank() - 1] = weight.dim(0)?;
            product(&x.reshape(((), inputs))?, weight)?.reshape(dims)
        }
        [ref batch @ .., _, _] => x.matmul(&weight.broadcast_left(batch)?.t()?),
        _ => x.matmul(&weight.t()?),
    }
}
