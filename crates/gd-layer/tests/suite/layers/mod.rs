//! Layers with random weights, and finite differences over every one of them.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::{Barrier, CandidateGradient, Estimator, Gate, Mask};
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, GdAttention, GdConfig, LayerCache, Pass, RopeScaling, Rotary,
    SoftmaxAttention,
};

/// A small generator of numbers in (-1, 1).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    pub(crate) fn tensor(&mut self, shape: &[usize], scale: f64, dtype: DType) -> Result<Tensor> {
        let n = shape.iter().product();
        let values: Vec<f64> = (0..n).map(|_| scale * self.next()).collect();
        Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
    }
}

/// A layer and its parameters by name, every one of them random.
pub(crate) struct Fixture {
    pub(crate) layer: Box<dyn Attention>,
    pub(crate) vars: Vec<(String, Var)>,
}

pub(crate) fn fixture(cfg: &AttentionConfig, selects: bool, dtype: DType, seed: u64) -> Result<Fixture> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, dtype, &Device::Cpu);
    let rotary = Arc::new(Rotary::new(cfg.head_dim, 256, 10_000.0, RopeScaling::None, dtype, &Device::Cpu)?);
    let layer: Box<dyn Attention> = match selects {
        true => Box::new(GdAttention::new(cfg, rotary, vb)?),
        false => Box::new(SoftmaxAttention::new(cfg, rotary, vb)?),
    };
    let mut vars: Vec<_> =
        map.data().lock().expect("one thread").iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    let mut numbers = Numbers(seed);
    for (name, var) in &vars {
        // Around the initial values where those matter: log beta, thresholds, norm weights.
        let (base, scale) = match name.as_str() {
            "gd.beta" | "gd.threshold" | "gd.alpha" => (Some(var.as_tensor().clone()), 0.3),
            "q_norm.weight" | "k_norm.weight" => (Some(var.as_tensor().clone()), 0.3),
            _ => (None, 0.5),
        };
        let noise = numbers.tensor(var.dims(), scale, dtype)?;
        var.set(&match base {
            Some(base) => (base + noise)?,
            None => noise,
        })?;
    }
    Ok(Fixture { layer, vars })
}

/// The greatest absolute difference of two tensors.
pub(crate) fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?.abs()?.max_all()?.to_scalar()
}

/// The outputs of a layer for the first positions of x, in parts that each continue the cache.
pub(crate) fn attend_in_parts(
    layer: &dyn Attention,
    x: &Tensor,
    parts: &[usize],
    cache: &mut LayerCache,
) -> Result<Tensor> {
    let mut out = Vec::new();
    for &rows in parts {
        let at = cache.len();
        let mask = Mask::causal(at as i64);
        out.push(layer.attend(&x.narrow(1, at, rows)?, &Pass::new(&mask), Some(&mut *cache))?);
        assert_eq!(cache.lengths(), vec![at + rows; x.dim(0)?]);
    }
    Tensor::cat(&out, 1)
}

/// Grouped-query attention, odd sizes, every part that has parameters.
pub(crate) fn config(gd: GdConfig, beacon: Option<BeaconConfig>) -> AttentionConfig {
    AttentionConfig {
        hidden_size: 12,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        attention_bias: true,
        output_bias: true,
        qk_norm: true,
        rms_norm_eps: 1e-5,
        output_gate: true,
        window: None,
        selecting_heads: None,
        induction_heads: 0,
        beacon,
        gd,
    }
}

