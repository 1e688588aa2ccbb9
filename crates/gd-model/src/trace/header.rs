//! The header of a trace: the model, the input, the backend and the settings of the layers.

use candle_core::Device;
use gd_kernels::{Barrier, Estimator, Gate, Isa, Score, TieBreak};
use serde::{Deserialize, Serialize};

use super::Intervention;
use super::record::Slot;
use crate::config::{Mechanism, ModelConfig};
use crate::error::{Error, Result};
use crate::infer::sampler::Sampling;
use crate::model::pretrained::Loaded;

/// The name of the format.
pub const FORMAT: &str = "gd-trace";

/// The version of the format that is written. Versions 1 and 2 are still read.
pub const VERSION: u32 = 3;

/// The number of greatest weights that are recorded for each head of a softmax layer, if they are.
const BLEND_WEIGHTS: usize = 8;

/// The maximal number of layers; more are refused as damaged.
const MAX_LAYERS: usize = 1024;

/// The maximal number of heads, rounds and candidates of a layer; larger ones are refused as damaged.
const MAX_COUNT: usize = 1 << 16;

/// The maximal number of weights of a head, whose number is a byte of the record.
const MAX_WEIGHTS: usize = 255;

/// The header of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The name of the format, `gd-trace`.
    pub format: String,
    /// The version of the format, 3 or, of an older trace, 1 or 2.
    pub version: u32,
    /// The version of this crate.
    pub gd: String,
    /// The model.
    pub model: Model,
    /// The hash of the tokens of the prompt as little-endian u32.
    pub input: String,
    /// The number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// `cpu`, `cuda` or `metal`.
    pub device: String,
    /// The instruction set of the CPU kernels; empty on other devices.
    pub isa: String,
    /// The dtype of the computation.
    pub precision: String,
    /// The sampling parameters; `None` if no tokens were generated.
    pub sampling: Option<Sampling>,
    /// The seed of the sampling.
    pub seed: u64,
    /// The maximal number of new tokens; `None` if no tokens were generated, and in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// The tokens that end the generation; `None` if no tokens were generated, and in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_tokens: Option<Vec<u32>>,
    /// The interventions during the run.
    pub interventions: Vec<Intervention>,
    /// All layers of the model.
    pub layers: Vec<Layer>,
}

/// The hashes that identify a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name of the folder or file of the model. Verification ignores it.
    pub name: String,
    /// The hash of the loaded parameters: names, shapes, dtypes and values.
    pub weights: String,
    /// The hash of `config.json` with sorted keys.
    pub config: String,
    /// The hash of `tokenizer.json`.
    pub tokenizer: String,
}

/// How tokens are generated after the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The sampling parameters.
    pub sampling: Sampling,
    /// The seed of the sampling.
    pub seed: u64,
    /// The maximal number of new tokens.
    pub max_tokens: usize,
    /// The end tokens, see [`Loaded::end_tokens`]. They end the generation and are not recorded.
    pub end_tokens: Vec<u32>,
}

/// The settings of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The index of the layer.
    pub layer: usize,
    /// The mechanism, as in the configuration.
    pub mechanism: Mechanism,
    /// Whether each head reads at most one position per round. The selections of these layers are recorded.
    pub selects: bool,
    /// The number of greatest weights that are recorded for each head of a softmax layer; 0 if none are.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub weights: usize,
    /// The number of query heads.
    pub heads: usize,
    /// The number of candidates per query, without additional protected ones.
    pub candidates: usize,
    /// The number of rounds of selection.
    pub rounds: usize,
    /// The number of positions that a head reads from one scan. 1 in traces without this key.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub picks: usize,
    /// How keys are scored.
    pub score: Score,
    /// Which of several keys with equal energy wins.
    pub tie: TieBreak,
    /// The gate that multiplies the selected value.
    pub gate: Gate,
    /// The least energy gate of a read; reads below it are dropped. 1/2 in traces without this key.
    #[serde(default = "half", skip_serializing_if = "is_half")]
    pub exclude_below: f64,
    /// The threshold of each head; `None` if the heads have none.
    pub threshold: Option<Vec<f32>>,
    /// How the thresholds follow the number of visible keys; `None` if they do not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold_by_length: Option<ThresholdByLength>,
    /// The barrier, if there is one.
    pub barrier: Option<Barrier>,
    /// Whether the Beacon adds running averages to the outputs of the heads.
    pub memory: bool,
}

