//! The metadata of a configuration, for llama.cpp.

use candle_core::quantized::gguf_file::Value;
use gd_layer::RopeScaling;

use super::config::{Architecture, FREQUENCY_FACTORS, PRETRAINING_CONTEXT, llama3_divisor};
use super::write::Metadata;
use crate::config::{Mechanism, ModelConfig};

impl Architecture {
    /// The architecture of a configuration; `None` for a model of this crate.
    ///
    /// # Errors
    /// Layers that no architecture has.
    pub(super) fn of(config: &ModelConfig) -> Result<Option<Self>, String> {
        if !config.is_foreign() {
            return Ok(None);
        }
        for layer in 0..config.num_hidden_layers {
            if let Some(window) = config.window(layer) {
                return Err(format!(
                    "layer {layer} has a window of {window} keys, which GGUF files of this family lack"
                ));
            }
            if *config.mechanism(layer) != Mechanism::Softmax {
                return Ok(None);
            }
        }
        let family = config.origin.as_ref().and_then(|origin| origin["model_type"].as_str());
        match family {
            Some("llama" | "mistral") => Ok(Some(Self::Llama)),
            Some("qwen2") => Ok(Some(Self::Qwen2)),
            Some("qwen3") if config.attention_bias => {
                Err("attention_bias is true, and llama.cpp reads no biases of qwen3".into())
            }
            Some("qwen3") => Ok(Some(Self::Qwen3)),
            other => Err(format!("model_type {other:?} has no architecture in GGUF")),
        }
    }
}

/// Adds the keys of a configuration. Returns the divisors of the rotary frequencies, if they are those of Llama 3.
///
/// # Errors
/// A scaling of the rotary frequencies that the format does not have.
pub(super) fn describe(
    architecture: Architecture,
    config: &ModelConfig,
    metadata: &mut Metadata,
) -> Result<Option<Vec<f32>>, String> {
    let mut add = |name: &str, value: Value| {
        metadata.insert(format!("{}.{name}", architecture.name()), value);
    };
    let sizes = [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ];
    for (name, size) in sizes {
        let size = u32::try_from(size).map_err(|_| format!("{name} {size} is too large"))?;
        add(name, Value::U32(size));
    }
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32));
    add("rope.freq_base", Value::F32(config.theta() as f32));
    match config.rope_scaling().map_err(|e| e.to_string())? {
        RopeScaling::None => Ok(None),
        RopeScaling::Linear { factor } => {
            add("rope.scaling.type", Value::String("linear".into()));
            add("rope.scaling.factor", Value::F32(factor as f32));
            Ok(None)
        }
        RopeScaling::Llama3 { factor, low_turns, high_turns, trained_positions } => {
            if (low_turns, high_turns) != FREQUENCY_FACTORS || trained_positions as f64 != PRETRAINING_CONTEXT
            {
                return Err(format!(
                    "rope_type llama3 with low_freq_factor {low_turns}, high_freq_factor {high_turns} and \
                     original_max_position_embeddings {trained_positions}; {}, {} and {PRETRAINING_CONTEXT} are supported",
                    FREQUENCY_FACTORS.0, FREQUENCY_FACTORS.1
                ));
            }
            let divisor = |i| llama3_divisor(i, factor, config.theta(), config.head_dim) as f32;
            Ok(Some((0..config.head_dim / 2).map(divisor).collect()))
        }
    }
}
