//! The choice of blocks, and the branches over the selected blocks and over the sliding window.
//!
//! Two forms give the same result. The masked form scores all keys once for both branches, for some queries at a time. The
//! gathered form copies the tokens of the selected blocks for every query; it is used where there are more keys than it
//! copies numbers for a query, which is slower for fewer keys.

use candle_core::{D, DType, Result, Tensor};

use super::NativeSparse;
use super::branches::Branches;
use crate::mechanisms::indices::{
    arange, grouped, index_or_none, matmul, take_rows, top_k_positions, visible_softmax,
};
use crate::mechanisms::sliding_window::sliding_window;

/// Queries that the masked form computes at once.
const TILE_QUERIES: usize = 64;

impl Branches<'_> {
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

    /// The outputs of the selected branch for the blocks `index` and of the window, `[B, H, N, Dv]` each.
    pub(super) fn selected_and_window(&self, index: &Tensor) -> Result<[Tensor; 2]> {
        let copied = self.sizes.nsel * self.sizes.block * (self.q.dim(3)? + self.v.dim(3)?);
        match self.k.dim(2)? > copied {
            true => Ok([self.gathered(index)?, self.window()?]),
            false => self.masked(index),
        }
    }

    /// Both branches in the masked form.
    fn masked(&self, index: &Tensor) -> Result<[Tensor; 2]> {
        let (n, m) = (self.q.dim(2)?, self.k.dim(2)?);
        let tile = |start: usize| {
            let len = TILE_QUERIES.min(n - start);
            // No query of the tile reads a key after these.
            let keys = m - n + start + len;
            let (q, at) = (self.q.narrow(2, start, len)?, self.at.narrow(2, start, len)?);
            let (k, v) = (self.k.narrow(2, 0, keys)?, self.v.narrow(2, 0, keys)?);
            let tile = Branches { sizes: self.sizes, q: &q, k: &k, v: &v, at };
            tile.masked_tile(&index.narrow(2, start, len)?)
        };
        let tiles = (0..n).step_by(TILE_QUERIES).map(tile).collect::<Result<Vec<_>>>()?;
        let all = |branch: usize| Tensor::cat(&tiles.iter().map(|tile| &tile[branch]).collect::<Vec<_>>(), 2);
        Ok([all(0)?, all(1)?])
    }

    /// Both branches from one matrix of scores.
    fn masked_tile(&self, index: &Tensor) -> Result<[Tensor; 2]> {
        let (m, block, device) = (self.k.dim(2)?, self.sizes.block, self.q.device());
        let blocks = Tensor::arange(0i64, m.div_ceil(block) as i64, device)?;
        let taken = index.unsqueeze(4)?.broadcast_eq(&blocks)?.max(3)?;
        let block_of_key = Tensor::from_iter((0..m).map(|key| (key / block) as u32), device)?;
        let taken = taken.contiguous()?.index_select(&block_of_key, 3)?;
        let scores = self.all_scores()?;
        let [past, near] = [self.is_past()?, self.is_near()?];
        Ok([self.read(&scores, &taken.broadcast_mul(&past)?)?, self.read(&scores, &near)?])
    }

    /// The scores of all keys `[B, Hk, H / Hk, N, M]`.
    fn all_scores(&self) -> Result<Tensor> {
        self.scores(&grouped(self.q, self.k.dim(1)?)?, &self.k.unsqueeze(2)?)
    }

    /// Whether a key stands at or before a query: u8 `[B|1, 1, N, M]`.
    fn is_past(&self) -> Result<Tensor> {
        arange(self.k.dim(2)?, self.q.device())?.broadcast_le(&self.at)
    }

    /// Whether a key is one of the last `w` up to the query: u8 `[B|1, 1, N, M]`.
    fn is_near(&self) -> Result<Tensor> {
        let key = arange(self.k.dim(2)?, self.q.device())?;
        self.is_past()? * (key + self.sizes.w as f64)?.broadcast_gt(&self.at)?
    }

    /// The softmax of `scores` over the `visible` keys (u8 `[B|1, Hk|1, N, M]`), times the values.
    fn read(&self, scores: &Tensor, visible: &Tensor) -> Result<Tensor> {
        let (b, h, n, _) = self.q.dims4()?;
        let weights = visible_softmax(scores, &visible.unsqueeze(2)?)?;
        matmul(&weights, &self.v.unsqueeze(2)?)?.reshape((b, h, n, ()))
    }

    /// Attention of every query over copies of the tokens of its blocks up to its own position: `[B, H, N, Dv]`.
    fn gathered(&self, index: &Tensor) -> Result<Tensor> {
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
    fn window(&self) -> Result<Tensor> {
        if self.q.dim(2)? == self.k.dim(2)? {
            return sliding_window(self.q, self.k, self.v, self.sizes.w);
        }
        // A block of queries, or a step of decoding: scores of all keys are few.
        self.read(&self.all_scores()?, &self.is_near()?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::mechanisms::inputs::Inputs;

    /// Numbers in -1..1 that do not repeat.
    fn numbers(seed: f64, dims: &[usize]) -> Var {
        let count: usize = dims.iter().product();
        let numbers = (0..count).map(|i| ((i as f64 + seed) * 12.9898).sin());
        Var::from_tensor(&Tensor::from_iter(numbers, &Device::Cpu).unwrap().reshape(dims).unwrap()).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f64> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn masked_and_gathered_blocks_give_the_same_outputs_and_gradients() {
        let sizes = NativeSparse { l: 4, stride: 2, block: 3, nsel: 4, ninit: 1, nlocal: 2, w: 5 };
        // More queries than a tile, a block of the last queries, and one query.
        for n in [70, 9, 1] {
            let [q, k, v] =
                [(4, n, 2), (2, 70, 2), (2, 70, 3)].map(|(h, n, d)| numbers(h as f64, &[2, h, n, d]));
            let inputs = Inputs::new().with("q", &q).with("k", &k).with("v", &v);
            let branches = Branches::new(&sizes, &inputs).unwrap();
            let index = branches.chosen_blocks(&branches.compressed().unwrap().1).unwrap();
            let gathered = [branches.gathered(&index).unwrap(), branches.window().unwrap()];
            let masked = branches.masked(&index).unwrap();
            for (a, b) in gathered.iter().zip(&masked) {
                let grads =
                    [a, b].map(|t| (t * numbers(9.0, t.dims()).as_tensor()).unwrap().backward().unwrap());
                let pairs =
                    [&q, &k, &v].map(|x| [&grads[0], &grads[1]].map(|grads| grads.get(x).unwrap().clone()));
                for [a, b] in pairs.into_iter().chain([[a.clone(), b.clone()]]) {
                    let apart =
                        values(&a).iter().zip(values(&b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                    assert!(a.dims() == b.dims() && apart < 1e-12, "{n} queries: {apart}");
                }
            }
        }
    }
}
