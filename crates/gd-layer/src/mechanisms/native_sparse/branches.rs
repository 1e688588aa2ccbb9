//! The three branches of Native Sparse Attention.

use candle_core::{D, DType, Result, Tensor, bail};

use super::NativeSparse;
use crate::mechanisms::indices::{
    arange, grouped, index_or_none, matmul, take_rows, top_k_positions, visible_softmax,
};
use crate::mechanisms::inputs::Inputs;
use crate::mechanisms::sliding_window::sliding_window;

/// Queries, keys and values of the branches.
pub(super) struct Branches<'a> {
    sizes: &'a NativeSparse,
    /// `[B, H, N, D]`.
    q: &'a Tensor,
    /// `[B, Hk, M, D]`.
    k: &'a Tensor,
    /// `[B, Hk, M, Dv]`.
    v: &'a Tensor,
    /// The positions of the queries, u32 `[B|1, 1, N, 1]`.
    at: Tensor,
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
    fn scores(&self, q: &Tensor, keys: &Tensor) -> Result<Tensor> {
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

    /// The blocks of every query in ascending order, from scores `[B, Hk, N, blocks]`: i64 `[B, Hk, N, min(nsel, blocks)]`,
    /// -1 where fewer blocks start at or before the query.
    pub(super) fn chosen_blocks(&self, scores: &Tensor) -> Result<Tensor> {
        let NativeSparse { block, nsel, ninit, nlocal, .. } = *self.sizes;
        let (shape, device) = (scores.shape(), scores.device());
        let start = Tensor::arange_step(0u32, (scores.dim(3)? * block) as u32, block as u32, device)?;
        let visible = start.broadcast_le(&self.at)?;
        // The query's own block is less than `nlocal` blocks behind.
        let is_local = (&start + (nlocal * block) as f64)?.broadcast_gt(&self.at)?;
        let always = start.lt((ninit * block) as u32)?.broadcast_maximum(&is_local)?;
        let constant = |x: f64| Tensor::full(x, shape, device)?.to_dtype(scores.dtype());
        let choose = |set: &Tensor, a: &Tensor, b: &Tensor| set.broadcast_as(shape)?.where_cond(a, b);
        let rank = choose(&always, &constant(f64::INFINITY)?, scores)?;
        let rank = choose(&visible, &rank, &constant(f64::NEG_INFINITY)?)?;
        let chosen = top_k_positions(&rank, nsel)?;
        let is_visible = (&chosen * block as f64)?.broadcast_le(&self.at)?;
        index_or_none(&chosen, &is_visible)
    }

    /// The chosen blocks with -1 up to `nsel` columns.
    pub(super) fn padded(&self, index: &Tensor) -> Result<Tensor> {
        let (b, hk, n, columns) = index.dims4()?;
        match self.sizes.nsel - columns {
            0 => Ok(index.clone()),
            missing => {
                let unused = Tensor::full(-1i64, (b, hk, n, missing), index.device())?;
                Tensor::cat(&[index, &unused], 3)?.contiguous()
            }
        }
    }

    /// Attention of every query over the tokens of its blocks up to its own position: `[B, H, N, Dv]`.
    pub(super) fn selected(&self, index: &Tensor) -> Result<Tensor> {
        let ((b, h, n, _), hk) = (self.q.dims4()?, self.k.dim(1)?);
        let (block, device) = (self.sizes.block, self.q.device());
        let used = index.ge(0i64)?;
        let start = (used.where_cond(index, &index.zeros_like()?)?.to_dtype(DType::U32)? * block as f64)?;
        let token = start.unsqueeze(4)?.broadcast_add(&arange(block, device)?)?.flatten(3, 4)?;
        let used = used.unsqueeze(4)?.repeat((1, 1, 1, 1, block))?.flatten(3, 4)?;
        let query = self.at.broadcast_as(token.shape())?.contiguous()?;
        let past = token.le(&query)?;
        // Tokens behind the query are not read; its own stands in their place.
        let token = past.where_cond(&token, &query)?.flatten(2, 3)?;
        let rows = |x: &Tensor| take_rows(x, &token)?.reshape((b, hk, n, (), x.dim(D::Minus1)?));
        let q = grouped(self.q, hk)?.transpose(2, 3)?.contiguous()?;
        let weights = visible_softmax(&self.scores(&q, &rows(self.k)?)?, &(past * used)?.unsqueeze(3)?)?;
        matmul(&weights, &rows(self.v)?)?.transpose(2, 3)?.reshape((b, h, n, ()))
    }

    /// Attention of every query over the last `w` tokens up to its own position: `[B, H, N, Dv]`.
    pub(super) fn window(&self) -> Result<Tensor> {
        let ((b, h, n, _), (_, hk, m, _), w) = (self.q.dims4()?, self.k.dims4()?, self.sizes.w);
        if n == m {
            return sliding_window(self.q, self.k, self.v, w);
        }
        // A block of queries, or a step of decoding: scores of all keys are few.
        let key = arange(m, self.q.device())?;
        let near = (&key + w as f64)?.broadcast_gt(&self.at)?;
        let visible = key.broadcast_le(&self.at)?.broadcast_mul(&near)?.unsqueeze(2)?;
        let weights = visible_softmax(&self.scores(&grouped(self.q, hk)?, &self.k.unsqueeze(2)?)?, &visible)?;
        matmul(&weights, &self.v.unsqueeze(2)?)?.reshape((b, h, n, ()))
    }
}
