//! The norm of all gradients, gradient clipping, and accumulation.

use candle_core::Var;
use candle_core::backprop::GradStore;
use gd_kernels::adamw::GradientSquares;

use crate::error::{Error, Result};

/// The Euclidean norm of all gradients together. It has the same bits for any number of threads, and is not finite if a
/// gradient is not. Summed in f64 on the CPU and in f32 on a GPU.
///
/// # Errors
/// A gradient that is not of floats.
pub fn global_norm(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    match squares(vars, grads)? {
        Some((squares, _)) => Ok(squares.norm()?),
        None => Ok(0.0),
    }
}

/// The sums of squares of all gradients, and the names of their parameters; both sorted by name. `None` if no parameter
/// has a gradient.
///
/// # Errors
/// A gradient that is not of floats.
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

/// The name of the first parameter, in the order of the names, whose gradient is not finite.
///
/// # Errors
/// As [`global_norm`].
pub fn not_finite<'a>(vars: &'a [(String, Var)], grads: &GradStore) -> Result<Option<&'a str>> {
    let Some((squares, names)) = squares(vars, grads)? else { return Ok(None) };
    Ok(squares.first_not_finite()?.map(|at| names[at]))
}

/// The factor `min(1, max_norm / norm)` of gradients in gradient clipping.
///
/// # Errors
/// A norm that is not finite, or a maximum that is not above 0.
pub fn clip_scale(norm: f64, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 || !norm.is_finite() {
        return Err(Error::Invalid(format!("a gradient of norm {norm} cannot be clipped to {max_norm}")));
    }
    Ok(if norm > max_norm { max_norm / norm } else { 1.0 })
}

/// Adds the gradients of `vars` in `more` to those in `total` (gradient accumulation).
///
/// # Errors
/// Gradients of other shapes.
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
