//! How a model is trained: the block `train` of a recipe.

use serde::{Deserialize, Serialize};

use crate::data::Reading;
use crate::error::{Error, Result};
use crate::guard::GuardConfig;
use crate::optimizer::{AdamWConfig, MuonConfig};
use crate::schedule::LrSchedule;

/// What text becomes tokens with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum TokenizerChoice {
    /// One token a byte.
    #[default]
    Bytes,
    /// Byte-pair encoding learned from the training text.
    Bpe {
        /// Tokens to learn.
        vocab: usize,
    },
}

/// How a run goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a micro-batch.
    pub batch: usize,
    /// Tokens a sequence.
    pub context: usize,
    /// Micro-batches a step.
    #[serde(default = "accumulation")]
    pub accumulation: usize,
    /// Learning rate by step.
    pub lr: LrSchedule,
    /// The optimizer.
    #[serde(default)]
    pub adamw: AdamWConfig,
    /// The optimizer of the blocks' matrices, if not AdamW.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonConfig>,
    /// Greatest norm of the gradient; a greater one is scaled down.
    #[serde(default = "clip")]
    pub clip: f64,
    /// When an update is skipped.
    #[serde(default)]
    pub guard: GuardConfig,
    /// Steps between two looks at the validation text.
    #[serde(default = "eval_every")]
    pub eval_every: u64,
    /// Share of the steps during which selecting layers blend their candidates (h = 0).
    #[serde(default)]
    pub blend_until: f64,
    /// Share of the steps from which they select (h = 1); in between h rises in a straight line.
    #[serde(default)]
    pub hard_from: f64,
    /// Share that is kept for validation: the end of every text file, or whole documents.
    #[serde(default = "valid_fraction")]
    pub valid_fraction: f64,
    /// How files become documents.
    #[serde(default)]
    pub documents: Reading,
    /// The tokenizer; prepared data brings its own.
    #[serde(default)]
    pub tokenizer: TokenizerChoice,
}

fn accumulation() -> usize {
    1
}
fn clip() -> f64 {
    1.0
}
fn eval_every() -> u64 {
    100
}
fn valid_fraction() -> f64 {
    0.1
}

impl TrainConfig {
    /// The share h of the hard forward pass at a step.
    pub fn hardness(&self, step: u64) -> f64 {
        let at = step as f64 / self.steps.max(1) as f64;
        if at >= self.hard_from {
            1.0
        } else {
            ((at - self.blend_until) / (self.hard_from - self.blend_until)).clamp(0.0, 1.0)
        }
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// Names the first value that does not fit.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        let counts = [("batch", self.batch), ("context", self.context), ("accumulation", self.accumulation)];
        if let Some((name, _)) = counts.iter().find(|(_, x)| *x == 0) {
            return fail(format!("train.{name} is 0"));
        }
        if self.steps == 0 || self.eval_every == 0 {
            return fail(format!(
                "train.steps {} and train.eval_every {} must be positive",
                self.steps, self.eval_every
            ));
        }
        if !(0.0..=1.0).contains(&self.blend_until) || !(self.blend_until..=1.0).contains(&self.hard_from) {
            return fail(format!(
                "train.blend_until {} and train.hard_from {} must rise within 0..=1",
                self.blend_until, self.hard_from
            ));
        }
        if !(self.valid_fraction > 0.0 && self.valid_fraction < 1.0) {
            return fail(format!("train.valid_fraction {} is outside (0, 1)", self.valid_fraction));
        }
        if self.clip.is_nan() || self.clip <= 0.0 {
            return fail(format!("train.clip {} is not positive", self.clip));
        }
        self.lr.validate(self.steps)?;
        self.guard.validate()?;
        self.muon.as_ref().map_or(Ok(()), MuonConfig::validate)?;
        self.adamw.validate()
    }
}
