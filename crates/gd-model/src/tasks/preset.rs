//! The model and the training of a task, as settings on top of the preset `tiny`.

use serde_json::json;

use crate::config::{Recipe, Setting};
use crate::error::Result;

/// The model and the training of a task: what differs from the preset `tiny`.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    /// Tokens.
    pub vocabulary: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of every layer.
    pub heads: usize,
    /// Dimension of a head.
    pub head_dim: usize,
    /// Width of the feed-forward blocks.
    pub feed_forward: usize,
    /// The longest test in positions.
    pub positions: usize,
    /// Whether queries and keys are rotated by their positions.
    pub rotary: bool,
    /// Heads of every layer that match content without positions and read what follows the match.
    pub induction_heads: usize,
    /// Whether the layers have a Beacon.
    pub beacon: bool,
    /// Optimizer steps.
    pub steps: u64,
    /// Positions of a training batch.
    pub tokens: usize,
    /// The peak learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f64,
}

/// A divisor of all positions so large that no angle differs from 0.
const NO_ROTATION: f64 = 1e12;

impl Preset {
    /// The recipe, with values replaced by `settings`.
    ///
    /// # Errors
    /// As [`Recipe::merged`].
    pub fn recipe(&self, settings: &[Setting]) -> Result<Recipe> {
        let set = |path: &str, value: serde_json::Value| Setting::new(path, value);
        let mut all = vec![
            set("model.vocab_size", json!(self.vocabulary)),
            set("model.hidden_size", json!(self.hidden)),
            set("model.num_hidden_layers", json!(self.layers)),
            set("model.num_attention_heads", json!(self.heads)),
            set("model.num_key_value_heads", json!(self.heads)),
            set("model.head_dim", json!(self.head_dim)),
            set("model.intermediate_size", json!(self.feed_forward)),
            // All heads read, because the tasks need little else. One key has the answer, so that one is read, with the gate by
            // its margin to the runner-up; in a text several keys may be as good.
            set("model.gd.selecting_heads", json!([])),
            set("model.gd.select.gate", json!({"margin": {"temperature": 1.0}})),
            set("model.gd.select.threshold", json!(0.0)),
            set("model.gd.select.picks", json!(1)),
            set("train.select.calibrate_thresholds", json!(false)),
            set("train.select.candidates", serde_json::Value::Null),
            set("model.max_position_embeddings", json!(self.positions)),
            set("train.steps", json!(self.steps)),
            set("train.batch", json!(1)),
            set("train.context", json!(self.tokens)),
            set("train.lr.peak", json!(self.lr)),
            set("train.lr.warmup", json!((self.steps / 12).clamp(1, 100))),
            set("train.adamw.weight_decay", json!(self.weight_decay)),
        ];
        if self.positions < self.tokens {
            all.push(set("model.max_position_embeddings", json!(self.tokens)));
        }
        if !self.rotary {
            let none = json!({"rope_theta": 10000.0, "rope_type": "linear", "factor": NO_ROTATION});
            all.push(set("model.rope_parameters", none));
        }
        if self.induction_heads > 0 {
            all.push(set("model.gd.induction_heads", json!([self.induction_heads])));
        }
        if !self.beacon {
            all.push(set("model.gd.beacon", serde_json::Value::Null));
        }
        all.extend(settings.iter().cloned());
        Recipe::load_with("tiny", &all)
    }
}
