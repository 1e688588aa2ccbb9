//! Translation of configurations of Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.
//!
//! Absent keys have the defaults of `transformers`, which differ by family. Keys that do not change the result are
//! ignored, such as `pretraining_tp`, which splits matrix products into parts and adds them. Values that change the result
//! in a way that is not supported are refused.

use serde::Deserialize;
use serde_json::{Value, json};

use super::model::{
    GdBlock, MAX_SIZE, ModelConfig, RopeParameters, architectures, check_rope_type, check_sizes, dtype,
    model_type,
};
use super::{Mechanism, parse};
use crate::error::{ConfigProblem, Error};

/// The families by `model_type`.
const FAMILIES: [(&str, Family); 4] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    /// The class of its model in `transformers`.
    fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Whether `name` is the class of its model, in any case (`LLaMAForCausalLM` in the first conversions), or that of the
    /// model without the output projection (`LlamaModel`).
    fn is_architecture(self, name: &str) -> bool {
        let model = self.architecture().replace("ForCausalLM", "Model");
        name.eq_ignore_ascii_case(self.architecture()) || name.eq_ignore_ascii_case(&model)
    }

    /// The defaults of absent keys that differ from those of [`Keys`].
    fn defaults(self) -> Value {
        match self {
            Self::Llama => json!({ "max_position_embeddings": 2048 }),
            Self::Mistral => json!({
                "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096,
            }),
            Self::Qwen2 => json!({
                "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
            }),
            Self::Qwen3 => json!({
                "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096,
                "head_dim": 128,
            }),
        }
    }

    /// Whether the query, key and value projections have a bias, and whether the output projection has one.
    fn biases(self, attention_bias: bool) -> (bool, bool) {
        match self {
            Self::Llama | Self::Qwen3 => (attention_bias, attention_bias),
            Self::Mistral => (false, false),
            Self::Qwen2 => (true, false),
        }
    }
}

/// The keys that have a meaning of their own as `null`. For all others `null` stands for the default.
const NULLABLE: [&str; 3] = ["sliding_window", "num_key_value_heads", "head_dim"];

/// The keys that are used. A key that may be `null` is an option.
#[derive(Debug, Deserialize)]
struct Keys {
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default = "hidden_act")]
    hidden_act: String,
    torch_dtype: Option<String>,
    dtype: Option<String>,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default = "max_window_layers")]
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
}

fn rms_norm_eps() -> f64 {
    1e-6
}
fn hidden_act() -> String {
    "silu".into()
}
fn max_window_layers() -> usize {
    28
}

/// `rope_scaling` or `rope_parameters`. Other keys, such as `finetuned`, have no effect with the supported types.
#[derive(Debug, Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    #[serde(rename = "original_max_position_embeddings")]
    unscaled_context: Option<usize>,
    partial_rotary_factor: Option<f64>,
}

/// Translates a `config.json`.
///
/// # Errors
/// Every problem: keys and values that cannot be used, or a family or feature that is not supported.
pub(super) fn translate(json: Value) -> Result<ModelConfig, Vec<ConfigProblem>> {
    let supported = || FAMILIES.map(|(name, _)| name).join(", ");
    let family = match json.get("model_type").and_then(Value::as_str) {
        Some(name) => FAMILIES
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, family)| *family)
            .ok_or_else(|| {
                let supported = supported();
                vec![refusal(format!(
                    "model_type {name:?} is not supported ({supported} are, and configs with a gd block)"
                ))]
            })?,
        None => return Err(vec![refusal(format!("neither a gd block nor a model_type ({})", supported()))]),
    };
    let mut full = family.defaults();
    if let (Value::Object(full), Value::Object(given)) = (&mut full, json.clone()) {
        full.extend(
            given.into_iter().filter(|(key, value)| !value.is_null() || NULLABLE.contains(&key.as_str())),
        );
    }
    let keys: Keys = parse(full)?;
    // Before anything is allocated per layer.
    check_sizes(&[("num_hidden_layers", keys.num_hidden_layers)]).map_err(|e| vec![e.into()])?;
    let mut problems = refusals(&keys, family);
    let rope = rope(&keys).map_err(|p| problems.extend(p)).ok();
    let windows = windows(&keys, family).map_err(|p| problems.push(p)).ok();
    let (Some(rope), Some(windows), true) = (rope, windows, problems.is_empty()) else {
        return Err(problems);
    };
    let (attention_bias, output_bias) = family.biases(keys.attention_bias);
    Ok(ModelConfig {
        architectures: architectures(),
        model_type: model_type(),
        auto_map: Default::default(),
        vocab_size: keys.vocab_size,
        hidden_size: keys.hidden_size,
        intermediate_size: keys.intermediate_size,
        num_hidden_layers: keys.num_hidden_layers,
        num_attention_heads: keys.num_attention_heads,
        num_key_value_heads: keys.num_key_value_heads.unwrap_or(keys.num_attention_heads),
        head_dim: keys.head_dim.unwrap_or(keys.hidden_size / keys.num_attention_heads),
        max_position_embeddings: keys.max_position_embeddings,
        rms_norm_eps: keys.rms_norm_eps,
        rope_theta: Some(rope.rope_theta),
        rope_parameters: Some(rope),
        tie_word_embeddings: keys.tie_word_embeddings,
        attention_bias,
        mlp_bias: family == Family::Llama && keys.mlp_bias,
        // Both are x · sigmoid(x).
        hidden_act: if keys.hidden_act == "swish" { hidden_act() } else { keys.hidden_act },
        dtype: keys.dtype.or(keys.torch_dtype).unwrap_or_else(dtype),
        gd: GdBlock {
            mechanism: vec![Mechanism::Softmax],
            selecting_heads: Vec::new(),
            induction_heads: Vec::new(),
            windows,
            qk_norm: family == Family::Qwen3,
            output_bias,
            output_gate: false,
            beacon: None,
            select: Default::default(),
        },
        origin: Some(json),
    })
}

