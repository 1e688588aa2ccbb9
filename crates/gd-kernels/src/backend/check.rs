//! Checks of arguments that several operators share.

use candle_core::{DType, Tensor};

use crate::backend::cpu::element::Real;
use crate::backend::dispatch::on_cpu;
use crate::error::{Error, Result};

/// The four dimensions of an operator's tensor, none of them 0.
pub(crate) fn dims4(name: &str, t: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *t.dims() {
        [b, h, n, d] if b * h * n * d > 0 => Ok((b, h, n, d)),
        [_, _, _, _] => Err(Error::Invalid(format!("{name} {:?} is empty", t.dims()))),
        _ => Err(Error::Invalid(format!("{name} {:?} is not of rank 4 [batch, heads, rows, dim]", t.dims()))),
    }
}

/// Refuses keys or values of another dtype than the queries q. On the CPU, those of a cache may be in f16 or bf16 where q is
/// in f32. `op` names the operator.
pub(crate) fn check_stored(op: &str, q: &Tensor, name: &str, stored: &Tensor) -> Result<()> {
    let (dtype, half) = (q.dtype(), [DType::F16, DType::BF16].contains(&stored.dtype()));
    if stored.dtype() == dtype || half && dtype == DType::F32 && on_cpu(q.device()) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{op}: q is {dtype:?}, {name} is {:?}; they have one dtype, but on the CPU keys and values may be F16 or BF16 where \
         q is F32",
        stored.dtype()
    )))
}

/// Refuses gradients through keys and values of another dtype than the queries.
pub(crate) fn refuse_mixed_gradients(
    op: &str,
    [q, k, v]: [&Tensor; 3],
    others: &[Option<&Tensor>],
) -> Result<()> {
    let dtypes = [q, k, v].map(Tensor::dtype);
    let tracked = || [q, k, v].into_iter().chain(others.iter().copied().flatten()).any(Tensor::track_op);
    if dtypes.iter().any(|dtype| *dtype != dtypes[0]) && tracked() {
        let [q, k, v] = dtypes;
        return Err(Error::Invalid(format!(
            "{op}: q, k and v are {q:?}, {k:?} and {v:?}; only tensors of one dtype have gradients"
        )));
    }
    Ok(())
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
