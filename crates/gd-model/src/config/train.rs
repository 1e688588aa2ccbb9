//! How a model is trained: the block `train` of a recipe.

use candle_core::{DType, Device};
use gd_kernels::Mask;
use serde::{Deserialize, Serialize};

use super::select::SelectSchedule;
use crate::data::Reading;
use crate::error::{Error, Result};
use crate::train::ema::EmaConfig;
use crate::train::guard::GuardConfig;
use crate::train::optimizer::{AdamWConfig, MuonConfig};
use crate::train::schedule::LrSchedule;
use crate::train::teacher::UptrainConfig;

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

/// What a model in training computes in, and what its parameters are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32.
    F32,
    /// bf16; the optimizer keeps its moments and a master of every parameter in f32.
    Bf16,
}

impl Precision {
    /// candle's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// How a run goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// What it computes in; if it is left out, bf16 on a CUDA device and f32 elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
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
    /// The average of the parameters that is kept beside them, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// Greatest norm of the gradient; a greater one is scaled down.
    #[serde(default = "clip")]
    pub clip: f64,
    /// When an update is skipped.
    #[serde(default)]
    pub guard: GuardConfig,
    /// Steps between two looks at the validation text.
    #[serde(default = "eval_every")]
    pub eval_every: u64,
    /// Steps between two checkpoints; a tenth of the run, and at most 500, if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_every: Option<u64>,
    /// The newest checkpoints that are kept, beside the one of the least validation loss.
    #[serde(default = "keep")]
    pub keep: usize,
    /// Steps between two samples for the log; none are made without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_every: Option<u64>,
    /// What a sample continues.
    #[serde(default = "sample_prompt")]
    pub sample_prompt: String,
    /// How selection changes over the run.
    #[serde(default)]
    pub select: SelectSchedule,
    /// Whether the backward pass computes the inside of every block again instead of keeping it.
    #[serde(default)]
    pub checkpoint_blocks: bool,
    /// Share that is kept for validation: the end of every text file, or whole documents.
    #[serde(default = "valid_fraction")]
    pub valid_fraction: f64,
    /// How files become documents.
    #[serde(default)]
    pub documents: Reading,
    /// The tokenizer; prepared data brings its own.
    #[serde(default)]
    pub tokenizer: TokenizerChoice,
    /// The model that this one was and learns from, if it is one whose attention was changed; it brings its
    /// tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptrain: Option<UptrainConfig>,
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
fn sample_prompt() -> String {
    "The ".into()
}
fn valid_fraction() -> f64 {
    0.1
}
fn keep() -> usize {
    2
}

impl TrainConfig {
    /// What a run on this device computes in.
    pub fn precision(&self, device: &Device) -> Precision {
        self.precision.unwrap_or(if device.is_cuda() { Precision::Bf16 } else { Precision::F32 })
    }

    /// Steps between two checkpoints.
    pub fn save_every(&self) -> u64 {
        self.save_every.unwrap_or(self.steps.div_ceil(10).min(500))
    }

    /// Whether a step, from 0, aligns layers with those of an original.
    pub fn aligns(&self, step: u64) -> bool {
        self.uptrain.as_ref().is_some_and(|uptrain| uptrain.aligns(step, self.steps))
    }

    /// Every value that a step takes from a schedule. A run may become longer where these stay the same for
    /// the steps that it has done.
    pub fn scheduled(&self, step: u64) -> impl PartialEq + use<> {
        let mask = Mask::causal(0);
        let pass = self.select.pass(&mask, step as f64 / self.steps.max(1) as f64);
        let select = (pass.candidates, pass.hardness, pass.preserve_floor, pass.temperature, pass.threshold);
        (self.lr.lr(step, self.steps), select, self.aligns(step))
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
        if self.save_every == Some(0) || self.keep == 0 {
            return fail("train.save_every and train.keep must be positive".into());
        }
        if self.steps == 0 || self.eval_every == 0 {
            return fail(format!(
                "train.steps {} and train.eval_every {} must be positive",
                self.steps, self.eval_every
            ));
        }
        if self.sample_every == Some(0) || self.sample_prompt.is_empty() {
            return fail("train.sample_every must be positive and train.sample_prompt not empty".into());
        }
        if !(self.valid_fraction > 0.0 && self.valid_fraction < 1.0) {
            return fail(format!("train.valid_fraction {} is outside (0, 1)", self.valid_fraction));
        }
        if self.clip.is_nan() || self.clip <= 0.0 {
            return fail(format!("train.clip {} is not positive", self.clip));
        }
        self.lr.validate(self.steps)?;
        self.guard.validate()?;
        self.select.validate()?;
        self.ema.as_ref().map_or(Ok(()), EmaConfig::validate)?;
        self.uptrain.as_ref().map_or(Ok(()), UptrainConfig::validate)?;
        self.muon.as_ref().map_or(Ok(()), MuonConfig::validate)?;
        self.adamw.validate()
    }
}
