//! The Energy Transformer block (Hoover et al. 2023, arXiv 2302.07253): tokens descend the gradient of an energy of
//! attention and of a Hopfield network.

mod block;

use candle_core::{Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use self::block::Block;
use super::definition::{Definition, Info};
use super::inputs::Outputs;
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
