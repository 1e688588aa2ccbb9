//! The model of a task: a decoder, and for items with features an embedding of them.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::Mask;
use gd_layer::{Linear, Pass};

use super::{Examples, Inputs};
use crate::config::ModelConfig;
use crate::model::Transformer;

/// A decoder that reads tokens or items with features.
pub(super) struct TaskModel {
    pub(super) decoder: Transformer,
    features: Option<FeatureEmbedding>,
}

/// Embeds the features `[B, N, F]` of items by two layers with a GELU between them: `[B, N, C]`.
struct FeatureEmbedding {
    first: Linear,
    second: Linear,
}

impl FeatureEmbedding {
    fn new(features: usize, c: usize, vb: VarBuilder) -> Result<Self> {
        let layer = |inputs: usize, vb: VarBuilder| -> Result<Linear> {
            let bound = (inputs as f64).sqrt().recip();
            let weight = vb.get_with_hints((c, inputs), "weight", Init::Uniform { lo: -bound, up: bound })?;
            Ok(Linear::new(weight, Some(vb.get_with_hints(c, "bias", Init::Const(0.0))?)))
        };
        Ok(Self { first: layer(features, vb.pp("first"))?, second: layer(c, vb.pp("second"))? })
    }
}

impl TaskModel {
    pub(super) fn new(config: &ModelConfig, features: Option<usize>, vb: VarBuilder) -> crate::Result<Self> {
        let embedding = |n| FeatureEmbedding::new(n, config.hidden_size, vb.pp("features"));
        Ok(Self { features: features.map(embedding).transpose()?, decoder: Transformer::new(config, vb)? })
    }

    /// The hidden states `[B, N, C]` of examples.
    pub(super) fn hidden(&self, examples: &Examples, pass: &Pass) -> crate::Result<Tensor> {
        let inputs = examples.inputs(&pass_device(&self.decoder)?)?;
        Ok(match (&examples.inputs, &self.features) {
            (Inputs::Features(_), Some(embedding)) => {
                let x = embedding.second.forward(&embedding.first.forward(&inputs)?.gelu()?)?;
                self.decoder.hidden_of(x, pass, None)?
            }
            _ => self.decoder.hidden(&inputs, pass, None)?,
        })
    }

    /// The mean loss of the answers, with gradients.
    pub(super) fn loss(&self, examples: &Examples, pass: &Pass) -> crate::Result<Tensor> {
        let hidden = self.hidden(examples, pass)?;
        Ok(self.decoder.head_loss(&hidden, &self.answers(examples)?)?)
    }

    /// The answers `[B, N]`.
    fn answers(&self, examples: &Examples) -> crate::Result<Tensor> {
        let shape = (examples.rows, examples.length);
        Ok(Tensor::from_slice(&examples.answers, shape, &pass_device(&self.decoder)?)?)
    }

    /// The sum of the losses of the answers, the number of correct ones, and the number of all.
    pub(super) fn test(&self, examples: &Examples, pass: &Pass) -> crate::Result<(f64, usize, usize)> {
        let hidden = self.hidden(examples, pass)?.detach().flatten_to(1)?;
        let asked = |(at, answer): (usize, &u32)| {
            (*answer != gd_kernels::cross_entropy::IGNORE).then_some((at as u32, *answer))
        };
        let (rows, answers): (Vec<u32>, Vec<u32>) =
            examples.answers.iter().enumerate().filter_map(asked).unzip();
        let count = rows.len();
        let logits = self.decoder.logits(&hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)?)?;
        let best = logits.argmax(1)?.to_vec1::<u32>()?;
        let correct = best.iter().zip(&answers).filter(|(a, b)| a == b).count();
        let answers = Tensor::new(answers, logits.device())?;
        let loss = candle_nn::loss::cross_entropy(&logits, &answers)?.to_scalar::<f32>()?;
        Ok((f64::from(loss) * count as f64, correct, count))
    }
}

/// The device of a model.
fn pass_device(decoder: &Transformer) -> Result<candle_core::Device> {
    Ok(decoder.head_weight()?.device().clone())
}

/// The causal mask of examples.
pub(super) fn mask() -> Mask {
    Mask::causal(0)
}
