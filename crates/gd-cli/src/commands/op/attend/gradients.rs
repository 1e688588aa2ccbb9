//! The gradients of a case.

use anyhow::Result;
use candle_core::{Tensor, Var};
use gd_model::io::safetensors::Tensors;

use super::source::Source;

/// The gradient of `loss` for every variable X, as `dX` with the prefix of the case. That of an input that does not enter the
/// loss is 0.
pub(super) fn gradients(source: &Source, loss: &Tensor, variables: &[(&str, Var)]) -> Result<Tensors> {
    let gradients = loss.backward()?;
    let of = |(name, var): &(&str, Var)| {
        let gradient = gradients.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
        Ok((source.own_name(&format!("d{name}")), gradient))
    };
    variables.iter().map(of).collect()
}
