//! The weights of mechanisms, by the code of `gd-layer`, from scores or from queries and keys.

use candle_core::{D, DType, Tensor};
use gd_layer::mechanisms::{
    Aggregate, AttentionMechanism, Computation, Hopfield, Inputs, Run, Score, Stages, linear_attention,
    mocha_weights, monotonic_weights,
};

use crate::error::{Error, Result};

/// Weights from rows of scores.
#[derive(Debug, Clone, Copy)]
pub(super) enum FromScores {
    /// A mechanism, as the JSON text of its configuration, with its learned numbers.
    Mechanism { configuration: &'static str, learned: &'static [(&'static str, f64)] },
    /// Softmax over this number of last keys.
    LastKeys(usize),
    /// `|softmax(z) - lambda softmax(z2)|` with a second row z2.
    Differential(f64),
    /// The first row of monotonic attention with the scores as energies, chunkwise with a window above 1.
    Monotonic { window: usize },
}

/// Weights from unit queries, unit keys and an inverse temperature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromKeys {
    /// Hopfield retrieval with one update.
    Hopfield,
    /// Linear attention, with queries of length beta.
    Linear,
}

/// Weights of rows.
#[derive(Debug, Clone)]
pub(super) struct Weights {
    /// `[R, n]`.
    pub(super) weights: Tensor,
    /// The weight of no key `[R]`, where there is one.
    pub(super) null: Option<Tensor>,
}

impl FromScores {
    /// The weights of scores `[R, n]`; `second` are further scores of that shape.
    pub(super) fn weights(self, scores: &Tensor, second: &Tensor) -> Result<Weights> {
        let softmax = |z: &Tensor| staged(r#"{"name":"softmax"}"#, Inputs::new(), z);
        match self {
            Self::Mechanism { configuration, learned } => {
                let mut inputs = Inputs::new();
                for &(name, value) in learned {
                    inputs.insert(name, Tensor::full(value, 1, scores.device())?.to_dtype(scores.dtype())?);
                }
                staged(configuration, inputs, scores)
            }
            Self::LastKeys(keys) => {
                let n = scores.dim(1)?;
                let visible =
                    Tensor::arange(0u32, n as u32, scores.device())?.ge(n.saturating_sub(keys) as u32)?;
                let inputs = Inputs::new().with("mask", &visible.unsqueeze(0)?);
                staged(r#"{"name":"softmax"}"#, inputs, scores)
            }
            Self::Differential(lambda) => {
                let (first, second) = (softmax(scores)?.weights, softmax(second)?.weights);
                Ok(Weights { weights: (first - (second * lambda)?)?.abs()?, null: None })
            }
            Self::Monotonic { window } => {
                let energies = scores.unsqueeze(1)?;
                let weights =
                    mocha_weights(&monotonic_weights(&energies, None)?, &energies, window)?.squeeze(1)?;
                Ok(Weights { weights, null: None })
            }
        }
    }
}

impl FromKeys {
    /// The weights `[R, n]` of q `[R, D]` over k `[n, D]`, both with rows of length 1.
    pub(super) fn weights(self, q: &Tensor, k: &Tensor, beta: f64) -> Result<Tensor> {
        let batch = |x: &Tensor| x.unsqueeze(0)?.unsqueeze(0);
        // With the unit matrix as values, outputs are weights.
        let values = batch(&Tensor::eye(k.dim(0)?, k.dtype(), k.device())?)?;
        let out = match self {
            Self::Hopfield => {
                let inputs = Inputs::new().with("q", &batch(q)?).with("k", &batch(k)?).with("v", &values);
                let mechanism = AttentionMechanism::Hopfield(Hopfield { beta: Some(beta), updates: 1 });
                mechanism.attend(&inputs)?.get("out")?.clone()
            }
            Self::Linear => linear_attention(&batch(&(q * beta)?)?, &batch(k)?, &values, false, None)?.0,
        };
        Ok(out.squeeze(0)?.squeeze(0)?)
    }
}

/// The scores that are given.
struct Given(Tensor);

impl Score for Given {
    fn name(&self) -> &'static str {
        "given"
    }

    fn score(&self, _: &mut Run) -> candle_core::Result<Tensor> {
        Ok(self.0.clone())
    }
}

/// The weights themselves as output.
struct NoValues;

impl Aggregate for NoValues {
    fn name(&self) -> &'static str {
        "none"
    }

    fn aggregate(&self, weights: &Tensor, _: &mut Run) -> candle_core::Result<Tensor> {
        Ok(weights.clone())
    }
}

/// The weights of scores `[R, n]` by the stages of a mechanism after its own scores.
fn staged(configuration: &str, inputs: Inputs, scores: &Tensor) -> Result<Weights> {
    let mechanism: AttentionMechanism =
        serde_json::from_str(configuration).map_err(|e| Error::Invalid(format!("{configuration}: {e}")))?;
    let Computation::Stages(stages) = mechanism.computation() else {
        return Err(Error::Invalid(format!("{configuration}: it has no weights over scores")));
    };
    let scores = scores.unsqueeze(0)?.unsqueeze(0)?;
    let stages = Stages { score: Box::new(Given(scores)), aggregate: Box::new(NoValues), ..stages };
    let outputs = stages.attend(&inputs)?;
    let rows = |t: &Tensor| t.squeeze(0)?.squeeze(0);
    let null = outputs.tensors.get("null").map(|t| rows(t)?.squeeze(D::Minus1)).transpose()?;
    Ok(Weights { weights: rows(outputs.get("weights")?)?, null })
}

/// The rows of a tensor `[R, n]` in f64.
pub(super) fn rows(t: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(t.to_dtype(DType::F64)?.to_vec2()?)
}
