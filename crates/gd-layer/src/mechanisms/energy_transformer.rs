//! The Energy Transformer block (Hoover et al. 2023, arXiv 2302.07253): tokens descend the gradient of an energy of
//! attention and of a Hopfield network.

use candle_core::{D, DType, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info};
use super::indices::{matmul, visible_softmax};
use super::inputs::{Inputs, Outputs};
use super::rows::log_sum_exp;
use super::stages::Computation;

/// T steps `x <- x - step * dE/dg`, which take the gradient of the normalised tokens g, not that of x. The outputs are `out`
/// after the first step, `xT` after all of them (`x12`), and `E_path` `[T + 1, B]`, the energies before and between them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnergyTransformer {
    /// Size of a step.
    pub step: f64,
    /// Number of steps.
    #[serde(rename = "T")]
    pub steps: usize,
    /// Whether a token is among its own keys, as in the authors' code. The formula of the paper excludes it.
    pub diag: bool,
}

impl Default for EnergyTransformer {
    fn default() -> Self {
        Self { step: 0.1, steps: 12, diag: true }
    }
}

impl Definition for EnergyTransformer {
    const INFO: Info = Info {
        formula: "E = -1/beta sum_h sum_C ln sum_B exp(beta K_B.Q_C) - 1/2 sum relu(g Xi)^2; x <- x - step dE/dg",
        source: "Hoover et al. 2023",
        inputs: &[("x", "[B,N,D]")],
        learned: &[("gamma", "[1]"), ("delta", "[D]"), ("Wq", "[H,Y,D]"), ("Wk", "[H,Y,D]"), ("Xi", "[D,K]")],
        constants: &[],
        parameters: &[
            ("step", "size of a step"),
            ("T", "number of steps"),
            ("diag", "true: a token is among its own keys"),
        ],
        memory: "T x H x N x N",
        not_in_models: Some("it has no values: it is a block of its own"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("layer norm > energy of attention and memory > gradient steps", |inputs| {
            let block = Block::new(inputs, self.diag)?;
            let mut x = inputs.get("x")?.clone();
            let mut outputs = Outputs::default();
            let mut path = Vec::with_capacity(self.steps + 1);
            for step in 0..self.steps {
                let g = block.normalise(&x)?;
                let [attention, memory] = block.energies(&g)?;
                path.push((&attention + &memory)?);
                let gradient = block.gradient(&g)?;
                x = (x - (&gradient * self.step)?)?;
                if step == 0 {
                    let first = [("g", g), ("E_att", attention), ("E_hn", memory), ("dE_dg", gradient)];
                    for (name, t) in first.into_iter().chain([("out", x.clone())]) {
                        outputs.insert(name, t);
                    }
                }
            }
            let [attention, memory] = block.energies(&block.normalise(&x)?)?;
            path.push((attention + memory)?);
            outputs.insert("E_path", Tensor::stack(&path, 0)?);
            outputs.insert(&format!("x{}", self.steps), x);
            Ok(outputs)
        })
    }

    fn validate(&self) -> Result<()> {
        if self.steps == 0 || !self.step.is_finite() {
            bail!("T {} and step {}: at least 1 step of a finite size expected", self.steps, self.step);
        }
        Ok(())
    }
}

/// The parameters of a block.
struct Block<'a> {
    gamma: &'a Tensor,
    delta: &'a Tensor,
    query: &'a Tensor,
    key: &'a Tensor,
    patterns: &'a Tensor,
    /// Which keys B each query C sees, u8 `[N, N]`.
    visible: Tensor,
}

impl<'a> Block<'a> {
    fn new(inputs: &'a Inputs, own_key: bool) -> Result<Self> {
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
    fn normalise(&self, x: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let deviation = (centred.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        centred.broadcast_div(&deviation)?.broadcast_mul(self.gamma)?.broadcast_add(self.delta)
    }

    /// The energies of attention and of the memory, each `[B]`.
    fn energies(&self, g: &Tensor) -> Result<[Tensor; 2]> {
        let (q, k) = (heads(g, self.query)?, heads(g, self.key)?);
        let scores = scores(&q, &k)?;
        let lse = log_sum_exp(&scores, &self.visible.broadcast_as(scores.shape())?.contiguous()?)?;
        let attention = (lse.flatten_from(1)?.sum(1)? * -(q.dim(3)? as f64).sqrt())?;
        let memory = (self.memory(g)?.sqr()?.flatten_from(1)?.sum(1)? * -0.5)?;
        Ok([attention, memory])
    }

    /// dE/dg `[B, N, D]`, differentiable itself: through the queries, through the keys, and through the memory.
    fn gradient(&self, g: &Tensor) -> Result<Tensor> {
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
