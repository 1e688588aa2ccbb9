//! The configuration of a model: the keys of `config.json`.

use gd_kernels::{CANDIDATES, Estimator, Gate, MAX_PICKS};
use gd_layer::{AttentionConfig, BeaconConfig, GdConfig, MechanismAttention, RopeScaling};
use schemars::JsonSchema;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::checks::{Checks, first};
use super::{Mechanism, llama, parse};
use crate::error::{ConfigProblem, Error, Result};

/// The name of the embedding among the weights.
pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
/// The name of the output projection, if it is not tied to the embedding.
pub(crate) const HEAD: &str = "lm_head.weight";

/// The configuration of a model: the keys of a Llama `config.json`, and those of this crate in the block `gd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// `["GdForCausalLM"]`. Written, not used.
    #[serde(default = "architectures")]
    pub architectures: Vec<String>,
    /// `gd`. Written, not used.
    #[serde(default = "model_type")]
    pub model_type: String,
    /// The Python classes beside the checkpoint. Written, not used.
    #[serde(default, skip_serializing)]
    #[schemars(with = "Value")]
    pub auto_map: IgnoredAny,
    /// The size V of the vocabulary.
    pub vocab_size: usize,
    /// The width C of the hidden states.
    pub hidden_size: usize,
    /// The width of the feed-forward blocks.
    pub intermediate_size: usize,
    /// The number of layers.
    pub num_hidden_layers: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key-value heads (grouped-query attention).
    pub num_key_value_heads: usize,
    /// The dimension D of a head. Even, because of the rotary embedding.
    pub head_dim: usize,
    /// The maximal context in tokens.
    pub max_position_embeddings: usize,
    /// The epsilon of every RMSNorm. Default: 1e-5.
    #[serde(default = "rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies. Read here or in `rope_parameters`, written in both. Default: 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// The base and the scaling of the rotary frequencies, in the form of newer configurations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the output projection shares its weights with the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether the projections of the feed-forward blocks have a bias.
    #[serde(default)]
    pub mlp_bias: bool,
    /// The activation of the feed-forward blocks; `silu` is supported.
    #[serde(default = "hidden_act")]
    pub hidden_act: String,
    /// The dtype of the stored weights, such as `float32` or `bfloat16`.
    #[serde(default = "dtype")]
    pub dtype: String,
    /// The settings that Llama does not have.
    pub gd: GdBlock,
    /// The `config.json` of another family that this configuration was translated from. It is written instead of the
    /// translation as long as both describe the same model.
    #[serde(skip)]
    pub origin: Option<Value>,
}

/// The rotary embedding: `rope_parameters` of newer configurations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RopeParameters {
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// `default`, `linear` or `llama3`.
    #[serde(default = "rope_type")]
    pub rope_type: String,
    /// The factor of `linear` and `llama3`, see [`RopeScaling`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// A parameter of `llama3`, see [`RopeScaling`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_freq_factor: Option<f64>,
    /// A parameter of `llama3`, see [`RopeScaling`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_freq_factor: Option<f64>,
    /// The context before the scaling, a parameter of `llama3`.
    #[serde(default, rename = "original_max_position_embeddings", skip_serializing_if = "Option::is_none")]
    pub unscaled_context: Option<usize>,
}

impl RopeParameters {
    /// Unscaled frequencies of this base.
    pub fn plain(rope_theta: f64) -> Self {
        Self {
            rope_theta,
            rope_type: rope_type(),
            factor: None,
            low_freq_factor: None,
            high_freq_factor: None,
            unscaled_context: None,
        }
    }

    /// The scaling of the frequencies.
    ///
    /// # Errors
    /// A type that is not supported, or the absence of one of its parameters.
    pub fn scaling(&self) -> Result<RopeScaling> {
        let needs = |name: &str| Error::Invalid(format!("rope_type {:?} without {name}", self.rope_type));
        let factor = || self.factor.ok_or_else(|| needs("factor"));
        check_rope_type(&self.rope_type)?;
        match self.rope_type.as_str() {
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_turns: self.low_freq_factor.ok_or_else(|| needs("low_freq_factor"))?,
                high_turns: self.high_freq_factor.ok_or_else(|| needs("high_freq_factor"))?,
                trained_positions: self
                    .unscaled_context
                    .ok_or_else(|| needs("original_max_position_embeddings"))?,
            }),
            _ => Ok(RopeScaling::None),
        }
    }
}

