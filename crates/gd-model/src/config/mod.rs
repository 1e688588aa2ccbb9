//! What a model is made of and how it is trained: read from a preset or a file, checked as a whole,
//! unknown keys refused.

mod curve;
pub mod device;
mod llama;
mod load;
mod model;
mod select;
mod set;
mod train;

use serde::{Deserialize, Serialize};

pub use curve::Curve;
pub use load::parse;
pub use model::{GdBlock, Mechanism, ModelConfig, RopeParameters};
pub use select::SelectSchedule;
pub use set::Setting;
pub use train::{Precision, TokenizerChoice, TrainConfig};

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
pub const PRESETS: &[(&str, &str)] = &[
    ("tiny", include_str!("../../models/tiny.json")),
    ("small", include_str!("../../models/small.json")),
    ("base", include_str!("../../models/base.json")),
    ("125M", include_str!("../../models/125M.json")),
];

/// The training of a model that exists, for [`Recipe::load_with`] and the model as a setting.
pub const UPTRAIN: (&str, &str) = ("uptrain", include_str!("../../models/uptrain.json"));