/// The problem of a feature that is not supported; `text` names its key and value.
fn refusal(text: String) -> ConfigProblem {
    ConfigProblem::Unsupported(text)
}

/// The features of a model of `family` that are not supported.
fn refusals(keys: &Keys, family: Family) -> Vec<ConfigProblem> {
    let mut problems = Vec::new();
    if let Some(name) = keys.architectures.iter().flatten().find(|name| !family.is_architecture(name)) {
        problems
            .push(refusal(format!("architectures {name:?} is not supported ({} is)", family.architecture())));
    }
    if keys.num_attention_heads == 0 {
        problems.push(Error::out_of_range("num_attention_heads", 0, "at least 1").into());
    }
    if let Some(share) = keys.partial_rotary_factor.filter(|share| *share != 1.0) {
        problems.push(refusal(format!("partial_rotary_factor {share} is not supported (1 is)")));
    }
    if let Some(value) = &keys.quantization_config {
        problems.push(refusal(format!("quantization_config {value}: quantised weights are not supported")));
    }
    problems
}

/// The rotary embedding. `rope_scaling` has precedence over `rope_parameters`, and a base in either of them over the key
/// `rope_theta`.
fn rope(keys: &Keys) -> Result<RopeParameters, Vec<ConfigProblem>> {
    let plain = RopeParameters::plain(keys.rope_theta.unwrap_or(10_000.0));
    let given = [("rope_scaling", &keys.rope_scaling), ("rope_parameters", &keys.rope_parameters)];
    let Some((name, tree)) = given.into_iter().find_map(|(name, tree)| {
        let tree = tree.clone().filter(|tree| tree.as_object().is_none_or(|keys| !keys.is_empty()))?;
        Some((name, tree))
    }) else {
        return Ok(plain);
    };
    let inside = |problem: String| vec![refusal(format!("{name}: {problem}"))];
    // The type is checked first, because types that are not supported have other keys.
    let kind = |key: &str| tree.get(key).and_then(Value::as_str);
    kind("rope_type").or(kind("type")).map_or(Ok(()), check_rope_type).map_err(|e| inside(e.to_string()))?;
    // Parameters by kind of layer.
    let nested = tree.as_object().into_iter().flatten().find(|(_, value)| value.is_object());
    if let Some((key, value)) = nested {
        return Err(inside(format!("{key} {value} is not supported")));
    }
    let rope: Rope = parse(tree).map_err(|problems| {
        inside(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })?;
    if let Some(share) = rope.partial_rotary_factor.filter(|share| *share != 1.0) {
        return Err(inside(format!("partial_rotary_factor {share} is not supported (1 is)")));
    }
    let rope_type = rope.rope_type.or(rope.old_type).unwrap_or(plain.rope_type);
    let llama3 = rope_type == "llama3";
    let parameters = RopeParameters {
        rope_theta: rope.rope_theta.unwrap_or(plain.rope_theta),
        factor: rope.factor.filter(|_| rope_type != "default"),
        low_freq_factor: rope.low_freq_factor.filter(|_| llama3),
        high_freq_factor: rope.high_freq_factor.filter(|_| llama3),
        unscaled_context: llama3.then(|| rope.unscaled_context.unwrap_or(keys.max_position_embeddings)),
        rope_type,
    };
    parameters.scaling().map_err(|e| inside(e.to_string()))?;
    Ok(parameters)
}

/// The sliding windows: one per layer, a single one for all layers, or none.
fn windows(keys: &Keys, family: Family) -> Result<Vec<Option<usize>>, ConfigProblem> {
    let window = match family {
        Family::Llama => None,
        Family::Mistral => keys.sliding_window,
        Family::Qwen2 | Family::Qwen3 => keys.sliding_window.filter(|_| keys.use_sliding_window),
    };
    // No context is longer, so a wider window is the same.
    let window = window.map(|window| window.min(MAX_SIZE));
    if family == Family::Llama || family == Family::Mistral {
        return Ok(window.map(Some).into_iter().collect());
    }
    let slides: Vec<bool> = match &keys.layer_types {
        None => {
            (0..keys.num_hidden_layers).map(|i| window.is_some() && i >= keys.max_window_layers).collect()
        }
        Some(types) if types.len() != keys.num_hidden_layers => {
            let (types, layers) = (types.len(), keys.num_hidden_layers);
            return Err(refusal(format!("{types} layer_types for {layers} layers")));
        }
        Some(types) => types.iter().map(|kind| slides(kind)).collect::<Result<_, _>>()?,
    };
    match (slides.contains(&true), window) {
        (false, _) => Ok(Vec::new()),
        (true, None) => Err(refusal(
            "layer_types has \"sliding_attention\", but there is no sliding_window in use".into(),
        )),
        (true, window) => Ok(slides.into_iter().map(|slides| window.filter(|_| slides)).collect()),
    }
}

fn slides(kind: &str) -> Result<bool, ConfigProblem> {
    match kind {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        _ => Err(refusal(format!(
            "layer_types {kind:?} is not supported (full_attention and sliding_attention are)"
        ))),
    }
}