/// Checks that a `rope_type` is one of [`RopeScaling`].
pub(super) fn check_rope_type(name: &str) -> Result<()> {
    if ["default", "linear", "llama3"].contains(&name) {
        return Ok(());
    }
    Err(Error::Invalid(format!("rope_type {name:?} is not supported (default, linear and llama3 are)")))
}

/// The settings of this crate in `config.json`: its block `gd`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GdBlock {
    /// The mechanism of every layer, or a single one for all layers: `gd`, `softmax` or another, by its name or as an
    /// object with parameters, `{"name": "topk", "k": 4}`.
    #[schemars(with = "Vec<Value>")]
    pub mechanism: Vec<Mechanism>,
    /// The sliding window of every layer in tokens, `null` for full attention. One entry per layer, a single one for all
    /// layers, or none.
    #[serde(default)]
    pub windows: Vec<Option<usize>>,
    /// The number of heads of every layer that read keys, the first ones; the other heads are the Beacon's running
    /// averages alone, without queries, keys and cache. One entry per layer, a single one for all layers, or none for all
    /// heads. For layers that select and softmax layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub selecting_heads: Vec<usize>,
    /// The number of heads of every layer, the first ones, that match content without positions and read what follows the
    /// match: their queries and keys are not rotated, and the key at a position is that of the position before it. One
    /// entry per layer, a single one for all layers, or none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub induction_heads: Vec<usize>,
    /// Whether queries and keys are normalized by RMSNorm.
    #[serde(default)]
    pub qk_norm: bool,
    /// Whether `o_proj` has a bias.
    #[serde(default)]
    pub output_bias: bool,
    /// Whether an elementwise sigmoid gate scales the output of the heads.
    #[serde(default)]
    pub output_gate: bool,
    /// The settings of the Beacon; `null` for none.
    #[serde(default)]
    pub beacon: Option<BeaconConfig>,
    /// The settings of selection.
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

/// The maximum of every size of a configuration. It is far above the sizes of models, and so small that the product of
/// two sizes does not overflow.
pub(super) const MAX_SIZE: usize = 1 << 24;
/// The maximal number of layers.
const MAX_LAYERS: usize = 1 << 12;
/// The maximal number of refinement rounds, of running averages per head, and of tokens of a convolution.
const MAX_PARTS: usize = 1 << 10;
/// The maximal number of elements in the table of rotary angles.
const MAX_ANGLES: usize = 1 << 31;

/// Checks that each size is at most its maximum.
pub(super) fn check_sizes(sizes: &[(&str, usize)]) -> Result<()> {
    for &(name, size) in sizes {
        let max = if name == "num_hidden_layers" { MAX_LAYERS } else { MAX_SIZE };
        if size > max {
            return Err(Error::out_of_range(name, size, format!("at most {max}")));
        }
    }
    Ok(())
}

/// Keys that `save_pretrained` of transformers adds, and ids of special tokens, which are read from other files. None of
/// them changes what the model computes.
const NOT_OF_THE_MODEL: [&str; 6] =
    ["_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache"];

/// The entry of a layer in a list with one for every layer, a single one for all layers, or none.
fn of_layer<T: Copy>(entries: &[T], layer: usize) -> Option<T> {
    entries.get(layer).or(entries.last()).copied()
}

impl ModelConfig {
    /// Reads a `config.json`. Without a block `gd` it is that of another family, which is translated.
    ///
    /// # Errors
    /// Every problem: keys and values that cannot be used, or a family that is not supported.
    pub fn from_json(mut json: Value) -> std::result::Result<Self, Vec<ConfigProblem>> {
        if json.get("gd").is_none() {
            return llama::translate(json);
        }
        if let Value::Object(keys) = &mut json {
            keys.retain(|key, _| !NOT_OF_THE_MODEL.contains(&key.as_str()));
            // The name in older versions of transformers.
            if let Some(dtype) = keys.remove("torch_dtype") {
                keys.entry("dtype").or_insert(dtype);
            }
        }
        parse(json)
    }

