//! Operations on the rows of scores `[.., N, M]` with a set of keys, u8 in the same shape.

use candle_core::{D, DType, Result, Tensor};

/// A tensor of this value in the shape, dtype and device of `like`.
pub(super) fn constant(value: f64, like: &Tensor) -> Result<Tensor> {
    Tensor::full(value as f32, like.shape(), like.device())?.to_dtype(like.dtype())
}

/// `values` in the set, `value` (a number that f32 represents) elsewhere. The gradient flows in the set.
pub(super) fn fill(values: &Tensor, set: &Tensor, value: f64) -> Result<Tensor> {
    set.where_cond(values, &constant(value, values)?)
}

/// The numbers of the positions 0, 1, .. of the last dimension, in the shape of `scores`.
pub(super) fn positions(scores: &Tensor) -> Result<Tensor> {
    let keys = Tensor::arange(0u32, scores.dim(D::Minus1)? as u32, scores.device())?;
    keys.to_dtype(scores.dtype())?.broadcast_as(scores.shape())?.contiguous()
}

/// The number of keys in the set of every row `[.., N, 1]`, in this dtype.
pub(super) fn count(set: &Tensor, dtype: DType) -> Result<Tensor> {
    set.to_dtype(dtype)?.sum_keepdim(D::Minus1)
}

/// The greatest score in the set of every row `[.., N, 1]`, 0 for an empty set. Without gradient.
pub(super) fn row_max(scores: &Tensor, set: &Tensor) -> Result<Tensor> {
    let greatest = fill(&scores.detach(), set, f64::NEG_INFINITY)?.max_keepdim(D::Minus1)?;
    let some = set.max_keepdim(D::Minus1)?;
    fill(&greatest, &some, 0.0)
}

/// exp(score - shift) in the set, 0 elsewhere; `shift` is `[.., N, 1]`. Scores outside the set do not matter.
pub(super) fn exp(scores: &Tensor, set: &Tensor, shift: &Tensor) -> Result<Tensor> {
    fill(&scores.broadcast_sub(shift)?, set, 0.0)?.exp()? * set.to_dtype(scores.dtype())?
}

/// The softmax over the set of every row, all 0 for an empty set. Differentiable in the scores.
pub(super) fn softmax(scores: &Tensor, set: &Tensor) -> Result<Tensor> {
    let exp = exp(scores, set, &row_max(scores, set)?)?;
    let total = exp.sum_keepdim(D::Minus1)?;
    // The sum is 0 for an empty set alone, since the greatest term is 1.
    let empty = total.detach().eq(&total.zeros_like()?)?.to_dtype(total.dtype())?;
    exp.broadcast_div(&(total + empty)?)
}

/// The logarithm of the sum of exp(score) over the set of every row `[.., N, 1]`; the set is not empty.
pub(super) fn log_sum_exp(scores: &Tensor, set: &Tensor) -> Result<Tensor> {
    let shift = row_max(scores, set)?;
    exp(scores, set, &shift)?.sum_keepdim(D::Minus1)?.log()? + shift
}

/// The intersection of two sets.
pub(super) fn both(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.broadcast_mul(b)
}

/// The union of two sets.
pub(super) fn either(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.broadcast_maximum(b)
}

/// The `k`-th greatest score in the set of every row `[.., N, 1]`, minus infinity if the set is smaller. Without
/// gradient.
pub(super) fn kth_greatest(scores: &Tensor, set: &Tensor, k: usize) -> Result<Tensor> {
    let scores = fill(&scores.detach(), set, f64::NEG_INFINITY)?;
    let k = k.min(scores.dim(D::Minus1)?);
    let (sorted, _) = scores.contiguous()?.sort_last_dim(false)?;
    sorted.narrow(D::Minus1, k - 1, 1)
}

/// The first `need` keys of the set in every row, `need` `[.., N, 1]` as a float.
pub(super) fn first_keys(set: &Tensor, need: &Tensor) -> Result<Tensor> {
    let keys = set.dim(D::Minus1)?;
    let like = need.broadcast_as(set.shape())?;
    let positions = fill(&positions(&like)?, set, keys as f64)?;
    let (sorted, _) = positions.sort_last_dim(true)?;
    let last = (need - 1.0)?.clamp(0.0, keys as f64 - 1.0)?.to_dtype(DType::U32)?.contiguous()?;
    let last = sorted.gather(&last, D::Minus1)?;
    let early = both(&positions.broadcast_le(&last)?, set)?;
    both(&early, &need.gt(&need.zeros_like()?)?)
}

/// The `k` greatest scores in the set of every row, those at the lower positions where scores tie; the whole set if it
/// is smaller.
pub(super) fn top_k(scores: &Tensor, set: &Tensor, k: usize) -> Result<Tensor> {
    let scores = scores.detach();
    let kth = kth_greatest(&scores, set, k)?;
    let greater = both(&scores.broadcast_gt(&kth)?, set)?;
    let ties = both(&scores.broadcast_eq(&kth)?, set)?;
    let need = (count(&greater, scores.dtype())?.neg()? + k as f64)?;
    either(&greater, &first_keys(&ties, &need)?)
}

/// `value` in the forward pass with the gradient of `carrier`; both in the same shape.
pub(super) fn straight_through(value: &Tensor, carrier: &Tensor) -> Result<Tensor> {
    value.detach() + (carrier - carrier.detach())?
}

/// A parameter per head `[H]` in a shape that broadcasts to scores `[.., H, N, M]`.
pub(super) fn per_head(parameter: &Tensor, scores: &Tensor) -> Result<Tensor> {
    let heads = match *scores.dims() {
        [.., heads, _, _] if parameter.dims() == [heads] => heads,
        _ => candle_core::bail!("a parameter {:?} does not fit scores {:?}", parameter.dims(), scores.dims()),
    };
    let mut shape = vec![1; scores.rank()];
    shape[scores.rank() - 3] = heads;
    parameter.to_dtype(scores.dtype())?.reshape(shape)
}
