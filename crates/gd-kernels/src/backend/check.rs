//! Checks of arguments that several operators share.

use candle_core::Tensor;

use crate::backend::cpu::element::Real;
use crate::error::{Error, Result};

/// The four dimensions of an operator's tensor, none of them 0.
pub(crate) fn dims4(name: &str, t: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *t.dims() {
        [b, h, n, d] if b * h * n * d > 0 => Ok((b, h, n, d)),
        [_, _, _, _] => Err(Error::Invalid(format!("{name} {:?} is empty", t.dims()))),
        _ => Err(Error::Invalid(format!("{name} {:?} is not of rank 4 [batch, heads, rows, dim]", t.dims()))),
    }
}

/// Refuses a per-head parameter that is not `[heads]`.
pub(crate) fn check_head(name: &str, t: &Tensor, heads: usize) -> Result<()> {
    match t.dims() == [heads] {
        true => Ok(()),
        false => {
            Err(Error::Invalid(format!("{name} {:?} is not [{heads}], one value per query head", t.dims())))
        }
    }
}

/// A per-head parameter `[heads]` as accumulators, without its gradient.
pub(crate) fn head_values<A: Real>(name: &str, t: &Tensor, heads: usize) -> Result<Vec<A>> {
    check_head(name, t, heads)?;
    Ok(t.detach().to_dtype(A::DTYPE)?.to_vec1()?)
}

/// Refuses a per-head parameter that is not finite and positive.
pub(crate) fn positive<A: Real>(name: &str, values: &[A]) -> Result<()> {
    match values.iter().position(|x| !(x.is_finite() && *x > A::zero())) {
        Some(h) => Err(Error::Invalid(format!("{name} of head {h} is {}, not finite and > 0", values[h]))),
        None => Ok(()),
    }
}
