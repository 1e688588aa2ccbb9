//! Reinforced self-attention, ReSAN (Shen et al. 2018, arXiv 1801.10296): sampled heads read sampled dependents, feature by
//! feature.

mod context;
mod selection;

use candle_core::{Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use self::context::weighted;
use self::selection::Selection;
pub use self::selection::reinforce_loss;
use super::definition::{Definition, Info};
use super::indices::{matmul, project};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Reinforced self-attention. With r = relu(Wr x + br), a token that is selected as a head reads the selected dependents on
/// its side with a softmax per feature of c tanh((Wd r_j + Wh r_i + bl) / c); another one reads the mean of r over all
/// tokens on that side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resan {
    /// Which tokens a token reads.
    pub direction: Direction,
    /// Bound of the logits, above 0.
    pub c: f64,
}

/// Which tokens a token reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Those before it, j < i.
    Forward,
    /// Those after it, j > i.
    Backward,
}

impl Default for Resan {
    fn default() -> Self {
        Self { direction: Direction::Forward, c: 5.0 }
    }
}

impl Definition for Resan {
    const INFO: Info = Info {
        formula: "F r + (1 - F) context, F = sigmoid(Wf1 r + Wf2 context + bf); heads and dependents are Bernoulli samples",
        source: "Shen et al. 2018",
        inputs: &[("x", "[B,N,D]")],
        learned: &[
            ("W1h", "[A,3D], selector of heads, f = [x; mean x; x * mean x]"),
            ("b1h", "[A]"),
            ("w2h", "[A]"),
            ("b2h", "[1]"),
            ("W1d", "[A,3D], selector of dependents"),
            ("b1d", "[A]"),
            ("w2d", "[A]"),
            ("b2d", "[1]"),
            ("Wr", "[F,D]"),
            ("br", "[F]"),
            ("Wd", "[F,F]"),
            ("Wh", "[F,F]"),
            ("bl", "[F]"),
            ("Wf1", "[F,F]"),
            ("Wf2", "[F,F]"),
            ("bf", "[F]"),
        ],
        constants: &[
            ("valid", "[B,N], 1 for a token and 0 for padding"),
            ("u_head", "[B,N], uniform in 0..1"),
            ("u_dep", "[B,N], uniform in 0..1"),
            ("reward", "[B], optional: with it there is the loss of REINFORCE"),
        ],
        parameters: &[
            ("direction", "forward: j < i; backward: j > i"),
            ("c", "bound of the logits c tanh(. / c), above 0"),
        ],
        memory: "N x N x F",
        not_in_models: Some("its selectors are trained by rewards"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("selectors > softmax per feature > fusion gate", |inputs| self.attend(inputs))
    }

    fn validate(&self) -> Result<()> {
        if !(self.c > 0.0 && self.c.is_finite()) {
            bail!("c {}: a number above 0 expected", self.c);
        }
        Ok(())
    }
}

impl Resan {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let get = |name| inputs.get(name);
        let (x, valid) = (get("x")?, get("valid")?);
        let (b, n, _) = x.dims3()?;
        for name in ["valid", "u_head", "u_dep"] {
            if get(name)?.dims() != [b, n] {
                bail!("{name} {:?}: [{b},{n}] expected for x {:?}", get(name)?.dims(), x.dims());
            }
        }
        let head = Selection::sample(inputs, ["W1h", "b1h", "w2h", "b2h", "u_head"])?;
        let dependent = Selection::sample(inputs, ["W1d", "b1d", "w2d", "b2d", "u_dep"])?;
        let r = project(x, get("Wr")?)?.broadcast_add(get("br")?)?.relu()?;
        let side = self.direction.side(n, valid)?;
        let read = weighted(&r, &side.broadcast_mul(&dependent.action.unsqueeze(1)?)?, inputs, self.c)?;
        let side = side.to_dtype(x.dtype())?;
        let mean = matmul(&side, &r)?.broadcast_div(&side.sum_keepdim(2)?.maximum(1f64)?)?;
        let is_head = head.action.unsqueeze(2)?.broadcast_as(r.shape())?;
        let is_token = valid.to_dtype(x.dtype())?.unsqueeze(2)?;
        let context = is_head.where_cond(&read, &mean)?.broadcast_mul(&is_token)?;
        let gate = (project(&r, get("Wf1")?)? + project(&context, get("Wf2")?)?)?;
        let gate = sigmoid(&gate.broadcast_add(get("bf")?)?)?;
        let out = ((gate * (r - &context)?)? + &context)?.broadcast_mul(&is_token)?;
        let log_p = Tensor::stack(&[head.log_probability, dependent.log_probability], 1)?;
        let mut outputs = Outputs::default();
        if let Some(reward) = inputs.optional("reward") {
            let loss = reinforce_loss(&log_p, reward)?;
            outputs.insert("rl_loss", loss.reshape(1)?);
            outputs.extra_loss = Some(loss);
        }
        for (name, t) in [
            ("out", out),
            ("ctx", context),
            ("p_head", head.probability),
            ("p_dep", dependent.probability),
            ("a_head", head.action),
            ("a_dep", dependent.action),
            ("logp", log_p),
        ] {
            outputs.insert(name, t);
        }
        Ok(outputs)
    }
}
