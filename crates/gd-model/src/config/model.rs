//! The shape of a model: the keys of `config.json`.

use gd_layer::{AttentionConfig, BeaconConfig, GdConfig};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

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
