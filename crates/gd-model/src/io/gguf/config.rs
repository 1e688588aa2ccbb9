//! Converts the metadata of a GGUF file of the llama architecture to a `config.json` of Hugging Face.

use candle_core::quantized::GgmlDType;
use serde_json::{Value, json};

use super::header::Header;

type Result<T> = std::result::Result<T, String>;

/// The low and the high frequency factor of Llama 3's rotary scaling, in turns within the pretraining context. Lower
/// frequencies are divided by the scaling factor, higher ones do not change, and those in between are interpolated.
const FREQUENCY_FACTORS: (f64, f64) = (1.0, 4.0);
/// The context length that Llama 3 was pretrained with, in tokens.
const PRETRAINING_CONTEXT: f64 = 8192.0;

/// The `config.json`. `factors` are the values of `rope_freqs.weight`, by which the rotary frequencies are divided.
pub(super) fn config(header: &Header, factors: Option<&[f32]>) -> Result<Value> {
    let size = |key: &str| header.size(&format!("llama.{key}"));
    let need = |key: &str| size(key)?.ok_or_else(|| format!("key llama.{key} is missing"));
    let float = |key: &str| header.float(&format!("llama.{key}"));
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
    for (key, supported) in supported_values {
        if let Some(value) = size(key)?.filter(|value| *value != supported) {
            return Err(format!("key llama.{key} is {value}; {supported} is supported"));
        }
    }
    let theta = float("rope.freq_base")?.unwrap_or(10_000.0);
    let has = |name: &str| header.tensors.contains_key(name);
    let embedding = header.tensors.get("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
    let dtype = match embedding.dtype {
        GgmlDType::F16 => "float16",
        GgmlDType::BF16 => "bfloat16",
        _ => "float32",
    };
    let biases = ["q", "k", "v", "output"].map(|part| has(&format!("blk.0.attn_{part}.bias")));
    if biases.contains(&true) && biases.contains(&false) {
        return Err("only some of the attention projections have a bias".into());
    }
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": biases[0],
        "mlp_bias": has("blk.0.ffn_gate.bias"),
        "hidden_act": "silu",
        "torch_dtype": dtype,
    });
    if let Some(scaling) = scaling(header, factors, theta, head_dim)? {
        config["rope_scaling"] = scaling;
    }
    Ok(config)
}

/// The value of `rope_scaling`; `None` if the rotary frequencies are not scaled.
fn scaling(header: &Header, factors: Option<&[f32]>, theta: f64, head_dim: usize) -> Result<Option<Value>> {
    let kind = header.text("llama.rope.scaling.type")?.unwrap_or("none");
    let factor = match header.float("llama.rope.scaling.factor")? {
        None => header.float("llama.rope.scale_linear")?,
        factor => factor,
    };
    match (kind, factor.unwrap_or(1.0), factors) {
        ("none" | "linear", 1.0, None) | ("none", _, None) => Ok(None),
        ("linear", factor, None) => Ok(Some(json!({ "rope_type": "linear", "factor": factor }))),
        ("none" | "linear", 1.0, Some(factors)) => llama3(factors, theta, head_dim).map(Some),
        (kind, factor, _) => {
            Err(format!("key llama.rope.scaling.type is {kind:?} (factor {factor}), which is not supported"))
        }
    }
}

/// The `rope_scaling` of Llama 3. The file holds the resulting divisor of each frequency instead of the four parameters,
/// which are recovered from them and checked.
fn llama3(factors: &[f32], theta: f64, head_dim: usize) -> Result<Value> {
    if factors.len() != head_dim / 2 {
        return Err(format!(
            "tensor rope_freqs.weight has {} values for heads of {head_dim}; {} expected",
            factors.len(),
            head_dim / 2
        ));
    }
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    for (i, &actual) in factors.iter().enumerate() {
        let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
        let turns = PRETRAINING_CONTEXT * frequency / std::f64::consts::TAU;
        let (low, high) = FREQUENCY_FACTORS;
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        let expected = 1.0 / (smooth + (1.0 - smooth) / factor);
        // False for NaN.
        let near = (f64::from(actual) - expected).abs() <= 1e-3 * expected;
        if !near {
            return Err(format!(
                "value {i} of tensor rope_freqs.weight is {actual}; Llama 3's scaling by {factor} has {expected}"
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
