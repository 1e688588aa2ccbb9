//! The gradients of all parameters of whole models against finite differences, in f64.
//!
//! The forward pass of a hard selection has no derivative with respect to the scores, so its gradient is an estimate, which
//! the tests of the operator and of the layer check. The models here have a backward pass that is the derivative of the
//! forward pass: presets with blended candidates (hardness 0), and hard selection with the estimator `winner`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use gd_kernels::cross_entropy::cross_entropy;
use gd_kernels::{Barrier, Estimator, Gate, Mask};
use gd_layer::{BeaconConfig, GdConfig, Pass};
use gd_model::analysis::variants::variants;
use gd_model::config::{GdBlock, Mechanism, ModelConfig, PRESETS, Recipe};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The numbers of sequences and of tokens, which are more than the presets have candidates.
const BATCH: (usize, usize) = (2, 13);
/// The step of the finite differences along a direction of length 1.
const STEP: f64 = 1e-6;
/// The tolerance of a slope, relative to the norm of the gradient, and absolute for rounding in the loss.
const TOLERANCE: (f64, f64) = (1e-5, 2e-8);

/// A model with random parameters, and its inputs and targets.
struct Probe {
    model: Transformer,
    params: Params,
    inputs: Tensor,
    targets: Tensor,
    hardness: f64,
    rng: ChaCha8Rng,
}

