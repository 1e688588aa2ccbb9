//! Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089): a branch over compressed keys, one over selected blocks
//! of keys and one over a sliding window, mixed by gates.

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV};
use super::indices::{arange, grouped, index_or_none, matmul, take_rows, top_k_positions, visible_softmax};
use super::inputs::{Inputs, Outputs};
use super::sliding_window::sliding_window;
use super::stages::Computation;

/// The sizes of Native Sparse Attention, in tokens unless said otherwise. Blocks and compressed keys are counted from 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NativeSparse {
    /// Tokens that one compressed key is the mean of.
    pub l: usize,
    /// Distance between the first tokens of two compressed keys.
    pub stride: usize,
    /// Tokens of a selected block.
    pub block: usize,
    /// Blocks that a query selects, with those that it always takes.
    pub nsel: usize,
    /// First blocks that a query always takes.
    pub ninit: usize,
    /// Blocks up to its own that a query always takes.
    pub nlocal: usize,
    /// Tokens of the sliding window.
    pub w: usize,
}

impl Default for NativeSparse {
    fn default() -> Self {
        Self { l: 32, stride: 16, block: 64, nsel: 16, ninit: 1, nlocal: 2, w: 512 }
    }
}

impl Definition for NativeSparse {
    const INFO: Info = Info {
        formula: "sum over branches (compressed, selected, window) of sigmoid(gate) softmax(q k^T / sqrt(D)) v, causal",
        source: "Yuan et al. 2025",
        inputs: &[QKV[0], ("k", "[B,Hk,N,D]"), ("v", "[B,Hk,N,Dv]"), ("gates", "[B,H,N,3], logits")],
        constants: &[],
        parameters: &[
            ("l", "tokens of a compressed key"),
            ("stride", "tokens between compressed keys"),
            ("block", "tokens of a selected block"),
            ("nsel", "selected blocks, at least ninit + nlocal"),
            ("ninit", "first blocks, always taken"),
            ("nlocal", "blocks up to the own one, always taken"),
            ("w", "tokens of the sliding window"),
        ],
        memory: "N x N / stride + N x nsel x block x (D + Dv) + N x w",
        not_in_models: Some("its gates are projected from the input of the layer"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole(
            "compressed keys > scores of blocks > selected blocks > window > gates",
            |inputs| self.attend(inputs),
        )
    }

    fn validate(&self) -> Result<()> {
        let Self { l, stride, block, nsel, ninit, nlocal, w } = *self;
        for (name, size) in [("l", l), ("stride", stride), ("block", block), ("nsel", nsel), ("w", w)] {
            if size == 0 {
                bail!("{name} 0: at least 1 expected");
            }
        }
        if nsel < ninit + nlocal {
            bail!("nsel {nsel}: at least ninit + nlocal = {} expected", ninit + nlocal);
        }
        Ok(())
    }
}

impl NativeSparse {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let get = |name| inputs.get(name);
        let (q, k, v, gates) = (get("q")?, get("k")?, get("v")?, get("gates")?);
        let (b, h, n, _) = q.dims4()?;
        if gates.dims() != [b, h, n, 3] {
            bail!("gates {:?}: [{b},{h},{n},3] expected for q {:?}", gates.dims(), q.dims());
        }
        // It checks the shapes of q, k and v.
        let window = sliding_window(q, k, v, self.w)?;
        let (compressed, scores) = self.compressed(q, k, v)?;
        let index = self.chosen_blocks(&scores)?;
        let selected = selected(q, k, v, &index, self.block)?;
        let gates = sigmoid(gates)?;
        let gated = |branch: &Tensor, i: usize| branch.broadcast_mul(&gates.narrow(3, i, 1)?);
        let out = ((gated(&compressed, 0)? + gated(&selected, 1)?)? + gated(&window, 2)?)?;
        let mut outputs = Outputs::default();
        for (name, t) in [("o_cmp", compressed), ("o_slc", selected), ("o_win", window), ("out", out)] {
            outputs.insert(name, t);
        }
        outputs.insert("score", scores);
        outputs.insert("block_index", index);
        Ok(outputs)
    }

