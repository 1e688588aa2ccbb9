//! The shape of a model: the keys of `config.json`.

use gd_layer::{AttentionConfig, BeaconConfig, GdConfig, RopeScaling};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{llama, parse};
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
    /// The Python code beside the checkpoint; written, not read.
    #[serde(default, skip_serializing)]
    pub auto_map: IgnoredAny,
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
    /// The same, as newer configs have it, and how the frequencies are scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the output projection is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether q, k, v projections have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the projections of the feed-forward block have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    /// `silu`.
    #[serde(default = "hidden_act")]
    pub hidden_act: String,
    /// Type of the stored weights.
    #[serde(default = "dtype")]
    pub dtype: String,
    /// What Llama does not have.
    pub gd: GdBlock,
    /// The `config.json` of another family that this was translated from: what is written for as long as it
    /// says the same.
    #[serde(skip)]
    pub origin: Option<Value>,
}

/// `rope_parameters` of newer configs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeParameters {
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// `default`, `linear` or `llama3`.
    #[serde(default = "rope_type")]
    pub rope_type: String,
    /// Of `linear` and `llama3`; see [`RopeScaling`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Of `llama3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// Of `llama3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// Of `llama3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub original_max_position_embeddings: Option<usize>,
}

impl RopeParameters {
    /// Frequencies of this base, not scaled.
    pub fn plain(rope_theta: f64) -> Self {
        Self {
            rope_theta,
            rope_type: rope_type(),
            factor: None,
            low_freq_factor: None,
            high_freq_factor: None,
            original_max_position_embeddings: None,
        }
    }

    /// How the frequencies are scaled.
    ///
    /// # Errors
    /// An unknown type, or one without a value that it needs.
    pub fn scaling(&self) -> Result<RopeScaling> {
        let needs = |name: &str| Error::Invalid(format!("rope_type {:?} without {name}", self.rope_type));
        let factor = || self.factor.ok_or_else(|| needs("factor"));
        known_rope_type(&self.rope_type)?;
        match self.rope_type.as_str() {
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_turns: self.low_freq_factor.ok_or_else(|| needs("low_freq_factor"))?,
                high_turns: self.high_freq_factor.ok_or_else(|| needs("high_freq_factor"))?,
                trained_positions: self
                    .original_max_position_embeddings
                    .ok_or_else(|| needs("original_max_position_embeddings"))?,
            }),
            _ => Ok(RopeScaling::None),
        }
    }
}

/// Refuses rotary frequencies that are scaled in another way than those of [`RopeScaling`].
pub(super) fn known_rope_type(name: &str) -> Result<()> {
    if ["default", "linear", "llama3"].contains(&name) {
        return Ok(());
    }
    Err(Error::Invalid(format!("rope_type {name:?} is not supported (default, linear and llama3 are)")))
}

/// Our keys of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GdBlock {
    /// The mechanism of every layer, or one for all.
    pub mechanism: Vec<Mechanism>,
    /// Keys that a query of a layer sees at most, counted back from its own position; null is no limit. One
    /// for every layer, one for all, or nothing.
    #[serde(default)]
    pub windows: Vec<Option<usize>>,
    /// RMSNorm on q and k.
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether `o_proj` has a bias.
    #[serde(default)]
    pub output_bias: bool,
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

pub(super) fn architectures() -> Vec<String> {
    vec!["GdForCausalLM".into()]
}
pub(super) fn model_type() -> String {
    "gd".into()
}
fn rms_norm_eps() -> f64 {
    1e-5
}
fn hidden_act() -> String {
    "silu".into()
}
pub(super) fn dtype() -> String {
    "float32".into()
}
fn rope_type() -> String {
    "default".into()
}

/// The most of anything that a config counts, many times what models have: products of two stay far from
/// overflowing.
const MOST: usize = 1 << 24;
/// The most layers: a config may hold a list as long.
const MOST_LAYERS: usize = 1 << 12;
/// The most numbers in the table of the rotary angles.
const MOST_ANGLES: usize = 1 << 31;

/// Fails with the first of the named sizes that is more than any model has.
pub(super) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    for &(name, size) in sizes {
        let most = if name == "num_hidden_layers" { MOST_LAYERS } else { MOST };
        if size > most {
            return Err(Error::Invalid(format!("{name} {size} exceeds {most}")));
        }
    }
    Ok(())
}

/// Keys that `save_pretrained` of transformers adds to ours, and token ids, which are read beside the config. None
/// changes what the model computes.
const NOT_OF_THE_MODEL: [&str; 6] =
    ["_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"];