/// How the thresholds of a layer follow the number n of keys that a query sees: tau + slope ln n.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ThresholdByLength {
    /// The slope of each head.
    pub slope: Vec<f32>,
    /// The number of most recent keys that a query sees at most; `None` for all.
    pub window: Option<usize>,
}

impl ThresholdByLength {
    /// What is added to the threshold of head `h` at a position, in the operations of the layer.
    fn shift(&self, h: usize, position: usize) -> f32 {
        let visible = self.window.map_or(position + 1, |window| window.min(position + 1));
        self.slope[h] * (visible as f64).ln() as f32
    }
}

/// The default of `picks`.
fn one() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_one(x: &usize) -> bool {
    *x == one()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_zero(x: &usize) -> bool {
    *x == 0
}

/// The default of `exclude_below`.
fn half() -> f64 {
    0.5
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_half(x: &f64) -> bool {
    *x == half()
}

impl Layer {
    /// Whether records describe its heads.
    fn is_recorded(&self) -> bool {
        self.selects || self.weights > 0
    }

    /// The threshold of head `h` for the query at a position with these candidates; `None` without thresholds.
    pub(super) fn threshold_at(&self, h: usize, position: usize, candidates: &[Slot]) -> Option<f32> {
        let tau = self.threshold.as_ref()?[h];
        let tau =
            self.threshold_by_length.as_ref().map_or(tau, |by_length| tau + by_length.shift(h, position));
        match self.gate {
            Gate::Margin { .. } => {
                let runner_up = candidates.get(self.picks).map_or(f32::INFINITY, |slot| slot.energy);
                Some(runner_up + tau)
            }
            Gate::None | Gate::Energy { .. } | Gate::Coherence => Some(tau),
        }
    }

    /// The greatest energy that head `h` can select for the query at a position with these candidates; `None` without a
    /// threshold.
    pub(super) fn limit(&self, h: usize, position: usize, candidates: &[Slot]) -> Option<f32> {
        let admission = self.gate.admission(self.exclude_below) as f32;
        self.threshold_at(h, position, candidates).map(|tau| tau + admission)
    }
}

/// The BLAKE3 hash in the notation of the header, `blake3:` and hexadecimal digits.
pub(super) fn hash(bytes: &[u8]) -> String {
    format!("blake3:{}", blake3::hash(bytes).to_hex())
}

impl Model {
    /// Computes the hashes of a model.
    ///
    /// # Errors
    /// Parameters that cannot be read from their device.
    pub fn of(loaded: &Loaded, name: &str) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            weights: format!("blake3:{}", loaded.params.hash()?.to_hex()),
            config: hash(loaded.model.config().to_json()?.to_string().as_bytes()),
            tokenizer: hash(loaded.tokenizer.to_json()?.as_bytes()),
        })
    }

    /// The first of `weights`, `config` and `tokenizer` whose hashes differ; `None` if all are equal.
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        [
            ("weights", &self.weights, &other.weights),
            ("config", &self.config, &other.config),
            ("tokenizer", &self.tokenizer, &other.tokenizer),
        ]
        .into_iter()
        .find_map(|(name, a, b)| (a != b).then_some(name))
    }
}

impl Header {
    /// The header of a run over `prompt`. `name` is the name of the model; `generation` says how tokens are generated, if
    /// they are.
    ///
    /// # Errors
    /// [`Error::NothingSelects`] for a model without a layer that selects single positions; an error of the device.
    pub fn new(
        loaded: &Loaded,
        name: &str,
        prompt: &[u32],
        generation: Option<&Generation>,
        interventions: &[Intervention],
        device: &Device,
    ) -> Result<Self> {
        Self::with_weights(loaded, name, prompt, generation, interventions, 0, device)
    }

