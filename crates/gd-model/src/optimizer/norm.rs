//! The norm of all gradients, clipping by it, and accumulation.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, Tensor, Var};
use gd_kernels::on_cpu;
use rayon::prelude::*;

use super::parameter::PIECE;
use crate::error::{Error, Result};

/// Euclidean norm of all gradients together, in f64, the same for any number of threads; not finite if one
/// of them is not.
///
/// # Errors
/// A gradient of a dtype that has no norm.
pub fn global_norm(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    if let Some((_, var)) = vars.first()
        && !on_cpu(var.device())
    {
        return norm_on_device(vars, grads);
    }
    let mut squares = BTreeMap::new();
    for (name, var) in vars {
        if let Some(grad) = grads.get(var) {
            squares.insert(name, square_sum(grad)?);
        }
    }
    Ok(squares.values().sum::<f64>().sqrt())
}

/// The same off the CPU, where one number comes to the host instead of one for each parameter.
fn norm_on_device(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    let squares = vars.iter().filter_map(|(_, var)| grads.get(var)).map(|t| squares(t)?.reshape(1));
    let squares = squares.collect::<candle_core::Result<Vec<_>>>()?;
    if squares.is_empty() {
        return Ok(0.0);
    }
    Ok(on_host(&Tensor::cat(&squares, 0)?)?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// On the host in f64, which Metal does not have.
fn on_host(t: &Tensor) -> candle_core::Result<Tensor> {
    t.to_device(&Device::Cpu)?.to_dtype(DType::F64)
}

/// The sum of squares by tensor operations, in f32 (f64 for f64).
fn squares(t: &Tensor) -> candle_core::Result<Tensor> {
    // Squares of half-precision numbers overflow in their own dtype.
    let wide = if t.dtype() == DType::F64 { t.clone() } else { t.to_dtype(DType::F32)? };
    wide.detach().sqr()?.sum_all()
}

/// The first parameter whose gradient is not finite.
///
/// # Errors
/// As [`global_norm`].
pub fn not_finite<'a>(vars: &'a [(String, Var)], grads: &GradStore) -> Result<Option<&'a str>> {
    for (name, var) in vars {
        if let Some(grad) = grads.get(var)
            && !square_sum(grad)?.is_finite()
        {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn square_sum(t: &Tensor) -> Result<f64> {
    if !on_cpu(t.device()) {
        return Ok(on_host(&squares(t)?)?.to_scalar()?);
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return Err(Error::Invalid("a CPU tensor without CPU storage".into()));
    };
    let range = layout.start_offset()..layout.start_offset() + t.elem_count();
    match storage {
        CpuStorage::F32(x) => Ok(sum_pieces(&x[range], f64::from)),
        CpuStorage::F64(x) => Ok(sum_pieces(&x[range], |x| x)),
        CpuStorage::BF16(x) => Ok(sum_pieces(&x[range], half::bf16::to_f64)),
        CpuStorage::F16(x) => Ok(sum_pieces(&x[range], half::f16::to_f64)),
        _ => Err(Error::Invalid(format!("a gradient of dtype {:?} has no norm", t.dtype()))),
    }
}

/// Sum of squares: within a piece in order, then over the pieces in order.
fn sum_pieces<T: Copy + Sync>(x: &[T], wide: impl Fn(T) -> f64 + Sync) -> f64 {
    let piece = |x: &[T]| x.iter().map(|&x| wide(x) * wide(x)).sum::<f64>();
    x.par_chunks(PIECE).map(piece).collect::<Vec<_>>().iter().sum()
}

/// The factor that brings a gradient of this norm down to `max_norm`; 1 where it is no longer than that.
pub fn clip_scale(norm: f64, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 || !norm.is_finite() {
        return Err(Error::Invalid(format!("a gradient of norm {norm} cannot be clipped to {max_norm}")));
    }
    Ok(if norm > max_norm { max_norm / norm } else { 1.0 })
}

/// Adds the gradients of `vars` in `more` to those in `total`, for batches in several parts.
pub fn accumulate(vars: &[(String, Var)], total: &mut GradStore, more: &GradStore) -> Result<()> {
    for (_, var) in vars {
        if let Some(grad) = more.get(var) {
            let sum = match total.get(var) {
                Some(sum) => (sum + grad)?.detach(),
                None => grad.clone(),
            };
            total.insert(var, sum);
        }
    }
    Ok(())
}
