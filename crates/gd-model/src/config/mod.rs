//! Configuration of models and of training, loaded from presets or files.
//!
//! A [`Recipe`] is a [`ModelConfig`] and a [`TrainConfig`]. Loading refuses unknown keys and reports every problem at
//! once, see [`Error::Config`](crate::Error::Config). A [`ModelConfig`] also reads the `config.json` of Llama, Mistral
//! and Qwen models.

pub mod device;

mod adamw;
mod checks;
mod curve;
mod documents;
mod ema;
mod guard;
mod llama;
mod load;
mod lora;
mod lr_schedule;
mod mechanism;
mod model;
mod muon;
mod schema;
mod select_schedule;
mod setting;
mod train;
mod uptrain;
mod value;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use adamw::AdamWConfig;
pub use curve::Curve;
pub use documents::DocumentFormat;
pub use ema::EmaConfig;
pub use guard::GuardConfig;
pub use load::parse;
pub use lora::{ALL_LINEAR, LoraConfig};
pub use lr_schedule::{LrSchedule, LrShape};
pub use mechanism::Mechanism;
pub(crate) use model::{EMBEDDING, HEAD};
pub use model::{GdBlock, ModelConfig, RopeParameters};
pub use muon::MuonConfig;
pub use schema::{KeyInfo, keys, schema};
pub use select_schedule::SelectSchedule;
pub use setting::Setting;
pub(crate) use train::BPE_VOCAB;
pub use train::{Precision, TokenizerChoice, TrainConfig};
pub use uptrain::{UptrainConfig, training_candidates, uptrain_schedule};

pub(crate) use load::nearest;

/// The content of a preset or a configuration file: a model and its training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The model. Its `vocab_size` is replaced by that of the tokenizer.
    pub model: ModelConfig,
    /// The training.
    pub train: TrainConfig,
}

/// The presets, as pairs of name and JSON text.
pub const PRESETS: &[(&str, &str)] = &[
    ("tiny", include_str!("../../models/tiny.json")),
    ("small", include_str!("../../models/small.json")),
    ("base", include_str!("../../models/base.json")),
    ("125M", include_str!("../../models/125M.json")),
];

/// The preset of a training that goes on from a model. It has no model, which [`Recipe::load_with`] takes from a
/// [`Setting`].
pub const FINETUNE: (&str, &str) = ("finetune", include_str!("../../models/finetune.json"));

/// The preset of uptraining. It has no model, which [`Recipe::load_with`] takes from a [`Setting`].
pub const UPTRAIN: (&str, &str) = ("uptrain", include_str!("../../models/uptrain.json"));