    /// The header of a run that records the greatest weights of softmax layers, too.
    ///
    /// # Errors
    /// [`Error::NothingSelects`] for a model without a layer that selects and without a softmax layer; an error of the device.
    pub fn with_blends(
        loaded: &Loaded,
        name: &str,
        prompt: &[u32],
        generation: Option<&Generation>,
        interventions: &[Intervention],
        device: &Device,
    ) -> Result<Self> {
        Self::with_weights(loaded, name, prompt, generation, interventions, BLEND_WEIGHTS, device)
    }

    fn with_weights(
        loaded: &Loaded,
        name: &str,
        prompt: &[u32],
        generation: Option<&Generation>,
        interventions: &[Intervention],
        weights: usize,
        device: &Device,
    ) -> Result<Self> {
        let layers = layers(loaded, weights)?;
        if !layers.iter().any(Layer::is_recorded) {
            return Err(none_selects(loaded.model.config()));
        }
        let input: Vec<u8> = prompt.iter().flat_map(|token| token.to_le_bytes()).collect();
        let (device, isa) = backend(device);
        Ok(Self {
            format: FORMAT.into(),
            version: VERSION,
            gd: env!("CARGO_PKG_VERSION").into(),
            model: Model::of(loaded, name)?,
            input: hash(&input),
            prompt_tokens: prompt.len(),
            device,
            isa,
            precision: "f32".into(),
            sampling: generation.map(|g| g.sampling),
            seed: generation.map_or(0, |g| g.seed),
            max_tokens: generation.map(|g| g.max_tokens),
            end_tokens: generation.map(|g| g.end_tokens.clone()),
            interventions: interventions.to_vec(),
            layers,
        })
    }

    /// Checks that a header from a file of this version is consistent.
    pub(super) fn check(&self, version: u32) -> std::result::Result<(), String> {
        if (self.format.as_str(), self.version) != (FORMAT, version) {
            return Err(format!(
                "{} {} is not supported (supported here: {FORMAT} {version})",
                self.format, self.version
            ));
        }
        let generates = version != 1 && self.sampling.is_some();
        if [self.max_tokens.is_some(), self.end_tokens.is_some()] != [generates; 2] {
            return Err("its header describes a part of a generation".into());
        }
        if version < 3 && self.layers.iter().any(|layer| layer.weights > 0) {
            return Err(format!("version {version} has no weights of softmax layers"));
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(format!("{} layers; the maximum is {MAX_LAYERS}", self.layers.len()));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let Layer { heads, rounds, candidates, .. } = *layer;
            let counts = [heads, rounds, candidates, layer.picks];
            let blends = layer.weights > 0 && (layer.selects || layer.weights > MAX_WEIGHTS);
            if layer.layer != i || blends || counts.iter().any(|n| !(1..=MAX_COUNT).contains(n)) {
                return Err(format!(
                    "layer {} at index {i} has {heads} heads, {rounds} rounds, {candidates} candidates, {} weights",
                    layer.layer, layer.weights
                ));
            }
            if let Some(tau) = layer.threshold.as_ref().filter(|tau| tau.len() != heads) {
                return Err(format!("layer {i} has {} thresholds for {heads} heads", tau.len()));
            }
            if let Some(by_length) = &layer.threshold_by_length
                && (by_length.slope.len() != heads || by_length.window == Some(0))
            {
                let (slopes, window) = (by_length.slope.len(), by_length.window);
                return Err(format!(
                    "layer {i} has {slopes} slopes for {heads} heads, a window of {window:?}"
                ));
            }
        }
        if self.prompt_tokens == 0 || !self.layers.iter().any(Layer::is_recorded) {
            return Err(format!("a prompt of {} tokens, or no layer that is recorded", self.prompt_tokens));
        }
        Ok(())
    }

