//! Models: loading and generation.

use std::path::PathBuf;

use candle_core::Device;
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::infer::stop::StopStrings;
use gd_model::infer::text::{FinishReason, TextStream};
use gd_model::model::pretrained::Loaded;
use pyo3::prelude::*;

use crate::error::invalid;

/// A loaded language model, which computes in float32 on the CPU.
#[pyclass(frozen, module = "gd_attention._native")]
pub(crate) struct Model {
    loaded: Loaded,
}

#[pymethods]
impl Model {
    /// Loads a model as `gd` does.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let loaded = py.detach(|| gd_model::load(&path, &Device::Cpu)).map_err(invalid)?;
        Ok(Self { loaded })
    }

    /// The configuration as JSON.
    fn config(&self) -> PyResult<String> {
        Ok(self.loaded.model.config().to_json().map_err(invalid)?.to_string())
    }

    /// The token ids of a text.
    fn encode(&self, text: &str) -> PyResult<Vec<u32>> {
        self.loaded.tokenizer.encode(text).map_err(invalid)
    }

    /// The text of token ids.
    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        self.loaded.tokenizer.decode(&ids).map_err(invalid)
    }

    /// The text that continues a prompt, its tokens, and why it ends.
    #[expect(clippy::too_many_arguments, reason = "the keyword arguments of Python")]
    fn generate(
        &self,
        py: Python<'_>,
        prompt: &str,
        max_tokens: usize,
        temperature: Option<f64>,
        top_k: Option<usize>,
        top_p: Option<f64>,
        min_p: Option<f64>,
        repetition_penalty: Option<f64>,
        seed: u64,
        stop: Vec<String>,
    ) -> PyResult<(String, Vec<u32>, &'static str)> {
        let defaults = Sampling::from_generation_config(&self.loaded.generation).map_err(invalid)?;
        let sampling = Sampling {
            temperature: temperature.unwrap_or(defaults.temperature),
            top_k: top_k.or(defaults.top_k),
            top_p: top_p.or(defaults.top_p),
            min_p: min_p.or(defaults.min_p),
            repetition_penalty: repetition_penalty.unwrap_or(defaults.repetition_penalty),
        };
        let (text, tokens, reason) =
            py.detach(|| self.continuation(prompt, max_tokens, sampling, seed, stop)).map_err(invalid)?;
        let reason = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Eos => "eos",
            FinishReason::Length => "length",
        };
        Ok((text, tokens, reason))
    }
}

impl Model {
    fn continuation(
        &self,
        prompt: &str,
        max_tokens: usize,
        sampling: Sampling,
        seed: u64,
        stop: Vec<String>,
    ) -> gd_model::Result<(String, Vec<u32>, FinishReason)> {
        let Loaded { model, tokenizer, .. } = &self.loaded;
        let ids = self.loaded.encode_prompt(prompt)?;
        let end_tokens = self.loaded.end_tokens()?;
        let stop = StopStrings::new(stop)?.with_special_tokens(&tokenizer.special_tokens());
        let mut stream = TextStream::new(tokenizer.stream_after(&ids)?, stop, &end_tokens);
        let (mut text, mut sampler) = (String::new(), Sampler::new(sampling, seed)?);
        let tokens = gd_model::generate(model, &ids, max_tokens, &mut sampler, &Device::Cpu, |token| {
            let (complete, goes_on) = stream.push(token)?;
            text += &complete;
            Ok(goes_on)
        })?;
        let (rest, reason) = stream.finish()?;
        Ok((text + &rest, tokens, reason))
    }
}