impl ModelConfig {
    /// Reads a `config.json`: ours, which has a block `gd`, or that of another family, which is translated.
    ///
    /// # Errors
    /// Every problem: a key or value that does not fit, or a family that is not known.
    pub fn from_json(mut json: Value) -> std::result::Result<Self, Vec<String>> {
        if json.get("gd").is_none() {
            return llama::translate(json);
        }
        if let Value::Object(keys) = &mut json {
            keys.retain(|key, _| !NOT_OF_THE_MODEL.contains(&key.as_str()));
            // As older versions of transformers name it.
            if let Some(dtype) = keys.remove("torch_dtype") {
                keys.entry("dtype").or_insert(dtype);
            }
        }
        parse(json)
    }

    /// Base of the rotary frequencies.
    pub fn theta(&self) -> f64 {
        self.rope_parameters.as_ref().map(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// How the rotary frequencies are scaled.
    ///
    /// # Errors
    /// As [`RopeParameters::scaling`].
    pub fn rope_scaling(&self) -> Result<RopeScaling> {
        self.rope_parameters.as_ref().map_or(Ok(RopeScaling::None), RopeParameters::scaling)
    }

    /// The mechanism of a layer.
    pub fn mechanism(&self, layer: usize) -> Mechanism {
        self.gd.mechanism[layer.min(self.gd.mechanism.len() - 1)]
    }

    /// The window of a layer, if it has one.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let windows = &self.gd.windows;
        windows.get(layer).or(windows.last()).copied().flatten()
    }

    /// The config of a layer's attention.
    pub fn attention(&self, layer: usize) -> AttentionConfig {
        AttentionConfig {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            attention_bias: self.attention_bias,
            output_bias: self.gd.output_bias,
            qk_norm: self.gd.qk_norm,
            rms_norm_eps: self.rms_norm_eps,
            output_gate: self.gd.output_gate,
            window: self.window(layer),
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
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, x)| *x == 0) {
            return fail(format!("{name} is 0"));
        }
        check_sizes(&sizes)?;
        let (positions, d) = (self.max_position_embeddings, self.head_dim);
        if positions.saturating_mul(d) > MOST_ANGLES {
            return fail(format!(
                "max_position_embeddings {positions} times head_dim {d} exceeds {MOST_ANGLES}"
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!("head_dim {} is odd; the rotary embedding needs pairs", self.head_dim));
        }
        if self.hidden_act != "silu" {
            return fail(format!("hidden_act {:?}; only silu is supported", self.hidden_act));
        }
        let layers = self.num_hidden_layers;
        let n = self.gd.mechanism.len();
        if n != 1 && n != layers {
            return fail(format!("{n} mechanisms for {layers} layers (1 or {layers} expected)"));
        }
        let n = self.gd.windows.len();
        if n > 1 && n != layers {
            return fail(format!("{n} windows for {layers} layers (0, 1 or {layers} expected)"));
        }
        if let (Some(theta), Some(parameters)) = (self.rope_theta, &self.rope_parameters)
            && theta != parameters.rope_theta
        {
            return fail(format!(
                "rope_theta {theta} and rope_parameters.rope_theta {} differ",
                parameters.rope_theta
            ));
        }
        self.rope_scaling()?;
        (0..layers.min(n.max(1))).try_for_each(|layer| self.attention(layer).validate())?;
        Ok(())
    }

    /// Whether it is still that of the family it came from.
    pub fn is_foreign(&self) -> bool {
        self.origin.as_ref().is_some_and(|origin| llama::translate(origin.clone()).as_ref() == Ok(self))
    }

    /// The config as `config.json` holds it: as it came, if it is another family's, else in our keys, with the
    /// rotary base under both of its names and the Python code beside the checkpoint.
    pub fn to_json(&self) -> Result<Value> {
        if let Some(origin) = self.origin.as_ref().filter(|_| self.is_foreign()) {
            let mut origin = origin.clone();
            // The older name stays where it was used.
            let name = if origin.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
            origin[name] = json!(self.dtype);
            return Ok(origin);
        }
        let theta = self.theta();
        let parameters = self.rope_parameters.clone().unwrap_or_else(|| RopeParameters::plain(theta));
        let full = Self { rope_theta: Some(theta), rope_parameters: Some(parameters), ..self.clone() };
        let mut json = serde_json::to_value(full)
            .map_err(|e| Error::Invalid(format!("the config does not fit JSON: {e}")))?;
        json["auto_map"] = json!({
            "AutoConfig": "configuration_gd.GdConfig",
            "AutoModelForCausalLM": "modeling_gd.GdForCausalLM",
        });
        Ok(json)
    }
}
