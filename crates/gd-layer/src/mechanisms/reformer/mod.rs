//! The attention of the Reformer (Kitaev et al. 2020, arXiv 2001.04451): locality-sensitive hashing sorts positions into
//! buckets, and each chunk of the sorted sequence reads itself and the chunk before.

mod hashing;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::ops::softmax;
use serde::{Deserialize, Serialize};

use self::hashing::{bucket, sorted_order};
use super::definition::{Definition, Info};
use super::indices::{arange, matmul, take_rows, unit_rows, visible_softmax};
use super::inputs::{Inputs, Outputs};
use super::rows::log_sum_exp;
use super::stages::Computation;

/// The logit of a position's own key, which is therefore read only where nothing else is visible.
const OWN_KEY_LOGIT: f64 = -1e5;

/// Attention among positions with similar hashes, in several rounds that are mixed by the softmax of their log-sum-exp.
/// There is no mask of equal buckets, and a key that several rounds read is not removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reformer {
    /// Positions of a chunk, a divisor of N.
    pub chunk: usize,
    /// Whether a position reads positions at or before its own only.
    pub causal: bool,
    /// Whether the first chunk reads the last chunk of its round too, or itself alone as in the paper.
    pub wrap: bool,
}

impl Default for Reformer {
    fn default() -> Self {
        Self { chunk: 64, causal: true, wrap: false }
    }
}

impl Definition for Reformer {
    const INFO: Info = Info {
        formula: "softmax(q.k / (|k| sqrt(D))) v over the own and the previous chunk, in the order of argmax [xR; -xR]",
        source: "Kitaev et al. 2020",
        inputs: &[("qk", "[B,H,N,D], queries and keys"), ("v", "[B,H,N,Dv]")],
        constants: &[("R", "[rounds,D,buckets/2], random rotations")],
        parameters: &[
            ("chunk", "positions of a chunk, a divisor of N"),
            ("causal", "true: positions at or before the own one"),
            ("wrap", "true: the first chunk reads the last one of its round"),
        ],
        memory: "rounds x N x chunk",
        not_in_models: Some("queries and keys are one tensor"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("hash > sort > softmax within chunks > mixture of rounds", |inputs| {
            self.attend(inputs)
        })
    }

    fn validate(&self) -> Result<()> {
        match self.chunk {
            0 => bail!("chunk 0: a divisor of the number of positions expected"),
            _ => Ok(()),
        }
    }
}

impl Reformer {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let (qk, v, rotations) = (inputs.get("qk")?, inputs.get("v")?, inputs.get("R")?);
        let (_, _, n, d) = qk.dims4()?;
        let (rounds, width, _) = rotations.dims3()?;
        if v.rank() != 4 || v.dims()[..3] != qk.dims()[..3] || width != d || rounds == 0 {
            let (qk, v, rotations) = (qk.dims(), v.dims(), rotations.dims());
            bail!(
                "qk {qk:?}, v {v:?}, R {rotations:?}: [B,H,N,D], [B,H,N,Dv] and [rounds,D,buckets/2] expected"
            );
        }
        if n % self.chunk != 0 {
            bail!("chunk {}: a divisor of the {n} positions expected", self.chunk);
        }
        let (mut outs, mut lses, mut buckets) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            let bucket = bucket(qk, &rotations.get(round)?)?;
            let order = sorted_order(&bucket)?;
            let (out, lse) = self.sorted_attention(qk, v, &order)?;
            let place = order.arg_sort_last_dim(true)?;
            outs.push(take_rows(&out, &place)?);
            lses.push(take_rows(&lse, &place)?);
            buckets.push(bucket);
        }
        let lse = Tensor::stack(&lses, 0)?;
        let mut outputs = Outputs::default();
        outputs.insert("out", Tensor::stack(&outs, 0)?.broadcast_mul(&softmax(&lse, 0)?)?.sum(0)?);
        outputs.insert("lse", lse.squeeze(D::Minus1)?);
        outputs.insert("bucket", Tensor::stack(&buckets, 0)?.to_dtype(DType::I64)?);
        Ok(outputs)
    }

    /// Attention of one round: output `[B, H, N, Dv]` and log-sum-exp `[B, H, N, 1]`, in sorted order.
    fn sorted_attention(&self, qk: &Tensor, v: &Tensor, order: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, h, n, d) = qk.dims4()?;
        let chunks = n / self.chunk;
        let chunked = |x: &Tensor| x.reshape((b, h, chunks, self.chunk, ()));
        let q = chunked(&take_rows(qk, order)?)?;
        let (k, v) = (with_previous(&unit_rows(&q)?)?, with_previous(&chunked(&take_rows(v, order)?)?)?);
        let at = chunked(order)?;
        let key_at = with_previous(&at)?.transpose(3, 4)?;
        let scores = (matmul(&q, &k.t()?)? * (d as f64).sqrt().recip())?;
        let own = at.broadcast_eq(&key_at)?;
        let scores = own.where_cond(&(scores.ones_like()? * OWN_KEY_LOGIT)?, &scores)?;
        let visible = match self.causal {
            true => key_at.broadcast_le(&at)?,
            false => Tensor::ones(scores.shape(), DType::U8, scores.device())?,
        };
        let visible = visible.broadcast_mul(&self.chunk_pairs(chunks, &scores)?)?;
        let out = matmul(&visible_softmax(&scores, &visible)?, &v)?;
        let lse = log_sum_exp(&scores, &visible)?;
        Ok((out.reshape((b, h, n, ()))?, lse.reshape((b, h, n, 1))?))
    }

    /// Which of the keys of the previous and of its own chunk every chunk sees: u8 `[chunks, 1, 2 * chunk]`.
    fn chunk_pairs(&self, chunks: usize, like: &Tensor) -> Result<Tensor> {
        let first = if self.wrap { 0u32 } else { 1 };
        let has_previous = arange(chunks, like.device())?.ge(first)?.reshape((chunks, 1, 1))?;
        let own = arange(2 * self.chunk, like.device())?.ge(self.chunk as u32)?;
        has_previous.broadcast_maximum(&own.reshape((1, 1, 2 * self.chunk))?)
    }
}

/// Every chunk of x `[B, H, chunks, c, D]` with the one before it in front; the last one before the first.
fn with_previous(x: &Tensor) -> Result<Tensor> {
    let chunks = x.dim(2)?;
    let before = match chunks {
        1 => x.clone(),
        _ => Tensor::cat(&[x.narrow(2, chunks - 1, 1)?, x.narrow(2, 0, chunks - 1)?], 2)?,
    };
    Tensor::cat(&[before, x.clone()], 3)
}
