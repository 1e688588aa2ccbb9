//! A projection whose weights are stored in blocks of integers: `y = x Wᵀ + b`.

mod blocks;
mod cpu;
mod matrix;
mod rows;

use candle_core::{DType, Tensor};

pub use self::matrix::QuantizedMatrix;

use crate::backend::cpu::view::cpu_slice;
use crate::backend::dispatch::on_cpu;
use crate::backend::graph::with_contiguous_rows;
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// Projects the last dimension of `x` by quantised weights: `x weightᵀ + bias`, without writing the weights to memory in
/// f32.
///
/// * `x`: `[.., I]`, f32, f16 or bf16, on the CPU.
/// * `weight`: `[O, I]`.
/// * `bias`: `[O]`, in any floating-point dtype.
///
/// Returns `[.., O]` in the dtype of `x`.
///
/// Up to 39 rows of `x` are multiplied by the integers of the blocks. The activations are rounded to 16-bit integers with one
/// scale per 32 elements, the greatest magnitude of the 32 divided by 32767, so that a product differs from that of the
/// dequantised weights by at most 2⁻¹⁶ of that magnitude per element, about the rounding of a sum in f32. Sums within a block
/// are exact integers, and those over the blocks are one chain of fused multiply-adds in f32. More rows are multiplied by
/// weights that are dequantised to f32, 64 outputs at a time. Both give the same bits for every instruction set and
/// any number of threads, and a row has the same result for any other rows beside it, as long as their number is on the same
/// side of 40. A row of `x` with a NaN or an infinity gives results that are not finite.
///
/// # Errors
/// [`Error::Invalid`] if `x` is a scalar, or its last dimension is not that of `weight`; [`Error::Unsupported`] for f64, for
/// another device, and if a gradient of `x` or `bias` would be needed: use [`linear`](crate::linear) with
/// [`QuantizedMatrix::dequantize`] there.
///
/// # Examples
/// ```
/// use candle_core::quantized::{GgmlDType, QTensor};
/// use candle_core::{Device, Tensor};
/// use gd_kernels::{QuantizedMatrix, quantized_linear};
///
/// let weight = Tensor::arange(0f32, 64.0, &Device::Cpu)?.reshape((2, 32))?;
/// let stored = QTensor::quantize(&weight, GgmlDType::Q8_0)?;
/// let matrix = QuantizedMatrix::new(GgmlDType::Q8_0, [2, 32], &stored.data()?)?;
/// let x = Tensor::ones((1, 32), candle_core::DType::F32, &Device::Cpu)?;
/// let y = quantized_linear(&x, &matrix, None)?.to_vec2::<f32>()?;
/// // The sums of the weights are 496 and 1520; each of 32 quantised weights is off by at most 63 / 127 / 2.
/// assert!((y[0][0] - 496.0).abs() < 8.0 && (y[0][1] - 1520.0).abs() < 8.0, "{y:?}");
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn quantized_linear(x: &Tensor, weight: &QuantizedMatrix, bias: Option<&Tensor>) -> Result<Tensor> {
    let [y] = quantized_linears(x, [(weight, bias)])?;
    Ok(y)
}

/// Projects the last dimension of `x` by several quantised weights, each with a bias or none: the results of
/// [`quantized_linear`], with the same bits. The rows of `x` are rounded once, and up to 39 of them are multiplied by all
/// weights in one parallel loop, so that the threads wait for one another once and not for each weight.
///
/// # Errors
/// As [`quantized_linear`].
///
/// # Examples
/// ```
/// use candle_core::quantized::GgmlDType;
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{QuantizedMatrix, quantized_linears};
///
/// let zeros = |rows: usize| QuantizedMatrix::new(GgmlDType::Q8_0, [rows, 32], &vec![0; rows * 34]);
/// let (a, b) = (zeros(2)?, zeros(3)?);
/// let x = Tensor::ones((1, 32), DType::F32, &Device::Cpu)?;
/// let [y, z] = quantized_linears(&x, [(&a, None), (&b, None)])?;
/// assert_eq!((y.dims(), z.dims()), (&[1, 2][..], &[1, 3][..]));
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn quantized_linears<const N: usize>(
    x: &Tensor,
    projections: [(&QuantizedMatrix, Option<&Tensor>); N],
) -> Result<[Tensor; N]> {
    let _span = operator_span("quantized_linear", Pass::Forward);
    for (weight, bias) in projections {
        validate(x, weight, bias)?;
    }
    let weights = projections.map(|(weight, _)| weight);
    let rows: usize = x.dims().iter().rev().skip(1).product();
    let x32 = x.to_dtype(DType::F32)?;
    let products = match rows < cpu::MIN_DEQUANTIZED_ROWS {
        true => {
            let x32 = with_contiguous_rows(&x32)?;
            let (storage, layout) = x32.storage_and_layout();
            cpu::multiply(&rows::Rows16::new(&storage, layout)?, &weights)
        }
        false => {
            let x32 = x32.contiguous()?;
            let (storage, layout) = x32.storage_and_layout();
            let (from, to) = layout.contiguous_offsets().unwrap_or_default();
            let x = &cpu_slice::<f32>(&storage)?[from..to];
            weights.iter().map(|weight| cpu::multiply_dequantized(x, weight)).collect()
        }
    };
    let finish = |(y, (weight, bias)): (Vec<f32>, (&QuantizedMatrix, Option<&Tensor>))| -> Result<_> {
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = weight.dims()[0];
        }
        let y = Tensor::from_vec(y, shape, x.device())?;
        let y = match bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(DType::F32)?)?,
            None => y,
        };
        Ok(y.to_dtype(x.dtype())?)
    };
    let products = products.into_iter().zip(projections).map(finish).collect::<Result<Vec<_>>>()?;
    let Ok(products) = products.try_into() else { unreachable!("a product for each weight") };
    Ok(products)
}

/// Checks the arguments of a projection.
fn validate(x: &Tensor, weight: &QuantizedMatrix, bias: Option<&Tensor>) -> Result<()> {
    if x.dims().last() != Some(&weight.dims()[1]) {
        return Err(Error::Invalid(format!(
            "quantized_linear: the last dimension of x {:?} is not that of the weight {:?}",
            x.dims(),
            weight.dims()
        )));
    }
    if !on_cpu(x.device()) || !matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::Unsupported(format!(
            "quantized_linear: x in {:?} on {:?}; f32, f16 and bf16 on the CPU are supported",
            x.dtype(),
            x.device().location()
        )));
    }
    if x.track_op() || bias.is_some_and(Tensor::track_op) {
        return Err(Error::Unsupported(
            "quantized_linear: gradients; linear with dequantised weights has them".into(),
        ));
    }
    Ok(())
}
