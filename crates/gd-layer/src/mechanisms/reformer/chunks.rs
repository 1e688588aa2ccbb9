//! Attention within the chunks of one round, in the order of its hashes.

use candle_core::{DType, Result, Tensor};

use super::Reformer;
use crate::mechanisms::indices::{arange, matmul, take_rows, unit_rows, visible_softmax};
use crate::mechanisms::rows::log_sum_exp;

/// The logit of a position's own key, which is therefore read only where nothing else is visible.
const OWN_KEY_LOGIT: f64 = -1e5;

impl Reformer {
    /// Attention of one round: output `[B, H, N, Dv]` and log-sum-exp `[B, H, N, 1]`, in sorted order.
    pub(super) fn sorted_attention(
        &self,
        qk: &Tensor,
        v: &Tensor,
        order: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
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
