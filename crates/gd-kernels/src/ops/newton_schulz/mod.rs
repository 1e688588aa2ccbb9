//! Approximate orthogonalization of a matrix by Newton–Schulz iterations, the step of the optimizer Muon.

use candle_core::{DType, Tensor};

use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;

/// The coefficients (a, b, c) of the polynomial `a x + b x³ + c x⁵` of Jordan et al. (Muon, 2024).
const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// The number of iterations.
const ITERATIONS: usize = 5;

/// The orthogonal factor `U Vᵀ` of a matrix `x = U S Vᵀ`, approximately: five iterations of
/// `X ← a X + (b X Xᵀ + c (X Xᵀ)²) X` from `x / ‖x‖` (Jordan et al., Muon, 2024).
///
/// * `x`: `[rows, columns]`, f64, f32, f16 or bf16.
///
/// Returns a matrix of the shape and dtype of `x`. Its singular values lie within 0.68..1.21 where
/// those of `x` are at least 0.002 of its Frobenius norm. The result for a matrix of zeros is zeros.
///
/// # Errors
/// A tensor that is not a matrix of floats.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[3f64, 0.0], [0.0, 2.0]], &Device::Cpu)?;
/// let y = gd_kernels::newton_schulz(&x)?.to_vec2::<f64>()?;
/// assert!((y[0][0] - 1.0).abs() < 0.4 && (y[1][1] - 1.0).abs() < 0.4);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn newton_schulz(x: &Tensor) -> Result<Tensor> {
    let _span = operator_span("newton_schulz", Pass::Forward);
    let (rows, columns) = x.dims2()?;
    // Metal has no f64.
    let wide = if x.device().is_metal() { DType::F32 } else { DType::F64 };
    let norm = x.to_dtype(wide)?.sqr()?.sum_all()?.sqrt()?;
    // The product X Xᵀ is smaller with the shorter side as rows.
    let mut y = if rows > columns { x.t()?.contiguous()? } else { x.clone() };
    if on_cpu(x.device()) {
        let norm = norm.to_scalar::<f64>()?;
        if norm == 0.0 {
            return Ok(x.clone());
        }
        y = (y / norm)?;
    } else {
        // The host does not wait for the norm. The lower bound keeps zeros at zero.
        y = y.broadcast_div(&norm.maximum(f64::from(f32::MIN_POSITIVE))?.to_dtype(y.dtype())?)?;
    }
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let square = y.matmul(&y.t()?)?;
        let factor = ((&square * b)? + (square.matmul(&square)? * c)?)?;
        y = ((&y * a)? + factor.matmul(&y)?)?;
    }
    Ok(if rows > columns { y.t()?.contiguous()? } else { y })
}
