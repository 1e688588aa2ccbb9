//! Converts the metadata of a GGUF file to a `config.json` of Hugging Face.

use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};

use super::header::Header;
use super::{ARCHITECTURE, ROPE_FACTORS};

type Result<T> = std::result::Result<T, String>;

/// The low and the high frequency factor of Llama 3's rotary scaling, in turns within the pretraining context. Lower
/// frequencies are divided by the scaling factor, higher ones do not change, and those in between are interpolated.
pub(super) const FREQUENCY_FACTORS: (f64, f64) = (1.0, 4.0);
/// The context length that Llama 3 was pretrained with, in tokens.
pub(super) const PRETRAINING_CONTEXT: f64 = 8192.0;

/// The supported values of `general.architecture`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Architecture {
    Llama,
    Mistral3,
    Qwen2,
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral3, Self::Qwen2, Self::Qwen3];

    pub(super) fn read(header: &Header) -> Result<Self> {
        let name = header.text(ARCHITECTURE)?.ok_or_else(|| format!("key {ARCHITECTURE} is missing"))?;
        Self::ALL.into_iter().find(|architecture| architecture.name() == name).ok_or_else(|| {
            let supported = Self::ALL.map(Self::name).join(", ");
            format!("key {ARCHITECTURE} is {name:?}; {supported} and gd are supported")
        })
    }

    /// Its name, with which its keys start.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral3 => "mistral3",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Whether the rotary embedding rotates adjacent elements of a head.
    pub(super) fn rotates_adjacent(self) -> bool {
        matches!(self, Self::Llama | Self::Mistral3)
    }

    fn key(self, name: &str) -> String {
        format!("{}.{name}", self.name())
    }
}

/// The family of Hugging Face that has the norms and biases of a file, and whether it has all biases of the attention.
struct Family {
    model_type: &'static str,
    class: &'static str,
    attention_bias: bool,
    mlp_bias: bool,
}

impl Family {
    /// The family by the tensors of the first layer. The architecture does not decide it: files of llama may have the
    /// biases of Qwen 2, and files of qwen2 none.
    fn read(header: &Header) -> Result<Self> {
        let has = |name: &str| header.tensors.contains_key(&format!("blk.0.{name}"));
        let [q, k, v, output] = ["q", "k", "v", "output"].map(|part| has(&format!("attn_{part}.bias")));
        let norms = ["q", "k"].map(|part| has(&format!("attn_{part}_norm.weight")));
        let mlp_bias = has("ffn_gate.bias");
        let (model_type, class) = match (norms, [q, k, v, output]) {
            ([false, false], [false, false, false, false] | [true, true, true, true]) => {
                ("llama", "LlamaForCausalLM")
            }
            ([false, false], [true, true, true, false]) if !mlp_bias => ("qwen2", "Qwen2ForCausalLM"),
            ([true, true], [false, false, false, false] | [true, true, true, true]) if !mlp_bias => {
                ("qwen3", "Qwen3ForCausalLM")
            }
            ([false, true] | [true, false], _) => {
                return Err("only one of queries and keys has a norm".into());
            }
            _ => return Err("only some of the projections have a bias".into()),
        };
        Ok(Self { model_type, class, attention_bias: q, mlp_bias })
    }
}

