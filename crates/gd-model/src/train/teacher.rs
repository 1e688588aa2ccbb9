//! Uptraining: a model whose attention was changed learns from the one it was.
//!
//! First every changed layer learns to read what the original's layer reads, from the original's input
//! ([`Transformer::aligned`]). Then the whole model learns the text and the original's logits
//! ([`linear_distillation`]), while the keys that a query blends become fewer.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use gd_kernels::cross_entropy::linear_distillation;
use gd_kernels::{CANDIDATES, Estimator};
use gd_layer::Pass;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Curve;
use crate::config::{Mechanism, ModelConfig, SelectSchedule};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::pretrained::{Loaded, Parts};

/// What a run learns from another model: the block `train.uptrain` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UptrainConfig {
    /// The original model: whatever [`crate::model::pretrained::load`] loads.
    pub original: PathBuf,
    /// Share of all steps, the first ones, in which the changed layers are aligned; in [0, 1).
    #[serde(default = "align")]
    pub align: f64,
    /// Weight of the divergence from the original's logits beside the 1 of the cross entropy; at least 0.
    #[serde(default = "kl")]
    pub kl: f64,
}

fn align() -> f64 {
    0.05
}
fn kl() -> f64 {
    1.0
}

impl UptrainConfig {
    /// # Errors
    /// Names the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        if !(0.0..1.0).contains(&self.align) {
            return fail(format!("train.uptrain.align must be in [0, 1), not {}", self.align));
        }
        if !(self.kl >= 0.0 && self.kl.is_finite()) {
            return fail(format!("train.uptrain.kl must be at least 0, not {}", self.kl));
        }
        Ok(())
    }

    /// Whether a step, from 0, of a run of `steps` aligns.
    pub fn aligns(&self, step: u64, steps: u64) -> bool {
        (step as f64) < self.align * steps as f64
    }
}

/// How a query of a layer that is trained reads: `k` keys blended; a single one by a hard choice, whose gradient
/// goes through the best eight.
pub fn reading(k: usize) -> (usize, Estimator) {
    if k == 1 { (8, Estimator::Candidates) } else { (k, Estimator::Blend) }
}

/// The way there over a run (share of all steps): aligned with `k` keys; then, from all that there can be, half
/// as many again and again, `k` from 0.7 on; a single one is reached from eight by the hard share of the forward
/// pass, between 0.4 and 0.7.
pub fn schedule(k: usize, align: f64) -> SelectSchedule {
    let (least, _) = reading(k);
    let end = if k == 1 { 0.4 } else { 0.7 };
    let levels: Vec<usize> = CANDIDATES.iter().copied().rev().filter(|&n| n >= least).collect();
    let from = align.min(end);
    let each = (end - from) / (levels.len() - 1).max(1) as f64;
    let mut candidates = vec![(0.0, least as f64)];
    candidates.extend(levels.iter().enumerate().map(|(i, &n)| (from + each * i as f64, n as f64)));
    let hardness =
        (k == 1).then(|| Curve::Points(vec![(0.0, 1.0), (from, 1.0), (from, 0.0), (end, 0.0), (0.7, 1.0)]));
    SelectSchedule { candidates: Some(Curve::Points(candidates)), hardness, ..SelectSchedule::default() }
}

/// The original in a run: it does not learn.
pub struct Original {
    model: Transformer,
    hash: blake3::Hash,
    /// The layers whose attention is another in the model that learns.
    changed: Vec<usize>,
    /// Sampling defaults that go with the model.
    pub generation: Value,
    /// Further files that go with it, by name.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Original {
    /// The original of a model of the config `learner`; it computes in `dtype`, as the learner does.
    ///
    /// # Errors
    /// Another shape than the learner's, the same attention in every layer, or a model that cannot be built.
    pub fn new(parts: Parts, learner: &ModelConfig, dtype: DType, device: &Device) -> Result<Self> {
        let sizes = |c: &ModelConfig| (c.num_hidden_layers, c.hidden_size, c.vocab_size);
        let (mine, theirs) = (sizes(learner), sizes(&parts.config));
        if mine != theirs {
            return Err(Error::Invalid(format!(
                "a model of (layers, width, vocabulary) {mine:?} cannot learn from an original of {theirs:?}"
            )));
        }
        let Loaded { model, params, generation, files, .. } = parts.build_in(dtype, device)?;
        let differs = |&i: &usize| {
            let (mine, theirs) = (learner.mechanism(i), model.config().mechanism(i));
            mine != theirs || (mine == Mechanism::Gd && learner.attention(i) != model.config().attention(i))
        };
        let changed: Vec<usize> = (0..learner.num_hidden_layers).filter(differs).collect();
        if changed.is_empty() {
            return Err(Error::Invalid(
                "no layer differs from the original's, so that there is nothing to learn".into(),
            ));
        }
        Ok(Self { model, hash: params.hash()?, changed, generation, files })
    }

    /// A hash of its weights.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// The model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The layers that learn to read what its layers read.
    pub fn changed(&self) -> &[usize] {
        &self.changed
    }

    /// The learner's loss from its hidden states `[B, N, C]`: cross entropy and divergence.
    ///
    /// # Errors
    /// As [`linear_distillation`].
    pub fn loss(
        &self,
        learner: &Transformer,
        hidden: &Tensor,
        (ids, targets): (&Tensor, &Tensor),
        pass: &Pass,
        kl: f64,
    ) -> candle_core::Result<Tensor> {
        let other = self.model.hidden(ids, &Pass::new(pass.mask), None)?.flatten_to(1)?;
        let mine = (&hidden.flatten_to(1)?, &learner.head_weight()?);
        Ok(linear_distillation(mine, &targets.flatten_all()?, (&other, &self.model.head_weight()?), kl)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_become_fewer_until_the_last_part_of_the_run() {
        let mask = gd_kernels::Mask::causal(0);
        for k in CANDIDATES {
            let schedule = schedule(k, 0.05);
            schedule.validate().unwrap();
            let at = |share: f64| {
                let pass = schedule.pass(&mask, share);
                (pass.candidates.unwrap(), pass.hardness)
            };
            let least = reading(k).0;
            assert_eq!(at(0.0), (least, 1.0), "{k}");
            assert_eq!(at(0.05), (64, if k == 1 { 0.0 } else { 1.0 }), "{k}");
            assert_eq!(at(0.7), (least, 1.0), "{k}");
            assert_eq!(at(1.0), (least, 1.0), "{k}");
            let way: Vec<_> = (5..=100).map(|p| at(f64::from(p) / 100.0)).collect();
            assert!(way.windows(2).all(|w| w[0].0 >= w[1].0 && w[0].1 <= w[1].1), "{k}: {way:?}");
            let passed: std::collections::BTreeSet<_> = way.iter().map(|w| w.0).collect();
            assert_eq!(passed.len(), CANDIDATES.iter().filter(|&&n| n >= least).count(), "{k}");
        }
        assert!((schedule(1, 0.05).pass(&mask, 0.55).hardness - 0.5).abs() < 1e-12);
        // Without alignment, and with one as long as the way.
        assert_eq!(schedule(2, 0.0).pass(&mask, 0.0).candidates, Some(64));
        schedule(4, 0.9).validate().unwrap();
    }
}
