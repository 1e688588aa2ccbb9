//! How a model is trained: the block `train` of a recipe.

use std::ops::RangeInclusive;

use candle_core::{DType, Device};
use gd_kernels::MatmulPrecision;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first, inside};
use super::model::MAX_SIZE;
use super::{
    AdamWConfig, DocumentFormat, EmaConfig, GuardConfig, LoraConfig, LrSchedule, MuonConfig, SelectSchedule,
    UptrainConfig,
};
use crate::error::{Error, Result};

/// The number of byte values, which every vocabulary that is learned contains.
const BYTES: usize = 256;

/// The number of tokens of a BPE vocabulary that is learned.
pub(crate) const BPE_VOCAB: RangeInclusive<usize> = BYTES + 1..=MAX_SIZE;

/// The maximal number of steps.
const MAX_STEPS: u64 = 1_000_000_000;
/// The maximal number of micro-batches, of sequences in one of them, and of checkpoints that are kept.
const MAX_COUNT: u64 = 1 << 20;
/// The maximal number of tokens of a step, so that the tokens of a run can be counted.
const MAX_STEP_TOKENS: u64 = 1 << 31;

/// The tokenizer of a new model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum TokenizerChoice {
    /// One token per byte.
    #[default]
    Bytes,
    /// Byte-pair encoding, trained on the training text.
    Bpe {
        /// The size of the vocabulary.
        vocab: usize,
    },
}

/// The precision of a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// The fastest one: bf16 on a CUDA device, `bf16_mixed` on a CPU with AMX, else f32.
    Auto,
    /// f32.
    F32,
    /// Parameters and activations in bf16. The optimizer keeps its moments and a master copy of every parameter in f32.
    Bf16,
    /// Parameters and activations in f32; the projections of the model and their gradients are products of matrices that
    /// are rounded to bf16, with sums in f32 ([`gd_kernels::with_matmul_precision`]). Only on the CPU. Evaluations are
    /// computed in f32.
    Bf16Mixed,
}

impl Precision {
    /// The precision on `device`: never [`Precision::Auto`].
    pub fn on(self, device: &Device) -> Self {
        match self {
            Self::Auto if device.is_cuda() => Self::Bf16,
            Self::Auto if device.is_cpu() && MatmulPrecision::fastest() == MatmulPrecision::Bf16 => {
                Self::Bf16Mixed
            }
            Self::Auto => Self::F32,
            chosen => chosen,
        }
    }

    /// The name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Bf16Mixed => "bf16_mixed",
        }
    }

    /// The dtype of parameters and activations.
    pub fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::Auto | Self::F32 | Self::Bf16Mixed => DType::F32,
        }
    }

    /// The precision of products of f32 matrices.
    pub fn matmul(self) -> MatmulPrecision {
        match self {
            Self::Bf16Mixed => MatmulPrecision::Bf16,
            Self::Auto | Self::F32 | Self::Bf16 => MatmulPrecision::F32,
        }
    }
}

