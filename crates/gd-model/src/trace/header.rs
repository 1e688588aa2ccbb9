//! What holds for a whole trace.

use candle_core::Device;
use gd_kernels::{Barrier, Estimator, Gate, Isa, Score, TieBreak};
use serde::{Deserialize, Serialize};

use super::Intervention;
use crate::config::{Mechanism, ModelConfig};
use crate::error::{Error, Result};
use crate::infer::sampler::Sampling;
use crate::model::pretrained::Loaded;

/// What a trace file calls itself, and the version of its layout.
pub const FORMAT: (&str, u32) = ("gd-trace", 1);

/// The most heads, rounds or candidates of a layer; beyond is damage.
const MOST: usize = 1 << 16;

/// What holds for a whole trace: what was run on what, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// `gd-trace`.
    pub format: String,
    /// 1.
    pub version: u32,
    /// The version of the program.
    pub gd: String,
    /// The model.
    pub model: Model,
    /// Hash of the prompt's tokens, little-endian u32s.
    pub input: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// `cpu`, `cuda` or `metal`.
    pub device: String,
    /// The CPU's instruction set, or the name of the device's architecture.
    pub isa: String,
    /// What the model computes in.
    pub precision: String,
    /// How tokens were drawn; none if none was.
    pub sampling: Option<Sampling>,
    /// The seed of the draws.
    pub seed: u64,
    /// What was forced, banned or silenced.
    pub interventions: Vec<Intervention>,
    /// Every layer of the model.
    pub layers: Vec<Layer>,
}

/// A model by its hashes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// The name of its folder or file, for readers: nothing depends on it.
    pub name: String,
    /// Hash of the parameters: names, shapes, types and values, as loaded.
    pub weights: String,
    /// Hash of `config.json`, keys in order.
    pub config: String,
    /// Hash of `tokenizer.json`.
    pub tokenizer: String,
}

/// A layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Its number.
    pub layer: usize,
    /// `gd` or `softmax`.
    pub mechanism: Mechanism,
    /// Whether each head reads one position, so that there is something to record.
    pub selects: bool,
    /// Query heads.
    pub heads: usize,
    /// Candidates per query, protected ones not counted.
    pub candidates: usize,
    /// Rounds of selection.
    pub rounds: usize,
    /// How keys are scored.
    pub score: Score,
    /// Which of equals wins.
    pub tie: TieBreak,
    /// What scales the value.
    pub gate: Gate,
    /// Threshold per head; none where the heads have none.
    pub threshold: Option<Vec<f32>>,
    /// The barrier, if there is one.
    pub barrier: Option<Barrier>,
    /// Whether the Beacon adds running averages to the heads.
    pub memory: bool,
}

/// A hash as traces write it.
pub(super) fn hash(bytes: &[u8]) -> String {
    format!("blake3:{}", blake3::hash(bytes).to_hex())
}

impl Model {
    /// Hashes a model.
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

    /// The first part in which another model differs.
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
    /// The header of a run over `prompt`.
    ///
    /// # Errors
    /// A model without a selecting layer.
    pub fn new(
        loaded: &Loaded,
        name: &str,
        prompt: &[u32],
        draws: Option<(Sampling, u64)>,
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
            sampling: draws.map(|d| d.0),
            seed: draws.map_or(0, |d| d.1),
            interventions: interventions.to_vec(),
            layers,
        })
    }

    /// Checks a header that was read against itself.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let (name, version) = FORMAT;
        if (self.format.as_str(), self.version) != FORMAT {
            return Err(format!("{} {}, where {name} {version} is known", self.format, self.version));
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let Layer { heads, rounds, candidates, .. } = *layer;
            let counts = [heads, rounds, candidates];
            if layer.layer != i || counts.iter().any(|n| !(1..=MOST).contains(n)) {
                return Err(format!(
                    "layer {} in place {i} has {heads} heads, {rounds} rounds, {candidates} candidates",
                    layer.layer
                ));
            }
            if let Some(tau) = layer.threshold.as_ref().filter(|tau| tau.len() != heads) {
                return Err(format!("layer {i} has {} thresholds for {heads} heads", tau.len()));
            }
        }
        if self.prompt_tokens == 0 || !self.layers.iter().any(|layer| layer.selects) {
            return Err(format!("{} tokens of a prompt, or no layer that selects", self.prompt_tokens));
        }
        Ok(())
    }

    /// The layers that select, first to last.
    pub fn selecting(&self) -> impl Iterator<Item = &Layer> {
        self.layers.iter().filter(|layer| layer.selects)
    }

    /// Heads of all selecting layers.
    pub fn rows(&self) -> usize {
        self.selecting().map(|layer| layer.heads).sum()
    }

    /// Whether the same program computes on the same kind of machine, so that all bits are to be equal.
    pub fn same_backend(&self, other: &Self) -> bool {
        let of = |h: &Self| (h.gd.clone(), h.device.clone(), h.isa.clone(), h.precision.clone());
        of(self) == of(other)
    }
}

/// Device and instruction set that a run computes with.
fn backend(device: &Device) -> (String, String) {
    match device {
        Device::Cpu => ("cpu".into(), format!("{:?}", Isa::available()[0])),
        Device::Cuda(_) => ("cuda".into(), String::new()),
        Device::Metal(_) => ("metal".into(), String::new()),
    }
}

/// Why there is nothing to trace in a model.
fn none_selects(config: &ModelConfig) -> String {
    let gd = (0..config.num_hidden_layers).filter(|&i| config.mechanism(i) == Mechanism::Gd).count();
    let how = match gd {
        0 => "all layers are softmax attention".into(),
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
        let threshold = tensors.get(&name).filter(|_| mechanism == Mechanism::Gd);
        let threshold = threshold
            .map(|t| t.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>())
            .transpose()
            .map_err(Error::from)?;
        if let Some(x) = threshold.iter().flatten().find(|x| !x.is_finite()) {
            return Err(Error::Invalid(format!("{name} holds {x}")));
        }
        Ok(Layer {
            layer: i,
            mechanism,
            selects: mechanism == Mechanism::Gd && (gd.estimator != Estimator::Blend || gd.candidates == 1),
            heads: attention.num_attention_heads,
            candidates: gd.candidates,
            rounds: gd.rounds,
            score: gd.score,
            tie: gd.tie,
            gate: gd.gate,
            threshold,
            barrier: attention.beacon.as_ref().and_then(|b| b.barrier),
            memory: attention.beacon.as_ref().is_some_and(|b| b.averages > 0),
        })
    };
    (0..config.num_hidden_layers).map(layer).collect()
}