    /// The output of the compressed branch `[B, H, N, Dv]` and the scores of the blocks `[B, Hk, N, blocks]`: that of block j
    /// is `sum_c p_c overlap(c, j) / stride` with the tokens that both have, summed over the heads of a group.
    fn compressed(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Self { l, stride, block, .. } = *self;
        let (b, h, n, d) = q.dims4()?;
        let (hk, dv, device) = (k.dim(1)?, v.dim(3)?, q.device());
        let (blocks, count) = (n.div_ceil(block), if n < l { 0 } else { (n - l) / stride + 1 });
        if count == 0 {
            let zeros = |dims: [usize; 4]| Tensor::zeros(dims.to_vec(), q.dtype(), device);
            return Ok((zeros([b, h, n, dv])?, zeros([b, hk, n, blocks])?));
        }
        let first = Tensor::arange_step(0u32, (count * stride) as u32, stride as u32, device)?;
        let tokens = first.unsqueeze(1)?.broadcast_add(&arange(l, device)?)?.flatten_all()?;
        let means = |x: &Tensor| {
            let rows = x.contiguous()?.index_select(&tokens, 2)?.reshape((b, hk, count, l, x.dim(3)?))?;
            rows.mean(3)?.unsqueeze(2)
        };
        let scores = matmul(&grouped(q, hk)?, &means(k)?.t()?)?;
        let last = (first + (l - 1) as f64)?;
        let visible = last.unsqueeze(0)?.broadcast_le(&arange(n, device)?.unsqueeze(1)?)?;
        let weights = visible_softmax(&(scores * (d as f64).sqrt().recip())?, &visible)?;
        let out = matmul(&weights, &means(v)?)?.reshape((b, h, n, dv))?;
        let share = |c: usize, j: usize| {
            let end = (c * stride + l).min((j + 1) * block);
            end.saturating_sub((c * stride).max(j * block)) as f64 / stride as f64
        };
        let shares = (0..count).flat_map(|c| (0..blocks).map(move |j| share(c, j)));
        let shares = Tensor::from_iter(shares, device)?.reshape((count, blocks))?.to_dtype(q.dtype())?;
        Ok((out, matmul(&weights.detach().sum(2)?, &shares)?))
    }

    /// The blocks of every query in ascending order, from scores `[B, Hk, N, blocks]`: i64 `[B, Hk, N, nsel]`, -1 where fewer
    /// blocks start at or before the query.
    fn chosen_blocks(&self, scores: &Tensor) -> Result<Tensor> {
        let Self { block, nsel, ninit, nlocal, .. } = *self;
        let (_, _, n, blocks) = scores.dims4()?;
        let (shape, device) = (scores.shape(), scores.device());
        let token = arange(n, device)?.unsqueeze(1)?;
        let start = Tensor::arange_step(0u32, (blocks * block) as u32, block as u32, device)?.unsqueeze(0)?;
        let visible = start.broadcast_le(&token)?;
        // The query's own block is less than `nlocal` blocks behind.
        let is_local = (&start + (nlocal * block) as f64)?.broadcast_gt(&token)?;
        let always = start.lt((ninit * block) as u32)?.broadcast_maximum(&is_local)?;
        let constant = |x: f64| Tensor::full(x, shape, device)?.to_dtype(scores.dtype());
        let rank = always.broadcast_as(shape)?.where_cond(&constant(f64::INFINITY)?, scores)?;
        let rank = visible.broadcast_as(shape)?.where_cond(&rank, &constant(f64::NEG_INFINITY)?)?;
        let chosen = top_k_positions(&rank, nsel)?;
        let is_visible = (&chosen * block as f64)?.broadcast_le(&token)?;
        let index = index_or_none(&chosen, &is_visible)?;
        match nsel.saturating_sub(blocks) {
            0 => Ok(index),
            missing => {
                let (b, hk, n, _) = index.dims4()?;
                let unused = Tensor::full(-1i64, (b, hk, n, missing), device)?;
                Tensor::cat(&[index, unused], 3)?.contiguous()
            }
        }
    }
}

/// Attention of every query over the tokens of its blocks up to its own position: `[B, H, N, Dv]`.
fn selected(q: &Tensor, k: &Tensor, v: &Tensor, index: &Tensor, block: usize) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    let (hk, device) = (k.dim(1)?, q.device());
    let used = index.ge(0i64)?;
    let start = (used.where_cond(index, &index.zeros_like()?)?.to_dtype(DType::U32)? * block as f64)?;
    let token = start.unsqueeze(4)?.broadcast_add(&arange(block, device)?)?.flatten(3, 4)?;
    let used = used.unsqueeze(4)?.repeat((1, 1, 1, 1, block))?.flatten(3, 4)?;
    let query = arange(n, device)?.unsqueeze(1)?.broadcast_as(token.shape())?.contiguous()?;
    let past = token.le(&query)?;
    // Tokens behind the query are not read; its own stands in their place.
    let token = past.where_cond(&token, &query)?.flatten(2, 3)?;
    let rows = |x: &Tensor| take_rows(x, &token)?.reshape((b, hk, n, (), x.dim(D::Minus1)?));
    let q = grouped(q, hk)?.transpose(2, 3)?.contiguous()?;
    let scores = (matmul(&q, &rows(k)?.t()?)? * (d as f64).sqrt().recip())?;
    let weights = visible_softmax(&scores, &(past * used)?.unsqueeze(3)?)?;
    matmul(&weights, &rows(v)?)?.transpose(2, 3)?.reshape((b, h, n, ()))
}
