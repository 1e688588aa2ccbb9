//! The norm of all gradients, clipping by it, and accumulation.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Tensor, Var};
use gd_kernels::adamw::{Limits, Squares};
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

/// The squares of all gradients on a GPU, with the parameters' names in the same order; none without a gradient.
///
/// # Errors
/// A gradient of a dtype that has no norm there.
pub fn squares<'a>(vars: &'a [(String, Var)], grads: &GradStore) -> Result<Option<(Squares, Vec<&'a str>)>> {
    let given = |(name, var): &'a (String, Var)| Some((name.as_str(), grads.get(var)?));
    let (names, tensors): (Vec<_>, Vec<_>) = vars.iter().filter_map(given).unzip();
    match tensors.is_empty() {
        true => Ok(None),
        false => Ok(Some((Squares::new(&tensors)?, names))),
    }
}

/// The same off the CPU, where one number comes to the host instead of one for each parameter.
fn norm_on_device(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    let Some((squares, _)) = squares(vars, grads)? else { return Ok(0.0) };
    let none = Tensor::zeros(1, DType::F32, vars[0].1.device())?;
    let limits = Limits { weight: 1.0, clip: 1.0, loss: f32::INFINITY, norm: f32::INFINITY };
    Ok(f64::from(squares.verdict(&none, &limits)?.read()?.norm))
}

/// The first parameter whose gradient is not finite.
///
/// # Errors
/// As [`global_norm`].
pub fn not_finite<'a>(vars: &'a [(String, Var)], grads: &GradStore) -> Result<Option<&'a str>> {
    if let Some((_, var)) = vars.first()
        && !on_cpu(var.device())
    {
        let Some((squares, names)) = squares(vars, grads)? else { return Ok(None) };
        return Ok(squares.not_finite()?.map(|at| names[at]));
    }
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
