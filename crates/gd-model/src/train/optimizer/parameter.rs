//! Shared by the optimizers: named parameters, master weights, and saved state.
//!
//! A bf16 or f16 parameter is the rounding of an f32 master weight; other parameters have none.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor, Var};

use crate::error::{Error, Result};

/// The parameters sorted by name.
///
/// # Errors
/// A duplicate name, or a parameter that is not of floats.
pub(super) fn named(mut vars: Vec<(String, Var)>) -> Result<Vec<(String, Var)>> {
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = vars.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::Invalid(format!("the parameter name {} is given twice", pair[0].0)));
    }
    match vars.iter().find(|(_, var)| !var.dtype().is_float()) {
        Some((name, var)) => {
            Err(Error::Invalid(format!("{name}: a parameter of dtype {:?} cannot be updated", var.dtype())))
        }
        None => Ok(vars),
    }
}

/// The dtype in which a parameter is updated.
pub(super) fn wide_dtype(var: &Var) -> DType {
    if var.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The parameter in [`wide_dtype`], detached.
pub(super) fn wide_weight(var: &Var, master: Option<&Tensor>) -> Result<Tensor> {
    match master {
        Some(master) => Ok(master.clone()),
        None => Ok(var.as_detached_tensor().to_dtype(wide_dtype(var))?),
    }
}

/// Sets a parameter, and its master weight if it has one.
pub(super) fn set_wide(var: &Var, master: &mut Option<Tensor>, new: Tensor) -> Result<()> {
    var.set(&new.to_dtype(var.dtype())?)?;
    if let Some(master) = master {
        *master = new;
    }
    Ok(())
}

/// Fails for a learning rate or scale with which an update is not finite.
pub(super) fn check_step(lr: f64, scale: f64) -> Result<()> {
    if lr >= 0.0 && lr.is_finite() && scale.is_finite() {
        return Ok(());
    }
    Err(Error::Invalid(format!("no update is possible with learning rate {lr} and scale {scale}")))
}

/// Fails for a gradient of another shape or dtype than its parameter.
pub(super) fn check_gradient(name: &str, var: &Var, grad: &Tensor) -> Result<()> {
    if grad.dims() == var.dims() && grad.dtype() == var.dtype() {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{name}: the gradient is {:?} {:?}, the parameter {:?} {:?}",
        grad.dtype(),
        grad.dims(),
        var.dtype(),
        var.dims()
    )))
}

/// Removes the tensor `NAME.KIND` from a saved state.
///
/// # Errors
/// A tensor that is missing, or of another shape or dtype.
pub(super) fn take(
    state: &mut BTreeMap<String, Tensor>,
    name: &str,
    kind: &str,
    dtype: DType,
    dims: &[usize],
) -> Result<Tensor> {
    let key = format!("{name}.{kind}");
    let tensor =
        state.remove(&key).ok_or_else(|| Error::Invalid(format!("the optimizer state has no {key}")))?;
    if tensor.dtype() == dtype && tensor.dims() == dims {
        return Ok(tensor);
    }
    Err(Error::Invalid(format!(
        "the optimizer state has {key} as {:?} {:?}, but the parameter needs {dtype:?} {dims:?}",
        tensor.dtype(),
        tensor.dims()
    )))
}

/// Fails for a saved state with tensors that were not taken from it.
pub(super) fn nothing_left(state: &BTreeMap<String, Tensor>) -> Result<()> {
    match state.keys().next() {
        Some(key) => Err(Error::Invalid(format!("the optimizer state has {key}, which no parameter needs"))),
        None => Ok(()),
    }
}
