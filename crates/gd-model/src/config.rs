//! What a model is made of and how it is trained: plain JSON, checked as a whole, unknown keys
//! refused.

use std::path::Path;

use gd_layer::{AttentionConfig, BeaconConfig, GdConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optimizer::AdamWConfig;
use crate::schedule::LrSchedule;

/// How the positions of a layer read each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mechanism {
    /// Softmax attention.
    Softmax,
    /// Selection attention.
    Gd,
}

/// The keys of `config.json`: those of Llama, and ours in the block `gd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// `["GdForCausalLM"]`; not read.
    #[serde(default = "architectures")]
    pub architectures: Vec<String>,
    /// `gd`; not read.
    #[serde(default = "model_type")]
    pub model_type: String,
    /// Tokens the model knows.
    pub vocab_size: usize,
    /// Width C.
    pub hidden_size: usize,
    /// Width of the feed-forward block.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key-value heads.
    pub num_key_value_heads: usize,
    /// Dimension of a head.
    pub head_dim: usize,
    /// The longest context, in tokens.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMSNorm.
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies. Read here or in `rope_parameters`, written in both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// The same, as newer configs have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether q, k, v projections have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// `silu`.
    #[serde(default = "hidden_act")]
    pub hidden_act: String,
    /// Type of the stored weights.
    #[serde(default = "dtype")]
    pub dtype: String,
    /// What Llama does not have.
    pub gd: GdBlock,
}

/// `rope_parameters` of newer configs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeParameters {
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// `default`.
    #[serde(default = "rope_type")]
    pub rope_type: String,
}

/// Our keys of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GdBlock {
    /// The mechanism of every layer, or one for all.
    pub mechanism: Vec<Mechanism>,
    /// RMSNorm on q and k.
    #[serde(default)]
    pub qk_norm: bool,
    /// Elementwise sigmoid gate on the heads' output.
    #[serde(default)]
    pub output_gate: bool,
    /// The preserving half; null leaves it out.
    #[serde(default)]
    pub beacon: Option<BeaconConfig>,
    /// How selecting layers select.
    #[serde(default)]
    pub select: GdConfig,
}

fn architectures() -> Vec<String> {
    vec!["GdForCausalLM".into()]
}
fn model_type() -> String {
    "gd".into()
}
fn rms_norm_eps() -> f64 {
    1e-5
}
fn hidden_act() -> String {
    "silu".into()
}
fn dtype() -> String {
    "float32".into()
}
fn rope_type() -> String {
    "default".into()
}

impl ModelConfig {
    /// Base of the rotary frequencies.
    pub fn theta(&self) -> f64 {
        self.rope_parameters.as_ref().map(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// The mechanism of a layer.
    pub fn mechanism(&self, layer: usize) -> Mechanism {
        self.gd.mechanism[layer.min(self.gd.mechanism.len() - 1)]
    }

    /// The attention layers' config.
    pub fn attention(&self) -> AttentionConfig {
        AttentionConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            attention_bias: self.attention_bias,
            qk_norm: self.gd.qk_norm,
            rms_norm_eps: self.rms_norm_eps,
            output_gate: self.gd.output_gate,
            beacon: self.gd.beacon.clone(),
            gd: self.gd.select.clone(),
        }
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// Names the first value that does not fit.
    pub fn validate(&self) -> Result<()> {
        let fail = |text: String| Err(Error::Invalid(text));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, x)| *x == 0) {
            return fail(format!("{name} is 0"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!("head_dim {} is odd; the rotary embedding needs pairs", self.head_dim));
        }
        if self.hidden_act != "silu" {
            return fail(format!("hidden_act {:?}; only silu is supported", self.hidden_act));
        }
        let n = self.gd.mechanism.len();
        if n != 1 && n != self.num_hidden_layers {
            return fail(format!("{n} mechanisms for {} layers (1 or {0} expected)", self.num_hidden_layers));
        }
        if let (Some(theta), Some(parameters)) = (self.rope_theta, &self.rope_parameters)
            && theta != parameters.rope_theta
        {
            return fail(format!(
                "rope_theta {theta} and rope_parameters.rope_theta {} differ",
                parameters.rope_theta
            ));
        }
        if let Some(r) = &self.rope_parameters
            && r.rope_type != "default"
        {
            return fail(format!("rope_type {:?}; only default is supported", r.rope_type));
        }
        Ok(self.attention().validate()?)
    }

    /// The config as `config.json` holds it, with the rotary base under both of its names.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        let theta = self.theta();
        let parameters = RopeParameters { rope_theta: theta, rope_type: rope_type() };
        let full = Self { rope_theta: Some(theta), rope_parameters: Some(parameters), ..self.clone() };
        serde_json::to_value(full).map_err(|e| Error::Invalid(format!("the config does not fit JSON: {e}")))
    }
}

/// What text becomes tokens with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum TokenizerChoice {
    /// One token a byte.
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
    pub accumulation: usize,
    /// Learning rate by step.
    pub lr: LrSchedule,
    /// The optimizer.
    pub adamw: AdamWConfig,
    /// Greatest norm of the gradient; a greater one is scaled down.
    pub clip: f64,
    /// Steps between two looks at the validation text.
    pub eval_every: u64,
    /// Share of the steps during which selecting layers blend their candidates (h = 0).
    pub blend_until: f64,
    /// Share of the steps from which they select (h = 1); in between h rises in a straight line.
    pub hard_from: f64,
    /// Share of every file, at its end, that is kept for validation.
    pub valid_fraction: f64,
    /// The tokenizer.
    pub tokenizer: TokenizerChoice,
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
        self.adamw.validate()
    }
}

/// A preset or a configuration file: a model and its training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model; its `vocab_size` is set by the tokenizer.
    pub model: ModelConfig,
    /// The training.
    pub train: TrainConfig,
}

/// The presets of models/ by name.
pub const PRESETS: &[(&str, &str)] = &[("tiny", include_str!("../../../models/tiny.json"))];

impl Recipe {
    /// A preset by name, or a JSON file.
    ///
    /// # Errors
    /// Names the file and the key or value that does not fit.
    pub fn load(name: &str) -> Result<Self> {
        if let Some((_, text)) = PRESETS.iter().find(|(preset, _)| *preset == name) {
            return Self::parse(text, Path::new(name));
        }
        let path = Path::new(name);
        if !path.exists() {
            let names: Vec<_> = PRESETS.iter().map(|p| p.0).collect();
            return Err(Error::Invalid(format!(
                "config {name:?} is neither a file nor a preset ({})",
                names.join(", ")
            )));
        }
        Self::parse(&crate::data::read_text(path)?, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self> {
        let recipe: Self =
            serde_json::from_str(text).map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))?;
        let named = |e: Error| Error::Invalid(format!("{}: {e}", path.display()));
        recipe.model.validate().map_err(named)?;
        recipe.train.validate().map_err(named)?;
        if recipe.train.context > recipe.model.max_position_embeddings {
            return Err(Error::Invalid(format!(
                "{}: train.context {} exceeds max_position_embeddings {}",
                path.display(),
                recipe.train.context,
                recipe.model.max_position_embeddings
            )));
        }
        Ok(recipe)
    }
}
