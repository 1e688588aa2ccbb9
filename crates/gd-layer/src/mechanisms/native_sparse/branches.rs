//! What the branches of Native Sparse Attention read, and the branch over compressed keys.

use candle_core::{DType, Result, Tensor, bail};

use super::NativeSparse;
use crate::mechanisms::indices::{arange, grouped, matmul, visible_softmax};
use crate::mechanisms::inputs::Inputs;

/// Queries, keys and values of the branches.
pub(super) struct Branches<'a> {
    pub(super) sizes: &'a NativeSparse,
    /// `[B, H, N, D]`.
    pub(super) q: &'a Tensor,
    /// `[B, Hk, M, D]`.
    pub(super) k: &'a Tensor,
    /// `[B, Hk, M, Dv]`.
    pub(super) v: &'a Tensor,
    /// The positions of the queries, u32 `[B|1, 1, N, 1]`.
    pub(super) at: Tensor,
}

impl<'a> Branches<'a> {
    /// Checks the shapes.
    pub(super) fn new(sizes: &'a NativeSparse, inputs: &'a Inputs) -> Result<Self> {
        let (q, k, v) = (inputs.get("q")?, inputs.get("k")?, inputs.get("v")?);
        let ((b, _, n, d), (_, hk, m, _), dv) = (q.dims4()?, k.dims4()?, v.dim(3)?);
        if k.dims() != [b, hk, m, d] || v.dims() != [b, hk, m, dv] || n > m {
            let (q, k, v) = (q.dims(), k.dims(), v.dims());
            bail!("q {q:?}, k {k:?}, v {v:?}: [B,H,N,D], [B,Hk,M,D] and [B,Hk,M,Dv] expected, N at most M");
        }
        let at = match inputs.optional("query_positions") {
            Some(at) => at.to_dtype(DType::U32)?.reshape(((), 1, n, 1))?,
            None => Tensor::arange((m - n) as u32, m as u32, q.device())?.reshape((1, 1, n, 1))?,
        };
        Ok(Self { sizes, q, k, v, at })
    }

    /// The scaled dot products of queries, grouped by their key-value heads, with `keys`.
    pub(super) fn scores(&self, q: &Tensor, keys: &Tensor) -> Result<Tensor> {
        matmul(q, &keys.t()?)? * (self.q.dim(3)? as f64).sqrt().recip()
    }

    fn blocks(&self) -> Result<usize> {
        Ok(self.k.dim(2)?.div_ceil(self.sizes.block))
    }

    /// The output of the compressed branch `[B, H, N, Dv]` and the scores of the blocks `[B, Hk, N, blocks]`: that of block j
    /// is `sum_c p_c overlap(c, j) / stride` with the tokens that both have, summed over the heads of a group.
    pub(super) fn compressed(&self) -> Result<(Tensor, Tensor)> {
        let NativeSparse { l, stride, block, .. } = *self.sizes;
        let ((b, h, n, _), (_, hk, m, _)) = (self.q.dims4()?, self.k.dims4()?);
        let (device, dv) = (self.q.device(), self.v.dim(3)?);
        let (blocks, count) = (self.blocks()?, if m < l { 0 } else { (m - l) / stride + 1 });
        if count == 0 {
            let zeros = |dims: [usize; 4]| Tensor::zeros(dims.to_vec(), self.q.dtype(), device);
            return Ok((zeros([b, h, n, dv])?, zeros([b, hk, n, blocks])?));
        }
        let first = Tensor::arange_step(0u32, (count * stride) as u32, stride as u32, device)?;
        let tokens = first.unsqueeze(1)?.broadcast_add(&arange(l, device)?)?.flatten_all()?;
        let means = |x: &Tensor| {
            let rows = x.contiguous()?.index_select(&tokens, 2)?.reshape((b, hk, count, l, x.dim(3)?))?;
            rows.mean(3)?.unsqueeze(2)
        };
        let last = (first + (l - 1) as f64)?;
        let visible = last.broadcast_le(&self.at)?.unsqueeze(2)?;
        let weights = visible_softmax(&self.scores(&grouped(self.q, hk)?, &means(self.k)?)?, &visible)?;
        let out = matmul(&weights, &means(self.v)?)?.reshape((b, h, n, dv))?;
        let share = |c: usize, j: usize| {
            let end = (c * stride + l).min((j + 1) * block);
            end.saturating_sub((c * stride).max(j * block)) as f64 / stride as f64
        };
        let shares = (0..count).flat_map(|c| (0..blocks).map(move |j| share(c, j)));
        let shares = Tensor::from_iter(shares, device)?.reshape((count, blocks))?.to_dtype(self.q.dtype())?;
        Ok((out, matmul(&weights.detach().sum(2)?, &shares)?))
    }
}