    /// The base of the rotary frequencies.
    pub fn theta(&self) -> f64 {
        self.rope_parameters.as_ref().map(|r| r.rope_theta).or(self.rope_theta).unwrap_or(10_000.0)
    }

    /// The scaling of the rotary frequencies.
    ///
    /// # Errors
    /// As [`RopeParameters::scaling`].
    pub fn rope_scaling(&self) -> Result<RopeScaling> {
        self.rope_parameters.as_ref().map_or(Ok(RopeScaling::None), RopeParameters::scaling)
    }

    /// The mechanism of a layer.
    pub fn mechanism(&self, layer: usize) -> &Mechanism {
        &self.gd.mechanism[layer.min(self.gd.mechanism.len() - 1)]
    }

    /// The sliding window of a layer in tokens; `None` for full attention.
    pub fn window(&self, layer: usize) -> Option<usize> {
        of_layer(&self.gd.windows, layer).flatten()
    }

    /// The number of heads of a layer that read keys; `None` for all.
    pub fn selecting_heads(&self, layer: usize) -> Option<usize> {
        of_layer(&self.gd.selecting_heads, layer)
    }

    /// The number of heads of a layer that read what follows a match of their content.
    pub fn induction_heads(&self, layer: usize) -> usize {
        of_layer(&self.gd.induction_heads, layer).unwrap_or(0)
    }