    /// The layers that select, in order.
    pub fn selecting(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| layer.selects)
    }

    /// The softmax layers whose greatest weights are recorded, in order.
    pub fn blending(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| layer.weights > 0)
    }

    /// Whether records name the runner-up of a head with a single candidate. In versions 1 and 2 of the format they do not.
    pub(super) fn names_runner_up(&self) -> bool {
        self.version >= 3
    }

    /// The number of heads of all selecting layers, which is the number of rows of a record.
    pub fn rows(&self) -> usize {
        self.selecting().map(|layer| layer.heads).sum()
    }

    /// Whether version, device, instruction set and dtype are equal, so that all bits must be equal.
    pub fn same_backend(&self, other: &Self) -> bool {
        let of = |h: &Self| (h.gd.clone(), h.device.clone(), h.isa.clone(), h.precision.clone());
        of(self) == of(other)
    }

    /// Device, instruction set, dtype and version in words.
    pub fn backend(&self) -> String {
        let Self { device, isa, precision, gd, .. } = self;
        let device = [device.as_str(), isa].join(" ");
        format!("{} in {precision} by gd {gd}", device.trim())
    }

    /// How tokens are generated; `None` if they are not, or if the header, of version 1, does not say it.
    pub(super) fn generation(&self) -> Option<Generation> {
        let (sampling, max_tokens, end_tokens) = (self.sampling?, self.max_tokens?, self.end_tokens.clone()?);
        Some(Generation { sampling, seed: self.seed, max_tokens, end_tokens })
    }
}

/// The device and the instruction set.
fn backend(device: &Device) -> (String, String) {
    match device {
        Device::Cpu => ("cpu".into(), format!("{:?}", Isa::available()[0])),
        Device::Cuda(_) => ("cuda".into(), String::new()),
        Device::Metal(_) => ("metal".into(), String::new()),
    }
}

/// The error for a model without a selecting layer.
fn none_selects(config: &ModelConfig) -> Error {
    let mut names: Vec<_> = (0..config.num_hidden_layers).map(|i| config.mechanism(i).name()).collect();
    let gd = names.iter().filter(|name| **name == Mechanism::Gd.name()).count();
    names.dedup();
    let reason = match gd {
        0 => format!("all layers are {} attention", names.join(" or ")),
        _ => format!("its {gd} gd layers blend more than one candidate (estimator blend)"),
    };
    Error::NothingSelects { reason }
}

/// The layers of a model, of which softmax layers record `weights` weights.
fn layers(loaded: &Loaded, weights: usize) -> Result<Vec<Layer>> {
    let config = loaded.model.config();
    let tensors = loaded.params.tensors();
    let layer = |i: usize| -> Result<Layer> {
        let attention = config.attention(i);
        let (gd, mechanism) = (&attention.gd, config.mechanism(i));
        let of_heads = |weight: &str| -> Result<Option<Vec<f32>>> {
            let name = format!("model.layers.{i}.self_attn.gd.{weight}");
            let values = tensors.get(&name).filter(|_| *mechanism == Mechanism::Gd);
            let values = values.map(|t| t.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()).transpose()?;
            match values.iter().flatten().find(|x| !x.is_finite()) {
                Some(x) => Err(Error::Invalid(format!("{name} holds {x}"))),
                None => Ok(values),
            }
        };
        let threshold_by_length =
            of_heads("threshold_slope")?.map(|slope| ThresholdByLength { slope, window: attention.window });
        Ok(Layer {
            layer: i,
            mechanism: mechanism.clone(),
            selects: *mechanism == Mechanism::Gd
                && attention.reading_heads() > 0
                && (gd.estimator != Estimator::Blend || gd.candidates == 1),
            weights: match mechanism {
                Mechanism::Softmax | Mechanism::SoftmaxNull if attention.reading_heads() > 0 => weights,
                _ => 0,
            },
            heads: attention.reading_heads(),
            candidates: gd.candidates,
            rounds: gd.rounds,
            picks: gd.picks,
            score: gd.score,
            tie: gd.tie,
            gate: gd.gate,
            exclude_below: gd.exclude_below,
            threshold: of_heads("threshold")?,
            threshold_by_length,
            barrier: attention.beacon.as_ref().and_then(|b| b.barrier),
            memory: attention.beacon.as_ref().is_some_and(|b| b.averages > 0),
        })
    };
    (0..config.num_hidden_layers).map(layer).collect()
}
