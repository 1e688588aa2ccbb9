//! The header of a trace: the model, the input, the backend and the settings of the layers.

use candle_core::Device;
use gd_kernels::{Barrier, Estimator, Gate, Isa, Score, TieBreak};
use serde::{Deserialize, Serialize};

use super::Intervention;
use crate::config::{Mechanism, ModelConfig};
use crate::error::{Error, Result};
use crate::infer::sampler::Sampling;
use crate::model::pretrained::Loaded;

/// The name and version of the format.
pub const FORMAT: (&str, u32) = ("gd-trace", 1);

/// The maximal number of heads, rounds and candidates of a layer; larger ones are refused as damaged.
const MAX_COUNT: usize = 1 << 16;

/// The header of a trace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The name of the format, `gd-trace`.
    pub format: String,
    /// The version of the format, 1.
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

/// The settings of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The index of the layer.
    pub layer: usize,
    /// The mechanism, as in the configuration.
    pub mechanism: Mechanism,
    /// Whether each head reads at most one position per round. Only these layers are recorded.
    pub selects: bool,
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
    /// The barrier, if there is one.
    pub barrier: Option<Barrier>,
    /// Whether the Beacon adds running averages to the outputs of the heads.
    pub memory: bool,
}

/// The default of `picks`.
fn one() -> usize {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde passes a reference
fn is_one(x: &usize) -> bool {
    *x == one()
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
    /// The greatest energy that head `h` can select; `None` without a threshold.
    pub(super) fn limit(&self, h: usize) -> Option<f32> {
        let admission = self.gate.admission(self.exclude_below) as f32;
        self.threshold.as_ref().map(|tau| tau[h] + admission)
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
    /// The header of a run over `prompt`. `name` is the name of the model, `sampling` the parameters and the seed of the
    /// sampling if tokens are generated.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a model without a layer that selects single positions; an error of the device.
    pub fn new(
        loaded: &Loaded,
        name: &str,
        prompt: &[u32],
        sampling: Option<(Sampling, u64)>,
        interventions: &[Intervention],
        device: &Device,
    ) -> Result<Self> {
        let layers = layers(loaded)?;
        if !layers.iter().any(|layer| layer.selects) {
            return Err(Error::Invalid(none_selects(loaded.model.config())));
        }
        let input: Vec<u8> = prompt.iter().flat_map(|token| token.to_le_bytes()).collect();
        let (device, isa) = backend(device);
        Ok(Self {
            format: FORMAT.0.into(),
            version: FORMAT.1,
            gd: env!("CARGO_PKG_VERSION").into(),
            model: Model::of(loaded, name)?,
            input: hash(&input),
            prompt_tokens: prompt.len(),
            device,
            isa,
            precision: "f32".into(),
            sampling: sampling.map(|(sampling, _)| sampling),
            seed: sampling.map_or(0, |(_, seed)| seed),
            interventions: interventions.to_vec(),
            layers,
        })
    }

    /// Checks that a header from a file is consistent.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let (name, version) = FORMAT;
        if (self.format.as_str(), self.version) != FORMAT {
            return Err(format!(
                "{} {} is not supported (supported: {name} {version})",
                self.format, self.version
            ));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let Layer { heads, rounds, candidates, .. } = *layer;
            let counts = [heads, rounds, candidates, layer.picks];
            if layer.layer != i || counts.iter().any(|n| !(1..=MAX_COUNT).contains(n)) {
                return Err(format!(
                    "layer {} at index {i} has {heads} heads, {rounds} rounds, {candidates} candidates",
                    layer.layer
                ));
            }
            if let Some(tau) = layer.threshold.as_ref().filter(|tau| tau.len() != heads) {
                return Err(format!("layer {i} has {} thresholds for {heads} heads", tau.len()));
            }
        }
        if self.prompt_tokens == 0 || !self.layers.iter().any(|layer| layer.selects) {
            return Err(format!("a prompt of {} tokens, or no layer that selects", self.prompt_tokens));
        }
        Ok(())
    }

    /// The layers that select, in order.
    pub fn selecting(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| layer.selects)
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
}

/// The device and the instruction set.
fn backend(device: &Device) -> (String, String) {
    match device {
        Device::Cpu => ("cpu".into(), format!("{:?}", Isa::available()[0])),
        Device::Cuda(_) => ("cuda".into(), String::new()),
        Device::Metal(_) => ("metal".into(), String::new()),
    }
}

/// The error text for a model without a selecting layer.
fn none_selects(config: &ModelConfig) -> String {
    let mut names: Vec<_> = (0..config.num_hidden_layers).map(|i| config.mechanism(i).name()).collect();
    let gd = names.iter().filter(|name| **name == Mechanism::Gd.name()).count();
    names.dedup();
    let how = match gd {
        0 => format!("all layers are {} attention", names.join(" or ")),
        _ => format!("its {gd} gd layers blend more than one candidate (estimator blend)"),
    };
    format!("the model has no layer that selects one position: {how}; a blend of many has no source to trace")
}

fn layers(loaded: &Loaded) -> Result<Vec<Layer>> {
    let config = loaded.model.config();
    let tensors = loaded.params.tensors();
    let layer = |i: usize| -> Result<Layer> {
        let attention = config.attention(i);
        let (gd, mechanism) = (&attention.gd, config.mechanism(i));
        let name = format!("model.layers.{i}.self_attn.gd.threshold");
        let threshold = tensors.get(&name).filter(|_| *mechanism == Mechanism::Gd);
        let threshold = threshold
            .map(|t| t.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>())
            .transpose()
            .map_err(Error::from)?;
        if let Some(x) = threshold.iter().flatten().find(|x| !x.is_finite()) {
            return Err(Error::Invalid(format!("{name} holds {x}")));
        }
        Ok(Layer {
            layer: i,
            mechanism: mechanism.clone(),
            selects: *mechanism == Mechanism::Gd
                && attention.reading_heads() > 0
                && (gd.estimator != Estimator::Blend || gd.candidates == 1),
            heads: attention.reading_heads(),
            candidates: gd.candidates,
            rounds: gd.rounds,
            picks: gd.picks,
            score: gd.score,
            tie: gd.tie,
            gate: gd.gate,
            exclude_below: gd.exclude_below,
            threshold,
            barrier: attention.beacon.as_ref().and_then(|b| b.barrier),
            memory: attention.beacon.as_ref().is_some_and(|b| b.averages > 0),
        })
    };
    (0..config.num_hidden_layers).map(layer).collect()
}
