//! What the commands that generate text share: sampling flags, and how tokens are shown.

use std::path::Path;

use anyhow::Result;
use candle_core::DType;
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::sampler::Sampling;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::{Value, json};

use crate::context::{Context, flag_error};

/// The flags of sampling. Those that are not given have the values of the model's generation_config.json.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SamplingArgs {
    /// Sampling temperature; 0 always takes the most probable token (default: that of the model, else 0.8)
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,
    /// Sample from the K most probable tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample from the smallest set of most probable tokens with this total probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample from the tokens with at least this share of the highest probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Divisor of the logits of tokens that already occur (1: no penalty)
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f64>,
}

impl SamplingArgs {
    /// Checks the flags that are given, before a model is loaded.
    ///
    /// # Errors
    /// A usage error that names the flag.
    pub fn validate(&self) -> Result<()> {
        self.over(Sampling::default()).validate().map_err(flag_error)
    }

    /// These flags over the defaults of a model, the content of its `generation_config.json`.
    ///
    /// # Errors
    /// A flag or a default that is out of range.
    pub fn sampling(&self, generation: &Value) -> Result<Sampling> {
        let sampling = self.over(Sampling::from_generation_config(generation)?);
        sampling.validate().map_err(flag_error)?;
        Ok(sampling)
    }

    fn over(&self, defaults: Sampling) -> Sampling {
        Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.or(defaults.top_k),
            top_p: self.top_p.or(defaults.top_p),
            min_p: self.min_p.or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        }
    }
}

/// A dtype of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheDtype {
    /// 32 bits.
    F32,
    /// 16 bits, of which 10 are those of the mantissa; numbers up to 65504.
    F16,
    /// 16 bits, of which 7 are those of the mantissa; numbers as large as in f32.
    Bf16,
}

/// The flags of the cache.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CacheArgs {
    /// Dtype of cached keys and values: 16 bits take half the memory (default: f16 on the CPU if the weights are quantised or
    /// in 16 bits, else f32)
    #[arg(long, value_name = "DTYPE")]
    pub cache_dtype: Option<CacheDtype>,
}

impl CacheArgs {
    /// Loads a model whose caches have this dtype.
    ///
    /// # Errors
    /// As [`pretrained::load_quantized`]; a dtype that the device does not have.
    pub fn load(&self, model: &Path, ctx: &Context) -> Result<Loaded> {
        let mut loaded = pretrained::load_quantized(model, &ctx.device)?;
        let dtype = match self.cache_dtype {
            Some(CacheDtype::F32) => DType::F32,
            Some(CacheDtype::F16) => DType::F16,
            Some(CacheDtype::Bf16) => DType::BF16,
            None => loaded.default_cache_dtype(),
        };
        loaded.model.set_cache_dtype(dtype).map_err(flag_error)?;
        Ok(loaded)
    }
}

/// The text of a token by itself; the name of a special token. Bytes that are not UTF-8 become U+FFFD.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    let text = tokenizer.decode(&[id]).unwrap_or_default();
    if text.is_empty() { tokenizer.token(id).unwrap_or_default() } else { text }
}

/// The log-probabilities of a token as JSON: `token`, `text`, `logprob` and the most probable tokens in `top`.
pub fn logprobs_json(tokenizer: &Tokenizer, token: &TokenLogprobs) -> Value {
    let one =
        |id: u32, logprob: f64| json!({ "token": id, "text": token_text(tokenizer, id), "logprob": logprob });
    let mut value = one(token.token, token.logprob);
    value["top"] = token.top.iter().map(|(id, logprob)| one(*id, *logprob)).collect();
    value
}
