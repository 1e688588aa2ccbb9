//! Softmax attention composed of candle's operations, which have gradients on every device.

use candle_core::{DType, Result, Tensor, Var};

use super::sink_of_queries;
use crate::backend::graph::with_backward;
use crate::mask::Mask;
use crate::ops::masked_softmax::masked_softmax;

/// [`softmax_attention`](super::softmax_attention) for validated tensors.
pub(super) fn softmax_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    prior: Option<&Tensor>,
    sink: Option<&Tensor>,
    mask: &Mask,
    scale: f64,
) -> Result<Tensor> {
    let (b, hq, n, d) = q.dims4()?;
    let (hk, m) = (k.dim(1)?, k.dim(2)?);
    let group = hq / hk;
    // The heads of a group share keys: fold them into the rows of one product.
    let q = (q.contiguous()? * scale)?.reshape((b, hk, group * n, d))?;
    let scores = q.matmul(&batch_of_matrices(k)?.t()?)?;
    let scores = match prior {
        Some(prior) => scores.broadcast_add(&prior.unsqueeze(2)?)?,
        None => scores,
    };
    let scores = scores.reshape((b, hq, n, m))?;
    let weights = masked_softmax(&scores, mask)?;
    let v = batch_of_matrices(v)?;
    let y = weights.reshape((b, hk, group * n, m))?.matmul(&v)?.reshape((b, hq, n, v.dim(3)?))?;
    match sink {
        Some(sink) => y.broadcast_mul(&share_of_keys(&scores, &weights, sink)?),
        None => Ok(y),
    }
}

/// `y`, the result of [`softmax_attention`] without gradients, as a function of its tensors, with the gradients of the
/// composition, which is computed again in the backward pass.
pub(super) fn with_gradients(
    y: &Tensor,
    [q, k, v]: [&Tensor; 3],
    prior: Option<&Tensor>,
    sink: Option<&Tensor>,
    mask: &Mask,
    scale: f64,
) -> Result<Tensor> {
    let (mask, has_prior) = (mask.clone(), prior.is_some());
    let same_dtype = |t: &Tensor| t.to_dtype(q.dtype());
    let others = prior.into_iter().chain(sink).map(same_dtype).collect::<Result<Vec<_>>>()?;
    let inputs: Vec<&Tensor> = [q, k, v].into_iter().chain(&others).collect();
    with_backward("softmax-attention", &inputs, y, move |tensors, dy| {
        let leaves = tensors.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let [q, k, v, others @ ..] = leaves.as_slice() else { unreachable!("three tensors and more") };
        let (prior, sink) = if has_prior { (others.first(), others.get(1)) } else { (None, others.first()) };
        let y = softmax_attention(q, k, v, prior.map(|t| &**t), sink.map(|t| &**t), &mask, scale)?;
        let gradients = (y * dy)?.sum_all()?.backward()?;
        let of = |leaf: &Var| gradients.get(leaf).map_or_else(|| leaf.zeros_like(), |grad| Ok(grad.clone()));
        leaves.iter().map(of).collect()
    })
}

/// `t` in a layout that a batched product reads without a copy: itself where the matrices are contiguous and evenly
/// spaced, as in a cache with capacity for more positions, or else a contiguous copy.
fn batch_of_matrices(t: &Tensor) -> Result<Tensor> {
    let (dims, stride) = (t.dims(), t.stride());
    let even = stride[3] == 1 && (dims[0] == 1 || stride[0] == dims[1] * stride[1]);
    if even && stride[2] == dims[3] { Ok(t.clone()) } else { t.contiguous() }
}

/// The weight that all keys have together beside a sink: `sigmoid(logsumexp(scores) - sink)`.
///
/// The logarithm of the sum follows from the score s and the weight w of one key, `s - ln(w)`.
fn share_of_keys(scores: &Tensor, weights: &Tensor, sink: &Tensor) -> Result<Tensor> {
    // A query without keys has no weight, and its output is 0 whatever its share is.
    let least = if scores.dtype() == DType::F16 { 1e-7 } else { 1e-30 };
    let greatest = weights.detach().argmax_keepdim(3)?;
    let total = (scores.gather(&greatest, 3)? - (weights.gather(&greatest, 3)? + least)?.log()?)?;
    let sink = sink_of_queries(sink)?.to_dtype(scores.dtype())?;
    let half = (total.broadcast_sub(&sink)? * 0.5)?;
    (half.tanh()? + 1.0)? * 0.5
}
