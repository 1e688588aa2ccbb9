//! The flags of `gd convert`.

use std::path::PathBuf;

use candle_core::DType;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gd_kernels::Score;
use gd_layer::mechanisms::AttentionMechanism;
use gd_model::config::{Mechanism, Setting};
use gd_model::io::gguf::Quantization;
use gd_model::model::swap::{Layers, Swap};
use serde_json::Value;

use crate::data_source::DocumentArgs;

/// Replace the attention of a model, and keep its weights or train them further
#[derive(Debug, clap::Args)]
#[command(
    after_help = "MODEL is a checkpoint of Llama, Mistral, Qwen2 or Qwen3, or one of this program. Without --attention \
                  the model is saved unchanged, a GGUF file as safetensors. A softmax layer becomes a selecting layer \
                  that takes the softmax over the K keys of least energy; if K is the number of keys, it computes the \
                  same as before. Any other mechanism that a layer can have (gd op attend --list) reads the same queries, \
                  keys and values in its own way; its own learned parameters start with their initial values. With --uptrain the converted model then distills the source model in a run like \
                  those of gd train: first only the changed layers, then the whole model, while the number of keys \
                  decreases to K. gd train --resume DIR continues such a run.\n\n\
                  Examples:\n  gd convert models/SmolLM2-135M --attention gd --layers last:10 --k 8 --out out/smol-gd\n  gd convert model.gguf --dtype bf16 --out out/model\n  \
                  gd convert models/SmolLM2-135M --quantize q4_k_m --out out/model.gguf\n  \
                  gd convert models/SmolLM2-135M --adapter out/adapter --out out/merged\n  \
                  gd convert models/SmolLM2-135M --attention '{\"name\": \"topk\", \"k\": 16}' --out out/smol-topk\n  \
                  gd convert models/SmolLM2-135M --attention gd --k 1 --uptrain --data corpus/ --steps 2000 --out out/smol-1"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Add this adapter (LoRA, as PEFT saves it) to the weights of MODEL. The sums have the data type of the weights
    #[arg(long, value_name = "DIR", conflicts_with = "uptrain")]
    pub adapter: Option<PathBuf>,
    /// New attention mechanism: a name, or an object with its parameters
    #[arg(long, value_name = "NAME|JSON", value_parser = parse_mechanism)]
    pub attention: Option<Mechanism>,
    /// Layers to change: all, last:N, or layer numbers from 0, as in 0,3,5
    #[arg(long, value_name = "LAYERS", default_value = "all", requires = "attention")]
    pub layers: Layers,
    /// Number of keys per query in a selecting layer: 1, 2, 4, 8, 16, 32 or 64 (default: 8)
    #[arg(long, value_name = "K", requires = "attention")]
    pub k: Option<usize>,
    /// Score of a selecting layer: the dot product, or the energy with the key prior that gives the same order (default:
    /// dot)
    #[arg(long, value_name = "SCORE", requires = "attention",
          value_parser = PossibleValuesParser::new(["dot", "energy"]).map(parse_score))]
    pub score: Option<Score>,
    /// Data type of the stored weights (default: that of the source model)
    #[arg(long, value_name = "DTYPE", conflicts_with = "uptrain", value_parser = PossibleValuesParser::new(["f32", "f16", "bf16"]).try_map(|name| name.parse::<DType>()))]
    pub dtype: Option<DType>,
    /// Write a GGUF file with weights in blocks of integers: q8_0, q6_k, q5_k_m, q5_1, q5_0, q4_k_m, q4_1 or q4_0. llama.cpp
    /// reads it if all layers have softmax attention
    #[arg(long, value_name = "TYPE", conflicts_with_all = ["uptrain", "dtype"])]
    pub quantize: Option<Quantization>,
    /// The flags of the training
    #[command(flatten)]
    pub uptrain: UptrainArgs,
    /// Folder for the new model, or with --quantize the file, which must not exist
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
}

/// The flags of `gd convert --uptrain`.
#[derive(Debug, clap::Args)]
// The flags belong to the group of `gd convert`, into which they are flattened.
#[group(skip)]
pub struct UptrainArgs {
    /// Train the converted model on a text and on the logits of the source model
    #[arg(long, requires = "attention")]
    pub uptrain: bool,
    /// Text to train on: files, JSONL files, folders of them, or one folder of prepared data (default: the sample
    /// text)
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "uptrain")]
    pub data: Vec<PathBuf>,
    /// How files are split into documents
    #[command(flatten)]
    pub documents: DocumentArgs,
    /// Number of optimizer steps (default: 500)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "uptrain")]
    pub steps: Option<u64>,
    /// Override a value of models/uptrain.json by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "uptrain")]
    pub set: Vec<Setting>,
    /// Stop after this many steps with a checkpoint
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "uptrain")]
    pub stop_after: Option<u64>,
}

impl Args {
    /// The number of keys per query of a selecting layer.
    pub(super) fn k(&self) -> usize {
        self.k.unwrap_or(DEFAULT_K)
    }

    /// Whether the new layers select.
    pub(super) fn selects(&self) -> bool {
        self.attention == Some(Mechanism::Gd)
    }

    /// The replacement that the flags describe, if there is one.
    pub(super) fn swap(&self) -> Option<Swap> {
        self.attention.clone().map(|mechanism| Swap {
            layers: self.layers.clone(),
            mechanism,
            candidates: self.k(),
            score: self.score.unwrap_or(Score::Dot),
        })
    }
}

/// Keys per query of a selecting layer.
const DEFAULT_K: usize = 8;

/// The mechanism of a name, or of a JSON object with its parameters.
fn parse_mechanism(text: &str) -> Result<Mechanism, String> {
    let refused = AttentionMechanism::named(text).and_then(|mechanism| mechanism.info().not_in_models);
    if let Some(reason) = refused {
        return Err(format!("the mechanism {text} cannot be in a layer: {reason}"));
    }
    let value = match text.trim_start().starts_with('{') {
        true => serde_json::from_str(text).map_err(|e| e.to_string())?,
        false => Value::from(text),
    };
    serde_json::from_value(value).map_err(|e| e.to_string())
}

fn parse_score(name: String) -> Score {
    if name == "dot" { Score::Dot } else { Score::Energy }
}
