//! Softmax attention with a backward pass. On the CPU neither pass stores the matrix of scores.

mod composed;
mod cpu;

use candle_core::{DType, Tensor};

use crate::backend::check::{check_stored, refuse_mixed_gradients};
use crate::backend::dispatch::on_cpu;
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};
use crate::mask::Mask;

/// The most query rows for the keys of a head, as in a decoding step, for which the keys are not copied into blocks: that
/// would take longer than the products.
const MAX_DECODE_ROWS: usize = 8;

/// Softmax attention, `y_i = sum_j exp(s_ij) v_j / (exp(sink) + sum_j exp(s_ij))` over the keys j that query i sees, with
/// `s_ij = scale <q_i, k_j> + prior_j` (Vaswani et al., arXiv 1706.03762).
///
/// * `q`: `[B, Hq, N, D]`, `k`: `[B, Hk, M, D]`, `v`: `[B, Hk, M, Dv]`, in f64, f32, f16 or bf16; Hk divides Hq. On the
///   CPU, without gradients, k and v may both be in f16 or bf16 where q is in f32, as in a cache. The result is that for k
///   and v widened to f32, to the bit.
/// * `prior`: `[B, Hk, M]`, added to the scores of a key; -inf excludes it.
/// * `sink`: `[Hq]`, or `[B, Hq, N]` for every query its own, the score of an additional key whose value is 0 (Xiao et
///   al., arXiv 2309.17453); without it the weights of a query sum to 1.
/// * `mask`: which of the M keys each of the N queries sees.
/// * `scale`: the factor of the dot products, usually `1 / sqrt(D)`.
///
/// Returns `[B, Hq, N, Dv]` in the dtype of `q`; 0 for a query that sees no key. All tensors get gradients.
///
/// On the CPU this is the algorithm of FlashAttention (Dao et al., arXiv 2205.14135): blocks of scores are computed,
/// normalised by a running maximum and discarded, and the backward pass computes them again, so that the memory is
/// O(N + M) for each head. For a few queries, as in a decoding step, keys and values are read in place and divided
/// among threads; their backward pass, and a few queries in f64, are a composition of candle's operations, which stores
/// N x M weights, as everything is on a GPU. The results do not depend on the number of threads.
///
/// # Errors
/// [`Error::Invalid`] for shapes and dtypes that do not fit, [`Error::Unsupported`] for another dtype.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{Mask, softmax_attention};
///
/// let q = Tensor::zeros((1, 2, 3, 4), DType::F32, &Device::Cpu)?;
/// let k = Tensor::zeros((1, 1, 3, 4), DType::F32, &Device::Cpu)?;
/// let v = Tensor::new(&[[[[1f32], [3.0], [8.0]]]], &Device::Cpu)?;
/// let y = softmax_attention(&q, &k, &v, None, None, &Mask::causal(0), 0.5)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn softmax_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    prior: Option<&Tensor>,
    sink: Option<&Tensor>,
    mask: &Mask,
    scale: f64,
) -> Result<Tensor> {
    let _span = operator_span("softmax_attention", Pass::Forward);
    let sizes = Sizes::new(q, k, v, prior, sink)?;
    mask.validate(sizes.batch, sizes.keys)?;
    refuse_mixed_gradients("softmax attention", [q, k, v], &[prior, sink])?;
    let decodes = sizes.rows() <= MAX_DECODE_ROWS;
    if !on_cpu(q.device()) || decodes && q.dtype() == DType::F64 {
        return Ok(composed::softmax_attention(q, k, v, prior, sink, mask, scale)?);
    }
    let problem = cpu::Problem { sizes, mask: mask.clone(), scale };
    if decodes {
        let y = cpu::decode::softmax_attention([q, k, v], prior, sink, &problem)?;
        let tracked = [Some(q), Some(k), Some(v), prior, sink].into_iter().flatten().any(Tensor::track_op);
        if tracked && y.elem_count() > 0 {
            return Ok(composed::with_gradients(&y, [q, k, v], prior, sink, mask, scale)?);
        }
        return Ok(y);
    }
    // candle's operators have at most three arguments with gradients: the sink of a query and the prior of a key are one
    // more element of their rows.
    let q = match sink {
        Some(sink) => {
            let dims = (sizes.batch, sizes.q_heads, sizes.queries, 1);
            let sink = sink_of_queries(sink)?.to_dtype(q.dtype())?.broadcast_as(dims)?;
            Tensor::cat(&[q, &sink], 3)?
        }
        None => q.clone(),
    };
    if k.dtype() != q.dtype() {
        return cpu::softmax_attention_of_stored([&q, k, v], prior, &problem);
    }
    let k = match prior {
        Some(prior) => Tensor::cat(&[k, &prior.to_dtype(k.dtype())?.unsqueeze(3)?], 3)?,
        None => k.clone(),
    };
    cpu::softmax_attention([&q, &k, v], problem)
}

/// A sink as a column beside the scores, `[1, Hq, 1, 1]` or `[B, Hq, N, 1]`.
fn sink_of_queries(sink: &Tensor) -> candle_core::Result<Tensor> {
    match sink.rank() {
        1 => sink.reshape((1, (), 1, 1)),
        _ => sink.unsqueeze(3),
    }
}

/// The sizes of a problem.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
    value_dim: usize,
    has_prior: bool,
    has_sink: bool,
}

impl Sizes {
    fn new(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        prior: Option<&Tensor>,
        sink: Option<&Tensor>,
    ) -> Result<Self> {
        let invalid = |what: String| Err(Error::Invalid(format!("softmax attention: {what}")));
        let (b, hq, n, d) = q.dims4()?;
        let ((bk, hk, m, dk), (bv, hv, mv, dv)) = (k.dims4()?, v.dims4()?);
        if (b, d) != (bk, dk) || (bk, hk, m) != (bv, hv, mv) || hk == 0 || hq % hk != 0 {
            return invalid(format!("q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims()));
        }
        check_stored("softmax attention", q, "k", k)?;
        if k.dtype() != v.dtype() {
            return invalid(format!("k and v are {:?} and {:?}", k.dtype(), v.dtype()));
        }
        match prior {
            Some(prior) if prior.dims() != [b, hk, m] => {
                return invalid(format!("the prior is {:?}, not {:?}", prior.dims(), [b, hk, m]));
            }
            _ => {}
        }
        match sink {
            Some(sink) if sink.dims() != [hq] && sink.dims() != [b, hq, n] => {
                return invalid(format!("the sink is {:?}, not {:?} or {:?}", sink.dims(), [hq], [b, hq, n]));
            }
            _ => {}
        }
        Ok(Self {
            batch: b,
            q_heads: hq,
            kv_heads: hk,
            queries: n,
            keys: m,
            head_dim: d,
            value_dim: dv,
            has_prior: prior.is_some(),
            has_sink: sink.is_some(),
        })
    }

    /// Query rows that share the keys of a head: those of all its query heads.
    fn rows(&self) -> usize {
        self.q_heads / self.kv_heads * self.queries
    }

    /// The length of a row of q, with the sink.
    fn q_row(&self) -> usize {
        self.head_dim + usize::from(self.has_sink)
    }

    /// The length of a row of k, with the prior.
    fn k_row(&self) -> usize {
        self.head_dim + usize::from(self.has_prior)
    }
}
