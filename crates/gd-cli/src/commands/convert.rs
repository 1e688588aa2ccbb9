//! `gd convert`: a model with another attention, in a folder of its own.

use std::path::PathBuf;

use anyhow::Result;
use candle_core::DType;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gd_kernels::{CANDIDATES, Score};
use gd_model::config::Mechanism;
use gd_model::io::checkpoint::check_writable;
use gd_model::model::pretrained::{self, Loaded};
use gd_model::model::swap::{Layers, Swap};
use serde_json::json;

use super::{Context, train, uptrain, usage};

/// Replace the attention of a model, keeping its weights or training them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "MODEL is a checkpoint of Llama, Mistral, Qwen2 or Qwen3, or one of this program. Without --attention it \
                  is saved as it is, GGUF as safetensors. A selecting layer that was a softmax layer blends the values of the k best keys; \
                  with as many candidates as keys it is that softmax layer. With --uptrain the model then learns from \
                  the one it was, in a run like those of gd train: the changed layers first, then the whole, while \
                  the keys become fewer; gd train --resume DIR goes on with it.\n\n\
                  Examples:\n  gd convert models/SmolLM2-135M --attention gd --layers last:10 --k 8 --out out/smol-gd\n  gd convert model.gguf --dtype bf16 --out out/model\n  \
                  gd convert models/SmolLM2-135M --attention gd --k 1 --uptrain --data corpus/ --steps 2000 --out out/smol-1"
)]
pub struct Args {
    /// The model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// The attention to put in
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(["gd", "softmax"]).map(mechanism))]
    pub attention: Option<Mechanism>,
    /// Where: all, last:N, or layer numbers from 0, as in 0,3,5
    #[arg(long, value_name = "LAYERS", default_value = "all", requires = "attention")]
    pub layers: Layers,
    /// Keys that a selecting layer blends for a query: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "K", default_value_t = 8, requires = "attention")]
    pub k: usize,
    /// How a selecting layer scores them: by the dot product, or by the energy with the prior that makes it one
    #[arg(long, value_name = "SCORE", default_value = "dot", requires = "attention",
          value_parser = PossibleValuesParser::new(["dot", "energy"]).map(score))]
    pub score: Score,
    /// The type to store the weights in (default: the one they came in)
    #[arg(long, value_name = "DTYPE", conflicts_with = "uptrain", value_parser = PossibleValuesParser::new(["f32", "f16", "bf16"]).try_map(|name| name.parse::<DType>()))]
    pub dtype: Option<DType>,
    /// Whether and how to train it
    #[command(flatten)]
    pub uptrain: uptrain::Args,
    /// The folder for the new model, which does not exist yet
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

fn mechanism(name: String) -> Mechanism {
    if name == "gd" { Mechanism::Gd } else { Mechanism::Softmax }
}

fn score(name: String) -> Score {
    if name == "dot" { Score::Dot } else { Score::Energy }
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    if !CANDIDATES.contains(&args.k) {
        return Err(usage(format!("--k {}: expected one of {CANDIDATES:?}", args.k)));
    }
    if args.out.symlink_metadata().is_ok() {
        return Err(usage(format!("--out {}: exists already", args.out.display())));
    }
    check_writable(&args.out)?;
    if args.uptrain.uptrain {
        return train::together(ctx, |group| uptrain::run(group, &args, ctx));
    }
    let mut parts = pretrained::read(&args.model, &ctx.device)?;
    let layers = args.swap().map_or(Ok(Vec::new()), |swap| swap.apply(&mut parts))?;
    if let Some(dtype) = args.dtype {
        parts.cast(dtype)?;
    }
    let loaded = parts.build(&ctx.device)?;
    loaded.save(&args.out, &card(&args, &layers, &loaded))?;
    let selecting = (0..loaded.model.config().num_hidden_layers)
        .filter(|&i| loaded.model.config().mechanism(i) == Mechanism::Gd)
        .count();
    if ctx.json {
        return ctx.print(json!({
            "folder": args.out, "changed": layers, "selecting": selecting,
            "layers": loaded.model.config().num_hidden_layers, "parameters": loaded.params.count(),
            "passed_over": loaded.passed_over,
        }));
    }
    ctx.print(format_args!(
        "{} layers changed; {selecting} of {} select; {} parameters\nsaved {}",
        layers.len(),
        loaded.model.config().num_hidden_layers,
        loaded.params.count(),
        args.out.display()
    ))
}

impl Args {
    /// What to put in the place of which attention.
    pub(super) fn swap(&self) -> Option<Swap> {
        let Self { layers, k, score, .. } = self;
        self.attention.map(|mechanism| Swap {
            layers: layers.clone(),
            mechanism,
            candidates: *k,
            score: *score,
        })
    }
}

/// The values of the model card.
fn card(args: &Args, layers: &[usize], loaded: &Loaded) -> Vec<(&'static str, String)> {
    let name = |path: &PathBuf| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let config = loaded.model.config();
    let select = &config.gd.select;
    let mechanism = match args.attention {
        None => "as it was".to_owned(),
        Some(Mechanism::Softmax) => format!("softmax in layers {layers:?}"),
        Some(Mechanism::Gd) => {
            format!(
                "the {} best keys, blended, in layers {layers:?}; score {:?}",
                select.candidates, select.score
            )
        }
    };
    vec![
        ("name", name(&args.out)),
        ("summary", format!("{} with another attention, not trained since.", name(&args.model))),
        ("parameters", loaded.params.count().to_string()),
        ("mechanism", mechanism),
        ("tokenizer", format!("{} tokens", loaded.tokenizer.vocab_size())),
        ("context", config.max_position_embeddings.to_string()),
        ("data", "that of the original".into()),
        ("steps", "none".into()),
        ("loss", "not measured".into()),
    ]
}
