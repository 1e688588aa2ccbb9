//! Energy and gradient of an Energy Transformer block.

use candle_core::{D, DType, Result, Tensor, bail};

use crate::mechanisms::indices::{matmul, visible_softmax};
use crate::mechanisms::inputs::Inputs;
use crate::mechanisms::rows::log_sum_exp;

/// The parameters of a block.
pub(super) struct Block<'a> {
    gamma: &'a Tensor,
    delta: &'a Tensor,
    query: &'a Tensor,
    key: &'a Tensor,
    patterns: &'a Tensor,
    /// Which keys B each query C sees, u8 `[N, N]`.
    visible: Tensor,
}

impl<'a> Block<'a> {
    pub(super) fn new(inputs: &'a Inputs, own_key: bool) -> Result<Self> {
        let get = |name| inputs.get(name);
        let (x, query, key, patterns) = (get("x")?, get("Wq")?, get("Wk")?, get("Xi")?);
        let (_, n, d) = x.dims3()?;
        if query.dims() != key.dims() || query.dims3()?.2 != d || patterns.dims2()?.0 != d {
            bail!(
                "x {:?}, Wq {:?}, Wk {:?}, Xi {:?}: [B,N,D], [H,Y,D], [H,Y,D] and [D,K] expected",
                x.dims(),
                query.dims(),
                key.dims(),
                patterns.dims()
            );
        }
        if n == 1 && !own_key {
            bail!("diag false: one token has no keys besides its own; at least 2 expected");
        }
        let visible = match own_key {
            true => Tensor::ones((n, n), DType::U8, x.device())?,
            false => Tensor::eye(n, DType::U8, x.device())?.eq(0u8)?,
        };
        Ok(Self { gamma: get("gamma")?, delta: get("delta")?, query, key, patterns, visible })
    }

    /// `gamma (x - mean) / sqrt(var + 1e-5) + delta` with the biased variance: g `[B, N, D]`.
    pub(super) fn normalise(&self, x: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        centred.broadcast_div(&deviation)?.broadcast_mul(self.gamma)?.broadcast_add(self.delta)
    }

    /// The energies of attention and of the memory, each `[B]`.
    pub(super) fn energies(&self, g: &Tensor) -> Result<[Tensor; 2]> {
        let (q, k) = (heads(g, self.query)?, heads(g, self.key)?);
        let scores = scores(&q, &k)?;
        let lse = log_sum_exp(&scores, &self.visible.broadcast_as(scores.shape())?.contiguous()?)?;
        let attention = (lse.flatten_from(1)?.sum(1)? * -(q.dim(3)? as f64).sqrt())?;
        let memory = (self.memory(g)?.sqr()?.flatten_from(1)?.sum(1)? * -0.5)?;
        Ok([attention, memory])
    }

    /// dE/dg `[B, N, D]`, differentiable itself: through the queries, through the keys, and through the memory.
    pub(super) fn gradient(&self, g: &Tensor) -> Result<Tensor> {
        let (q, k) = (heads(g, self.query)?, heads(g, self.key)?);
        let weights = visible_softmax(&scores(&q, &k)?, &self.visible)?;
        let queries = merged(&matmul(&weights, &k)?, self.query)?;
        let keys = merged(&matmul(&weights.t()?, &q)?, self.key)?;
        let memory = matmul(&self.memory(g)?, &self.patterns.t()?)?;
        ((queries + keys)? + memory)?.neg()
    }

    /// `relu(g Xi)`, `[B, N, K]`.
    fn memory(&self, g: &Tensor) -> Result<Tensor> {
        matmul(g, self.patterns)?.relu()
    }
}

/// `Q_C.K_B / sqrt(Y)`, `[B, H, N, N]`.
fn scores(q: &Tensor, k: &Tensor) -> Result<Tensor> {
    matmul(q, &k.t()?)? * (q.dim(3)? as f64).sqrt().recip()
}

/// The projections of g `[B, N, D]` by w `[H, Y, D]`: `[B, H, N, Y]`.
fn heads(g: &Tensor, w: &Tensor) -> Result<Tensor> {
    matmul(&g.unsqueeze(1)?, &w.t()?)
}

/// The sum over heads of x `[B, H, N, Y]` by w `[H, Y, D]`: `[B, N, D]`.
fn merged(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    matmul(x, w)?.sum(1)
}