/// A backend that detaches one parameter.
struct Detaching(Params, Option<&'static str>);

impl SimpleBackend for Detaching {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.0.get(shape, name, init, dtype, device)?;
        Ok(if self.1 == Some(name) { tensor.detach() } else { tensor })
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

impl Probe {
    fn new(config: &ModelConfig, hardness: f64, detached: Option<&'static str>) -> Self {
        let params = Params::new(3, DType::F64, &Device::Cpu);
        let backend = Detaching(params.clone(), detached);
        let vb = VarBuilder::from_backend(Box::new(backend), DType::F64, Device::Cpu);
        let model = Transformer::new(config, vb).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(17);
        // A matrix of zeros would set the gradients that pass through it to zero.
        for (_, var) in params.vars() {
            let noise = random(&mut rng, var.dims(), 0.15);
            var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
        }
        let mut ids = || {
            let n = BATCH.0 * BATCH.1;
            let ids: Vec<u32> = (0..n).map(|_| rng.random_range(0..config.vocab_size as u32)).collect();
            Tensor::from_vec(ids, BATCH, &Device::Cpu).unwrap()
        };
        let (inputs, targets) = (ids(), ids().flatten_all().unwrap());
        Self { model, params, inputs, targets, hardness, rng }
    }

    fn loss(&self) -> Tensor {
        let mask = Mask::causal(0);
        let pass = Pass { hardness: self.hardness, ..Pass::new(&mask) };
        let logits = self.model.forward(&self.inputs, &pass, None).unwrap();
        cross_entropy(&logits.flatten_to(1).unwrap(), &self.targets).unwrap()
    }

    /// The derivative of the loss along a direction in one parameter, by central differences.
    fn slope(&self, var: &Var, direction: &Tensor) -> f64 {
        let origin = var.as_tensor().copy().unwrap();
        let at = |by: f64| {
            var.set(&(&origin + (direction * by).unwrap()).unwrap()).unwrap();
            self.loss().to_scalar::<f64>().unwrap()
        };
        let slope = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        var.set(&origin).unwrap();
        slope
    }

    /// Whether the gradient of a parameter is absent, zero, or not the derivative of the loss, along the gradient and along
    /// a random direction.
    fn fault(&mut self, var: &Var, grads: &GradStore) -> Option<String> {
        let Some(grad) = grads.get(var) else { return Some("absent".into()) };
        let norm = length(grad);
        // Written as !(a > b), so that NaN is a fault.
        if !(norm > 1e-9 && norm.is_finite()) {
            return Some(format!("of norm {norm}"));
        }
        let noise = random(&mut self.rng, var.dims(), 1.0);
        for direction in [(grad / norm).unwrap(), (&noise / length(&noise)).unwrap()] {
            let expected = (grad * &direction).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let slope = self.slope(var, &direction);
            let error = (slope - expected).abs();
            let close = error <= TOLERANCE.0 * norm + TOLERANCE.1;
            if !close {
                return Some(format!("{expected:e} where the loss has slope {slope:e} (norm {norm:e})"));
            }
        }
        None
    }

    /// The number of parameters, and the faults.
    fn faults(&mut self) -> (usize, Vec<String>) {
        let grads = self.loss().backward().unwrap();
        let vars = self.params.vars();
        let fault = |(name, var): &(String, Var)| Some(format!("{name}: {}", self.fault(var, &grads)?));
        (vars.len(), vars.iter().filter_map(fault).collect())
    }
}

fn random(rng: &mut ChaCha8Rng, dims: &[usize], scale: f64) -> Tensor {
    let n = dims.iter().product();
    let values: Vec<f64> = (0..n).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
}

fn length(x: &Tensor) -> f64 {
    x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt()
}

/// The model with the same layers, heads and parts, narrower.
fn narrow(model: ModelConfig) -> ModelConfig {
    ModelConfig { vocab_size: 61, hidden_size: 40, intermediate_size: 56, head_dim: 10, ..model }
}

/// A small model with the parts that the presets do not have: grouped-query attention, biases, an untied head, an output gate,
/// thresholds, protected keys with a barrier, and layers of both kinds.
fn full(select: GdConfig, mechanism: Vec<Mechanism>) -> ModelConfig {
    let mut config = Recipe::load("tiny").unwrap().model;
    config.vocab_size = 29;
    config.hidden_size = 20;
    config.intermediate_size = 28;
    config.num_hidden_layers = 3;
    config.num_attention_heads = 6;
    config.num_key_value_heads = 2;
    config.head_dim = 10;
    config.tie_word_embeddings = false;
    config.attention_bias = true;
    config.gd.output_gate = true;
    (config.gd.mechanism, config.gd.selecting_heads) = (mechanism, Vec::new());
    let barrier = Barrier { floor: 0.2, margin: 2.0, strength: 1.5, entropy_trigger: 0.5, slack: 0.5 };
    config.gd.beacon =
        Some(BeaconConfig { averages: 3, protected: 2, barrier: Some(barrier), ..BeaconConfig::default() });
    config.gd.select = select;
    config
}

#[test]
fn every_parameter_of_every_preset_and_mechanism() {
    // Presets whose `gd` blocks have the same options differ only in size, so one of them is enough.
    let mut checked = Vec::new();
    for (preset, _) in PRESETS {
        let base = narrow(Recipe::load(preset).unwrap().model);
        let options = GdBlock { selecting_heads: Vec::new(), ..base.gd.clone() };
        if checked.contains(&options) {
            continue;
        }
        checked.push(options);
        // The gradient of a hard choice is that of its softmax, which the tests of the layer check.
        for v in variants().iter().filter(|v| v.applies(&base) && v.name != "hard") {
            let (count, faults) = Probe::new(&v.config(&base).unwrap(), 0.0, None).faults();
            // A model whose heads read nothing has no queries and keys.
            let least = if v.name == "beacon" { 30 } else { 46 };
            assert!(count >= least && faults.is_empty(), "{preset}, {}: {faults:#?}", v.name);
        }
    }
}

#[test]
fn every_parameter_of_models_with_every_part() {
    use Mechanism::{Gd, Softmax, SoftmaxNull};
    let plain = GdConfig { candidates: 4, threshold: Some(1.2), ..GdConfig::default() };
    let hard = |gate| GdConfig { estimator: Estimator::Winner, gate, rounds: 2, ..plain.clone() };
    let energy = GdConfig { threshold_by_length: true, ..hard(Gate::Energy { temperature: 0.7 }) };
    let margin = GdConfig { rounds: 1, threshold: Some(0.05), ..hard(Gate::Margin { temperature: 0.7 }) };
    let mut by_margin = full(margin, vec![Gd]);
    by_margin.gd.beacon.iter_mut().for_each(|beacon| beacon.barrier = None);
    let mut coherent = full(hard(Gate::Coherence), vec![Gd]);
    // The coherence gate depends on the distance only, not on prior and threshold.
    coherent.gd.select.threshold = None;
    coherent.gd.beacon = Some(BeaconConfig { prior: false, ..BeaconConfig::default() });
    let by_length = GdConfig { threshold_by_length: true, ..plain.clone() };
    for (name, config, hardness) in [
        ("blend", full(plain, vec![Gd, Softmax, Gd]), 0.0),
        ("blend, null slot by length", full(by_length, vec![Gd, SoftmaxNull, Gd]), 0.0),
        ("winner, energy gate", full(energy, vec![Gd]), 1.0),
        ("winner, margin gate", by_margin, 1.0),
        ("winner, coherence gate", coherent, 1.0),
    ] {
        let (count, faults) = Probe::new(&config, hardness, None).faults();
        assert!(count > 40 && faults.is_empty(), "{name}: {faults:#?}");
    }
}

#[test]
fn a_detached_parameter_is_detected() {
    use Mechanism::{Gd, Softmax};
    let config = full(GdConfig { candidates: 4, ..GdConfig::default() }, vec![Gd, Softmax, Gd]);
    for name in [
        "model.layers.0.self_attn.gd.beta",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.self_attn.beacon.prior.weight",
        "lm_head.weight",
    ] {
        let (_, faults) = Probe::new(&config, 0.0, Some(name)).faults();
        assert_eq!(faults, [format!("{name}: absent")]);
    }
}

#[test]
fn a_gradient_that_is_not_the_derivative_is_detected() {
    let config = full(GdConfig { candidates: 4, ..GdConfig::default() }, vec![Mechanism::Gd]);
    // With a hard selection, the loss is constant in the scores, but the estimated gradient is not zero.
    let (_, faults) = Probe::new(&config, 1.0, None).faults();
    let last = "model.layers.2.self_attn.";
    for name in ["q_proj.weight", "k_proj.weight", "gd.beta", "beacon.prior.weight"] {
        assert!(faults.iter().any(|f| f.starts_with(&format!("{last}{name}: "))), "{name}: {faults:#?}");
    }
    // After the last selection, every gradient is exact.
    for name in ["self_attn.v_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight"] {
        assert!(!faults.iter().any(|f| f.starts_with(&format!("model.layers.2.{name}"))), "{faults:#?}");
    }
}
