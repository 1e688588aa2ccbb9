//! The norm of all gradients, clipping by it, and accumulation.

use candle_core::Var;
use candle_core::backprop::GradStore;
use gd_kernels::adamw::GradientSquares;

use crate::error::{Error, Result};

/// Euclidean norm of all gradients together, the same for any number of threads; not finite if one of them is not. In
/// f64 on the CPU, in f32 on a GPU, from which one number comes to the host.
///
/// # Errors
/// A gradient of a dtype that has no norm.
pub fn global_norm(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    match squares(vars, grads)? {
        Some((squares, _)) => Ok(squares.norm()?),
        None => Ok(0.0),
    }
}

/// The squares of all gradients, and the names of their parameters in the same order, which is that of the names; none
/// without a gradient.
///
/// # Errors
/// A gradient of a dtype that has no norm.
pub fn squares<'a>(
    vars: &'a [(String, Var)],
    grads: &GradStore,
) -> Result<Option<(GradientSquares, Vec<&'a str>)>> {
    let with_gradient = |(name, var): &'a (String, Var)| Some((name.as_str(), grads.get(var)?));
    let mut named: Vec<_> = vars.iter().filter_map(with_gradient).collect();
    named.sort_by_key(|(name, _)| *name);
    let (names, tensors): (Vec<_>, Vec<_>) = named.into_iter().unzip();
    match tensors.is_empty() {
        true => Ok(None),
        false => Ok(Some((GradientSquares::new(&tensors)?, names))),
    }
}

/// The first parameter, by name, whose gradient is not finite.
///
/// # Errors
/// As [`global_norm`].
pub fn not_finite<'a>(vars: &'a [(String, Var)], grads: &GradStore) -> Result<Option<&'a str>> {
    let Some((squares, names)) = squares(vars, grads)? else { return Ok(None) };
    Ok(squares.first_not_finite()?.map(|at| names[at]))
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