/// The settings of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The number of optimizer steps.
    pub steps: u64,
    /// The precision. Default: bf16 on a CUDA device, f32 elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    /// Sequences per micro-batch.
    pub batch: usize,
    /// Tokens per sequence.
    pub context: usize,
    /// Micro-batches per step. Default: 1.
    #[serde(default = "accumulation")]
    pub accumulation: usize,
    /// The learning rate by step.
    pub lr: LrSchedule,
    /// Settings of AdamW.
    #[serde(default)]
    pub adamw: AdamWConfig,
    /// Settings of Muon. If they are given, Muon updates the matrices of the blocks and AdamW the other parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonConfig>,
    /// Settings of an exponential moving average of the parameters. Without them there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// The maximal norm of the gradient, above which it is scaled down. Default: 1.
    #[serde(default = "clip")]
    pub clip: f64,
    /// Settings of the guard against diverging updates.
    #[serde(default)]
    pub guard: GuardConfig,
    /// Steps between two evaluations on the start of the validation text. Default: 100.
    #[serde(default = "eval_every")]
    pub eval_every: u64,
    /// Steps between two checkpoints. Default: a tenth of the run, but at most 500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub save_every: Option<u64>,
    /// The number of newest checkpoints that are not deleted. The one with the lowest validation loss is never deleted.
    /// Default: 2.
    #[serde(default = "keep")]
    pub keep: usize,
    /// Steps between two texts that the model generates for the log. Without it there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sample_every: Option<u64>,
    /// The prompt of these texts.
    #[serde(default = "sample_prompt")]
    pub sample_prompt: String,
    /// How selection changes over the run.
    #[serde(default)]
    pub select: SelectSchedule,
    /// Whether the backward pass recomputes the activations of every block, which saves memory (activation
    /// checkpointing).
    #[serde(default)]
    pub checkpoint_blocks: bool,
    /// The fraction of the text for validation, in [0, 1): the end of every text file, or whole documents. With 0 the
    /// training has no validation.
    #[serde(default = "valid_fraction")]
    pub valid_fraction: f64,
    /// How text files are divided into documents.
    #[serde(default)]
    pub documents: DocumentFormat,
    /// The tokenizer: `bytes`, or `{"bpe": {"vocab": N}}`, which is learned from the training text. Prepared data has its own.
    #[serde(default)]
    pub tokenizer: TokenizerChoice,
    /// Settings of uptraining, in which the model learns from a teacher with another attention mechanism. The tokenizer
    /// is that of the teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptrain: Option<UptrainConfig>,
    /// Settings of an adapter of low rank, which is trained in the place of the weights of a model (`gd train --from`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
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
    /// The precision of a run on `device`.
    pub fn precision(&self, device: &Device) -> Precision {
        let default = if device.is_cuda() { Precision::Bf16 } else { Precision::F32 };
        self.precision.unwrap_or(default).on(device)
    }

    /// Steps between two checkpoints.
    pub fn save_every(&self) -> u64 {
        self.save_every.unwrap_or(self.steps.div_ceil(10).min(500))
    }

    /// Whether `step`, counted from 0, aligns layers with those of the teacher.
    pub fn aligns(&self, step: u64) -> bool {
        self.uptrain.as_ref().is_some_and(|uptrain| uptrain.aligns(step, self.steps))
    }

    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let counts = [
            ("train.batch", self.batch as u64, MAX_COUNT),
            ("train.context", self.context as u64, MAX_SIZE as u64),
            ("train.accumulation", self.accumulation as u64, MAX_COUNT),
            ("train.keep", self.keep as u64, MAX_COUNT),
            // More than all steps stands for never.
            ("train.save_every", self.save_every.unwrap_or(1), u64::MAX),
            ("train.steps", self.steps, MAX_STEPS),
            ("train.eval_every", self.eval_every, u64::MAX),
            ("train.sample_every", self.sample_every.unwrap_or(1), u64::MAX),
        ];
        let mut checks = Checks::default();
        for (name, count, max) in counts {
            checks.require(count > 0, name, 0, "at least 1");
            checks.require(count <= max, name, count, format!("at most {max}"));
        }
        let [batch, context, accumulation] = [self.batch, self.context, self.accumulation].map(|n| n as u64);
        let tokens = batch.saturating_mul(context).saturating_mul(accumulation);
        if tokens > MAX_STEP_TOKENS {
            checks.add(Err(Error::Invalid(format!(
                "train.batch {batch} times train.context {context} times train.accumulation {accumulation} exceeds the \
                 {MAX_STEP_TOKENS} tokens that a step may have"
            ))));
        }
        checks.require(!self.sample_prompt.is_empty(), "train.sample_prompt", "\"\"", "a text");
        let Self { valid_fraction, clip, .. } = *self;
        checks.require(
            (0.0..1.0).contains(&valid_fraction),
            "train.valid_fraction",
            valid_fraction,
            "in [0, 1)",
        );
        checks.require(clip > 0.0, "train.clip", clip, "above 0");
        if self.steps > 0 {
            checks.extend(self.lr.problems(self.steps));
        }
        checks.extend(inside("train", self.guard.problems()));
        checks.extend(self.select.problems());
        checks.add(self.ema.as_ref().map_or(Ok(()), EmaConfig::validate));
        checks.extend(self.uptrain.as_ref().map_or(Vec::new(), UptrainConfig::problems));
        checks.extend(self.lora.as_ref().map_or(Vec::new(), LoraConfig::problems));
        checks.extend(self.contradicting_lora());
        let muon = self.muon.as_ref().map_or(Vec::new(), MuonConfig::problems);
        checks.extend(inside("train", muon));
        checks.extend(inside("train", self.adamw.problems()));
        checks.add(self.documents.validate());
        if let TokenizerChoice::Bpe { vocab } = self.tokenizer {
            let allowed = format!("from {} to {}", BPE_VOCAB.start(), BPE_VOCAB.end());
            checks.require(BPE_VOCAB.contains(&vocab), "train.tokenizer.bpe.vocab", vocab, allowed);
        }
        checks.into_problems()
    }

    /// Settings that a run with an adapter cannot have.
    fn contradicting_lora(&self) -> Vec<Error> {
        let others = [
            ("train.uptrain", self.uptrain.is_some()),
            ("train.muon", self.muon.is_some()),
            ("train.ema", self.ema.is_some()),
            ("train.select.calibrate_thresholds", self.select.calibrate_thresholds),
        ];
        let others = others.into_iter().filter(|(_, is_set)| *is_set && self.lora.is_some());
        others.map(|(name, _)| Error::Invalid(format!("{name} cannot be combined with train.lora"))).collect()
    }
}