/// Selecting configurations, with a name each; those marked exact have a forward pass whose own
/// derivative the backward pass returns.
pub(crate) fn selecting() -> Vec<(&'static str, bool, AttentionConfig)> {
    let barrier = Barrier { floor: 0.2, margin: 2.0, strength: 1.5, entropy_trigger: 0.5, slack: 0.5 };
    let beacon = |protected, barrier| Some(BeaconConfig { protected, barrier, ..BeaconConfig::default() });
    let gd = |estimator, gate, threshold, rounds| GdConfig {
        estimator,
        gate,
        threshold,
        rounds,
        ..GdConfig::default()
    };
    let gate = Gate::Energy { temperature: 0.7 };
    let some = Some(1.2);
    // The coherence gate depends on distances only: with the gradient of the winner a prior would have none.
    let unranked = Some(BeaconConfig { prior: false, ..BeaconConfig::default() });
    let windowed = AttentionConfig {
        window: Some(3),
        ..config(GdConfig { norm_prior: true, ..gd(Estimator::Blend, Gate::None, some, 1) }, beacon(0, None))
    };
    let gradient = CandidateGradient { temperature_spread: 0.3, gate_floor: 0.2, null: false };
    let soft = GdConfig { exclude_below: 0.0, gradient, ..gd(Estimator::Candidates, gate, some, 1) };
    let some_excluded = GdConfig { exclude_below: 0.3, ..soft.clone() };
    let induction = AttentionConfig { induction_heads: 2, ..config(soft.clone(), beacon(1, None)) };
    let two_heads = AttentionConfig { selecting_heads: Some(2), ..config(soft.clone(), beacon(0, None)) };
    let by_length = |gd: GdConfig| GdConfig { threshold_by_length: true, ..gd };
    let windowed_soft =
        AttentionConfig { window: Some(5), ..config(by_length(soft.clone()), beacon(1, None)) };
    let gated_winner = by_length(gd(Estimator::Winner, gate, some, 1));
    let (by_margin, some_margin) = (Gate::Margin { temperature: 0.7 }, Some(-0.05));
    let margin_picks =
        GdConfig { gate: by_margin, threshold: some_margin, picks: 2, ..some_excluded.clone() };
    let several = GdConfig { picks: 3, ..by_length(some_excluded.clone()) };
    vec![
        ("threshold by length, soft gate, window", false, windowed_soft),
        ("threshold by length, three picks", false, config(several, beacon(0, None))),
        (
            "threshold by length, no gate",
            false,
            config(by_length(gd(Estimator::Candidates, Gate::None, some, 1)), None),
        ),
        ("threshold by length, winner, energy gate", true, config(gated_winner, beacon(2, None))),
        (
            "threshold by length, blend",
            true,
            config(by_length(gd(Estimator::Blend, Gate::None, some, 1)), beacon(0, None)),
        ),
        (
            "margin gate, winner",
            true,
            config(gd(Estimator::Winner, by_margin, some_margin, 1), beacon(2, None)),
        ),
        ("margin gate with exclusion, two picks", false, config(margin_picks, beacon(1, None))),
        ("soft gate", false, config(soft, beacon(1, None))),
        ("soft gate with exclusion", false, config(some_excluded, None)),
        ("two heads of four select", false, two_heads),
        ("two induction heads", false, induction),
        ("blend, prior of the norms, window", true, windowed),
        ("blend", true, config(gd(Estimator::Blend, Gate::None, some, 1), beacon(0, None))),
        ("blend, barrier", true, config(gd(Estimator::Blend, Gate::None, some, 1), beacon(2, Some(barrier)))),
        ("winner, energy gate", true, config(gd(Estimator::Winner, gate, some, 2), beacon(2, None))),
        ("winner, coherence gate", true, config(gd(Estimator::Winner, Gate::Coherence, None, 2), unranked)),
        ("candidates", false, config(gd(Estimator::Candidates, Gate::None, some, 1), beacon(0, None))),
        (
            "candidates, barrier",
            false,
            config(gd(Estimator::Candidates, gate, some, 2), beacon(2, Some(barrier))),
        ),
        ("dense", false, config(gd(Estimator::Dense, Gate::None, some, 1), None)),
        ("reinmax", false, config(gd(Estimator::Reinmax, Gate::None, some, 1), beacon(1, None))),
        ("bare", false, config(gd(Estimator::Candidates, Gate::None, None, 1), None)),
    ]
}