    /// The configuration of the attention of a layer.
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
            selecting_heads: self.selecting_heads(layer),
            induction_heads: self.induction_heads(layer),
            beacon: self.gd.beacon.clone(),
            gd: self.gd.select.clone(),
        }
    }

    /// Checks the range of every value, and the values against each other.
    ///
    /// # Errors
    /// The first value that cannot be used.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values that cannot be used.
    pub(super) fn problems(&self) -> Vec<Error> {
        let mut checks = Checks::default();
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
        for (name, size) in sizes {
            checks.require(size > 0, name, 0, "at least 1");
            checks.add(check_sizes(&[(name, size)]));
        }
        let (positions, d, layers) = (self.max_position_embeddings, self.head_dim, self.num_hidden_layers);
        if positions.saturating_mul(d) > MAX_ANGLES {
            let text = format!("max_position_embeddings {positions} times head_dim {d} exceeds {MAX_ANGLES}");
            checks.add(Err(Error::Invalid(text)));
        }
        checks.require(d.is_multiple_of(2), "head_dim", d, "even, because the rotary embedding turns pairs");
        checks.require(self.hidden_act == "silu", "hidden_act", format!("{:?}", self.hidden_act), "silu");
        let (mechanisms, windows) = (self.gd.mechanism.len(), self.gd.windows.len());
        if mechanisms != 1 && mechanisms != layers {
            let text = format!("{mechanisms} mechanisms for {layers} layers (1 or {layers} expected)");
            checks.add(Err(Error::Invalid(text)));
        }
        let (selecting, induction) = (self.gd.selecting_heads.len(), self.gd.induction_heads.len());
        for (name, entries) in
            [("windows", windows), ("selecting_heads", selecting), ("induction_heads", induction)]
        {
            if entries > 1 && entries != layers {
                let text = format!("{entries} {name} for {layers} layers (0, 1 or {layers} expected)");
                checks.add(Err(Error::Invalid(text)));
            }
        }
        if let (Some(theta), Some(parameters)) = (self.rope_theta, &self.rope_parameters)
            && theta != parameters.rope_theta
        {
            let other = parameters.rope_theta;
            let text = format!("rope_theta {theta} and rope_parameters.rope_theta {other} differ");
            checks.add(Err(Error::Invalid(text)));
        }
        checks.add(self.rope_scaling().map(|_| ()));
        self.check_numbers(&mut checks);
        self.check_selection(&mut checks);
        let problems = checks.into_problems();
        if !problems.is_empty() {
            return problems;
        }
        let check = |layer| -> Result<()> {
            match self.mechanism(layer) {
                Mechanism::Other(other) => MechanismAttention::validate(&self.attention(layer), other)?,
                Mechanism::Softmax | Mechanism::SoftmaxNull | Mechanism::Gd => {
                    self.attention(layer).validate()?
                }
            }
            Ok(())
        };
        // Layers beyond the longer list have the configuration of the last one in it.
        let longest = mechanisms.max(windows).max(selecting).max(induction);
        (0..longest).find_map(|layer| check(layer).err()).into_iter().collect()
    }

    /// Checks the ranges of the windows, of the epsilon and of the rotary embedding.
    fn check_numbers(&self, checks: &mut Checks) {
        for &window in self.gd.windows.iter().flatten() {
            let fits = (1..=MAX_SIZE).contains(&window);
            checks.require(fits, "gd.windows", window, format!("from 1 to {MAX_SIZE}"));
        }
        let eps = self.rms_norm_eps;
        checks.require(eps >= 0.0 && eps.is_finite(), "rms_norm_eps", eps, "at least 0");
        let mut positive = |name: &str, value: Option<f64>| {
            let Some(value) = value else { return };
            checks.require(value > 0.0 && value.is_finite(), name, value, "above 0");
        };
        positive("rope_theta", self.rope_theta);
        let Some(rope) = &self.rope_parameters else { return };
        positive("rope_parameters.rope_theta", Some(rope.rope_theta));
        positive("rope_parameters.factor", rope.factor);
        positive("rope_parameters.low_freq_factor", rope.low_freq_factor);
        positive("rope_parameters.high_freq_factor", rope.high_freq_factor);
        if let (Some(low), Some(high)) = (rope.low_freq_factor, rope.high_freq_factor) {
            let name = "rope_parameters.high_freq_factor";
            checks.require(high > low, name, high, format!("above low_freq_factor {low}"));
        }
        if let Some(context) = rope.unscaled_context {
            let name = "rope_parameters.original_max_position_embeddings";
            let allowed = format!("from 1 to {MAX_SIZE}");
            checks.require((1..=MAX_SIZE).contains(&context), name, context, allowed);
        }
    }

    /// Checks the ranges of the settings of selection and of the Beacon, which the operators would refuse.
    fn check_selection(&self, checks: &mut Checks) {
        let select = &self.gd.select;
        let is_share = |x: f64| (0.0..=1.0).contains(&x);
        let is_count = |n: usize| CANDIDATES.contains(&n);
        let counts = format!("one of {CANDIDATES:?}");
        checks.require(is_count(select.candidates), "gd.select.candidates", select.candidates, &counts);
        let warm = select.temperature > 0.0 && select.temperature.is_finite();
        checks.require(warm, "gd.select.temperature", select.temperature, "above 0");
        for (name, share) in [
            ("gd.select.preserve_floor", select.preserve_floor),
            ("gd.select.value_floor", select.value_floor),
            ("gd.select.gradient.gate_floor", select.gradient.gate_floor),
        ] {
            checks.require(is_share(share), name, share, "in [0, 1]");
        }
        let picks = (1..=MAX_PICKS).contains(&select.picks);
        checks.require(picks, "gd.select.picks", select.picks, format!("in 1..={MAX_PICKS}"));
        let ranked = matches!(select.estimator, Estimator::Candidates | Estimator::Winner);
        let barrier = self.gd.beacon.as_ref().is_some_and(|beacon| beacon.barrier.is_some());
        let alone = select.rounds == 1 && select.gate != Gate::Coherence && ranked && !barrier;
        let allowed =
            "1 with rounds, a barrier, the coherence gate or another estimator than candidates and winner";
        checks.require(alone || select.picks <= 1, "gd.select.picks", select.picks, allowed);
        let below = (0.0..1.0).contains(&select.exclude_below);
        checks.require(below, "gd.select.exclude_below", select.exclude_below, "in [0, 1)");
        let spread = select.gradient.temperature_spread;
        let fits = spread.is_finite() && spread >= 0.0;
        checks.require(fits, "gd.select.gradient.temperature_spread", spread, "at least 0");
        let parts = format!("from 1 to {MAX_PARTS}");
        let is_part_count = |n: usize| (1..=MAX_PARTS).contains(&n);
        checks.require(is_part_count(select.rounds), "gd.select.rounds", select.rounds, &parts);
        if let Some(threshold) = select.threshold {
            checks.require(threshold.is_finite(), "gd.select.threshold", threshold, "a finite number");
        }
        let followed = select.threshold.is_some() || !select.threshold_by_length;
        checks.require(followed, "gd.select.threshold", "null", "a number with threshold_by_length");
        if let Some(temperature) = select.gate.temperature() {
            let margin = matches!(select.gate, Gate::Margin { .. });
            let (name, gate) = match margin {
                true => ("gd.select.gate.margin.temperature", "a number with the margin gate"),
                false => ("gd.select.gate.energy.temperature", "a number with the energy gate"),
            };
            checks.require(temperature > 0.0 && temperature.is_finite(), name, temperature, "above 0");
            checks.require(select.threshold.is_some(), "gd.select.threshold", "null", gate);
            let once = !margin || select.rounds == 1;
            checks.require(once, "gd.select.rounds", select.rounds, "1 with the margin gate");
            let absent = !margin || !barrier;
            checks.require(absent, "gd.beacon.barrier", "a barrier", "null with the margin gate");
            let more = format!("above gd.select.picks, {}, with the margin gate", select.picks);
            let enough = !margin || select.candidates > select.picks;
            checks.require(enough, "gd.select.candidates", select.candidates, more);
        }
        let Some(beacon) = &self.gd.beacon else { return };
        checks.require(is_part_count(beacon.conv_width), "gd.beacon.conv_width", beacon.conv_width, &parts);
        let averages = beacon.averages;
        checks.require(averages <= MAX_PARTS, "gd.beacon.averages", averages, format!("at most {MAX_PARTS}"));
        let protects = beacon.protected == 0 || is_count(beacon.protected);
        checks.require(protects, "gd.beacon.protected", beacon.protected, format!("0 or {counts}"));
        let Some(barrier) = &beacon.barrier else { return };
        let open = barrier.floor > 0.0 && barrier.floor < 1.0;
        checks.require(open, "gd.beacon.barrier.floor", barrier.floor, "in (0, 1)");
        let strong = barrier.strength >= 0.0 && barrier.strength.is_finite();
        checks.require(strong, "gd.beacon.barrier.strength", barrier.strength, "at least 0");
        for (name, x) in [("margin", barrier.margin), ("slack", barrier.slack)] {
            checks.require(x.is_finite(), &format!("gd.beacon.barrier.{name}"), x, "a finite number");
        }
        let trigger = barrier.entropy_trigger;
        checks.require(is_share(trigger), "gd.beacon.barrier.entropy_trigger", trigger, "in [0, 1]");
    }

    /// The name of the weight of the output projection, that of the embedding if both are tied.
    pub(crate) fn output_weight(&self) -> &'static str {
        match self.tie_word_embeddings {
            true => EMBEDDING,
            false => HEAD,
        }
    }

    /// Checks that the model has every one of these tokens.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] with the first one that it lacks.
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            Some(&token) => Err(Error::UnknownToken { token, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    /// Whether the configuration still describes the model of another family that it was translated from.
    pub fn is_foreign(&self) -> bool {
        self.origin
            .as_ref()
            .is_some_and(|origin| llama::translate(origin.clone()).is_ok_and(|config| config == *self))
    }

    /// The content of `config.json`. If [`ModelConfig::is_foreign`], it is that of the other family. Else it has the keys
    /// of this crate, with the rotary base under both of its names, and names the Python classes beside the
    /// checkpoint.
    ///
    /// # Errors
    /// A value that JSON cannot hold, such as an infinite epsilon.
    pub fn to_json(&self) -> Result<Value> {
        if let Some(origin) = self.origin.as_ref().filter(|_| self.is_foreign()) {
            let mut origin = origin.clone();
            // Keeps the older name of the key if the file had it.
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
