//! Softmax attention composed of candle's operations, which have gradients on every device.

use candle_core::{DType, Result, Tensor};

use super::sink_of_queries;
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