/// The `config.json`. `factors` are the values of `rope_freqs.weight`, by which the rotary frequencies are divided.
pub(super) fn config(header: &Header, architecture: Architecture, factors: Option<&[f32]>) -> Result<Value> {
    let size = |name: &str| header.size(&architecture.key(name));
    let need = |name: &str| size(name)?.ok_or_else(|| format!("key {} is missing", architecture.key(name)));
    let float = |name: &str| header.float(&architecture.key(name));
    let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let kv_heads = size("attention.head_count_kv")?.unwrap_or(heads);
    if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(format!("{heads} heads over {kv_heads} key-value heads"));
    }
    let head_dim = size("attention.key_length")?.unwrap_or(hidden / heads);
    // Other values of these keys would change the result and are not supported.
    let supported_values = [
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("expert_count", 0),
        ("attention.sliding_window", 0),
    ];
    for (name, supported) in supported_values {
        if let Some(value) = size(name)?.filter(|value| *value != supported) {
            return Err(format!("key {} is {value}; {supported} is supported", architecture.key(name)));
        }
    }
    for name in ["attention.scale", "attention.temperature_scale"] {
        if let Some(value) = float(name)?.filter(|value| *value != 0.0) {
            return Err(format!("key {} is {value}, which is not supported", architecture.key(name)));
        }
    }
    if header.flag(&architecture.key("attention.causal"))? == Some(false) {
        return Err(format!("key {} is false; true is supported", architecture.key("attention.causal")));
    }
    let theta = float("rope.freq_base")?.unwrap_or(10_000.0);
    let embedding = header.tensors.get("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
    let dtype = match embedding.dtype {
        GgmlDType::F16 => "float16",
        GgmlDType::BF16 => "bfloat16",
        _ => "float32",
    };
    let family = Family::read(header)?;
    let mut config = json!({
        "architectures": [family.class],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length")?,
        "rms_norm_eps": float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
        "rope_theta": theta,
        "tie_word_embeddings": !header.tensors.contains_key("output.weight"),
        "attention_bias": family.attention_bias,
        "mlp_bias": family.mlp_bias,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    });
    if let Some(scaling) = scaling(header, architecture, factors, theta, head_dim)? {
        config["rope_scaling"] = scaling;
    }
    Ok(config)
}

/// The value of `rope_scaling`; `None` if the rotary frequencies are not scaled. As in llama.cpp, a factor without a type is
/// that of linear scaling, and a factor of 0 stands for none.
fn scaling(
    header: &Header,
    architecture: Architecture,
    factors: Option<&[f32]>,
    theta: f64,
    head_dim: usize,
) -> Result<Option<Value>> {
    let key = architecture.key("rope.scaling.type");
    let kind = header.text(&key)?.unwrap_or("linear");
    let factor = match header.float(&architecture.key("rope.scaling.factor"))? {
        None => header.float(&architecture.key("rope.scale_linear"))?,
        factor => factor,
    };
    match (kind, factor.filter(|factor| *factor != 0.0).unwrap_or(1.0), factors) {
        ("none" | "linear", 1.0, None) | ("none", _, None) => Ok(None),
        ("linear", factor, None) => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
        ("none" | "linear", 1.0, Some(factors)) => llama3(factors, theta, head_dim).map(Some),
        (kind, factor, _) => Err(format!("key {key} is {kind:?} (factor {factor}), which is not supported")),
    }
}

/// The `rope_scaling` of Llama 3. The file holds the resulting divisor of each frequency instead of the four parameters,
/// which are recovered from them and checked.
fn llama3(factors: &[f32], theta: f64, head_dim: usize) -> Result<Value> {
    if factors.len() != head_dim / 2 {
        return Err(format!(
            "tensor {ROPE_FACTORS} has {} values for heads of {head_dim}; {} expected",
            factors.len(),
            head_dim / 2
        ));
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    for (i, &actual) in factors.iter().enumerate() {
        let expected = llama3_divisor(i, factor, theta, head_dim);
        // False for NaN.
        let near = (f64::from(actual) - expected).abs() <= 1e-3 * expected;
        if !near {
            return Err(format!(
                "value {i} of tensor {ROPE_FACTORS} is {actual}; Llama 3's scaling by {factor} has {expected}"
            ));
        }
    }
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": FREQUENCY_FACTORS.0,
        "high_freq_factor": FREQUENCY_FACTORS.1,
        "original_max_position_embeddings": PRETRAINING_CONTEXT as u64,
    }))
}

/// The divisor of rotary frequency `i` in Llama 3's scaling by `factor`.
pub(super) fn llama3_divisor(i: usize, factor: f64, theta: f64, head_dim: usize) -> f64 {
    let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
    let turns = PRETRAINING_CONTEXT * frequency / std::f64::consts::TAU;
    let (low, high) = FREQUENCY_FACTORS;
    let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
    1.0 / (smooth + (1.0 - smooth) / factor)
}
