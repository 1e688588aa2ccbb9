//! The decoder of a task, and for items with features an embedding of them.

use std::cell::RefCell;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::cross_entropy::IGNORE;
use gd_layer::{Linear, Pass};

use super::{TaskModel, mask};
use crate::config::ModelConfig;
use crate::model::Transformer;
use crate::model::params::Params;
use crate::tasks::{Examples, Inputs};
use crate::train::calibrate::calibrate_thresholds;

/// A decoder that reads tokens or items with features.
pub(super) struct Decoder {
    decoder: Transformer,
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

impl Decoder {
    pub(super) fn new(config: &ModelConfig, features: Option<usize>, vb: VarBuilder) -> crate::Result<Self> {
        let embedding = |n| FeatureEmbedding::new(n, config.hidden_size, vb.pp("features"));
        Ok(Self { features: features.map(embedding).transpose()?, decoder: Transformer::new(config, vb)? })
    }

    /// The hidden states `[B, N, C]` of examples.
    fn hidden(&self, examples: &Examples, pass: &Pass) -> crate::Result<Tensor> {
        let inputs = examples.inputs(self.decoder.head_weight()?.device())?;
        Ok(match (&examples.inputs, &self.features) {
            (Inputs::Features(_), Some(embedding)) => {
                let x = embedding.second.forward(&embedding.first.forward(&inputs)?.gelu()?)?;
                self.decoder.hidden_of(x, pass, None)?
            }
            _ => self.decoder.hidden(&inputs, pass, None)?,
        })
    }
}

impl TaskModel for Decoder {
    fn loss(&self, examples: &Examples, pass: &Pass) -> crate::Result<Tensor> {
        let hidden = self.hidden(examples, pass)?;
        let shape = (examples.rows, examples.length);
        let answers = Tensor::from_slice(&examples.answers, shape, hidden.device())?;
        Ok(self.decoder.head_loss(&hidden, &answers)?)
    }

    fn answers(&self, examples: &Examples, pass: &Pass) -> crate::Result<(Tensor, Vec<u32>)> {
        let hidden = self.hidden(examples, pass)?.detach().flatten_to(1)?;
        let asked = |(at, answer): (usize, &u32)| (*answer != IGNORE).then_some((at as u32, *answer));
        let (rows, answers): (Vec<u32>, Vec<u32>) =
            examples.answers.iter().enumerate().filter_map(asked).unzip();
        let rows = Tensor::new(rows, hidden.device())?;
        Ok((self.decoder.logits(&hidden.index_select(&rows, 0)?)?, answers))
    }

    fn calibrate(&self, examples: &Examples, params: &Params) -> crate::Result<()> {
        calibrate_thresholds(&self.decoder, params, |pass| self.hidden(examples, pass).map(drop), &mask())
    }

    fn gate(&self, examples: &Examples) -> crate::Result<Option<f64>> {
        let (stats, mask) = (RefCell::new(Vec::new()), mask());
        self.hidden(examples, &Pass { stats: Some(&stats), ..Pass::new(&mask) })?;
        let stats = stats.take();
        let gates = stats.iter().filter_map(|layer| layer.gate).collect::<Vec<_>>();
        Ok((!gates.is_empty()).then(|| gates.iter().sum::<f64>() / gates.len() as f64))
    }
}
