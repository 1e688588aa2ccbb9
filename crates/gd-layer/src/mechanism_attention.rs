//! A layer with one of the attention mechanisms, with the projections, Beacon and cache of `GdAttention`.

use std::sync::Arc;

use candle_core::{Device, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use gd_kernels::Mask;

use crate::attention::{Attention, Pass};
use crate::cache::{LayerCache, fit_state};
use crate::config::AttentionConfig;
use crate::heads::{Heads, Projected};
use crate::linear::Linear;
use crate::mechanisms::{AttentionMechanism, Info, Inputs, Outputs, Reads, Sizes, State, Weight};
use crate::query_blocks::{self, Visible};
use crate::rope::Rotary;
use crate::stats::SelectionStats;

/// Causal self-attention with a mechanism of [`crate::mechanisms`] between projections and output. Projections and
/// weight names are those of a Llama attention; the learned parameters of the mechanism are under `mechanism`.
///
/// A mechanism whose queries are independent is computed in blocks of 64 queries, and again in the backward pass, so that no
/// N × M matrix is stored; a pass with statistics computes all queries at once.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_layer::mechanisms::{AttentionMechanism, TopK};
/// use gd_layer::{AttentionConfig, MechanismAttention, RopeScaling, Rotary};
///
/// let (device, weights) = (Device::Cpu, VarMap::new());
/// let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
/// let rotary = Arc::new(Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &device)?);
/// let mechanism = AttentionMechanism::TopK(TopK { k: 4 });
/// let attention = MechanismAttention::new(&AttentionConfig::new(32, 4, 8), &mechanism, 0, rotary, vb)?;
///
/// let y = attention.forward(&Tensor::randn(0f32, 1.0, (2, 16, 32), &device)?)?;
/// assert_eq!(y.dims(), [2, 16, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MechanismAttention {
    heads: Heads,
    mechanism: AttentionMechanism,
    /// The learned parameters of the mechanism.
    learned: Inputs,
}

impl MechanismAttention {
    /// Reads or creates the weights under `vb`. `layer` is the number of the layer, from 0.
    ///
    /// # Errors
    /// As [`MechanismAttention::validate`], or weights that are missing or of another shape.
    pub fn new(
        cfg: &AttentionConfig,
        mechanism: &AttentionMechanism,
        layer: usize,
        rotary: Arc<Rotary>,
        vb: VarBuilder,
    ) -> Result<Self> {
        Self::validate(cfg, mechanism)?;
        let mut learned = Inputs::new();
        for Weight { name, shape, mean, standard_deviation } in mechanism.weights(&sizes(cfg)) {
            let init = match standard_deviation {
                0.0 => Init::Const(mean),
                stdev => Init::Randn { mean, stdev },
            };
            learned.insert(name, vb.pp("mechanism").get_with_hints(shape, name, init)?);
        }
        Ok(Self { heads: Heads::new(cfg, rotary, vb)?, mechanism: mechanism.in_layer(layer), learned })
    }

    /// Checks a configuration with this mechanism.
    ///
    /// # Errors
    /// A configuration that contradicts itself, a mechanism that cannot be in a layer, a window with a mechanism that reads all
    /// keys, or a Beacon with a key prior, which mechanisms do not read.
    pub fn validate(cfg: &AttentionConfig, mechanism: &AttentionMechanism) -> Result<()> {
        cfg.validate()?;
        mechanism.validate_in_layer(&sizes(cfg))?;
        if let Some(n) = cfg.selecting_heads {
            let name = mechanism.name();
            candle_core::bail!("selecting_heads {n} is read by softmax and gd layers only, not by {name}");
        }
        if cfg.beacon.as_ref().is_some_and(|beacon| beacon.prior) {
            let name = mechanism.name();
            bail!("beacon.prior is read by softmax and gd layers only: set it to false for {name}");
        }
        if let Some(window) = cfg.window.filter(|_| mechanism.info().reads != Reads::Interval) {
            bail!("{} reads all earlier keys: it cannot have a window of {window}", mechanism.name());
        }
        Ok(())
    }

    /// The inputs of the mechanism, without the mask.
    fn inputs(&self, x: &Tensor, projected: &Projected, cache: Option<&LayerCache>) -> Result<Inputs> {
        let Projected { q, mask, .. } = projected;
        let [k, v] = projected.widened()?;
        let ((b, _, n, _), m) = (q.dims4()?, k.dim(2)?);
        let info = self.mechanism.info();
        let mut inputs = self.learned.clone();
        inputs.insert("q", q.clone());
        inputs.insert("v", merge_values(&v, info.maps)?);
        inputs.insert("k", k);
        if info.inputs.iter().any(|(name, _)| *name == "x") {
            inputs.insert("x", x.clone());
        }
        let (query, key) = positions(mask, [b, n, m], q.device())?;
        inputs.insert("query_positions", query);
        inputs.insert("key_positions", key);
        let state = cache.map_or(&[][..], |cache| &cache.state);
        for (name, t) in state_inputs(&info).iter().zip(state) {
            let per_position = matches!(info.state, State::PerPosition { .. });
            inputs.insert(name, if per_position { fit_state(t, m)? } else { t.clone() });
        }
        Ok(inputs)
    }

    /// All outputs of the mechanism for all queries at once.
    fn outputs(&self, inputs: Inputs, visible: &Visible, pass: &Pass) -> Result<Outputs> {
        let has_mask = self.mechanism.info().constants.iter().any(|(name, _)| *name == "mask");
        let inputs = match has_mask {
            true => inputs.clone().with("mask", &visible.all(inputs.get("q")?.device())?),
            false => inputs,
        };
        let outputs = self.mechanism.attend(&inputs)?;
        // Linear and block-sparse mechanisms have no weights over all keys.
        if let (Some(stats), Some(weights)) = (pass.stats, outputs.tensors.get("weights")) {
            stats.borrow_mut().push(SelectionStats::of_weights(weights)?);
        }
        Ok(outputs)
    }
}

/// The inputs that a cache holds.
fn state_inputs(info: &Info) -> Vec<&'static str> {
    match info.state {
        State::None => Vec::new(),
        State::PerPosition { input, .. } => vec![input],
        State::Constant(names) => names.to_vec(),
    }
}

/// The outputs that a cache holds for the next pass.
fn state_outputs(info: &Info, outputs: &Outputs) -> Result<Vec<Tensor>> {
    let names = match info.state {
        State::None => Vec::new(),
        State::PerPosition { output, .. } => vec![output],
        State::Constant(names) => names.to_vec(),
    };
    names.into_iter().map(|name| Ok(outputs.get(name)?.detach())).collect()
}

/// Checks that the mechanism can read the keys that a mask leaves visible.
fn check_mask(name: &str, reads: Reads, mask: &Mask) -> Result<()> {
    let whole = mask.is_causal() && mask.window_len().is_none() && mask.lengths().is_none();
    match reads {
        Reads::Interval => Ok(()),
        Reads::Sequence | Reads::Row if !whole => {
            bail!("{name} reads all earlier keys: a causal mask without a window expected")
        }
        Reads::Row if mask.boundaries().is_some() => {
            bail!(
                "{name} divides a row into blocks from its start: rows with several sequences cannot be used"
            )
        }
        Reads::Sequence | Reads::Row => Ok(()),
    }
}

/// The sizes of the layer of a configuration.
fn sizes(cfg: &AttentionConfig) -> Sizes {
    Sizes {
        hidden_size: cfg.hidden_size,
        heads: cfg.num_attention_heads,
        key_value_heads: cfg.num_key_value_heads,
        head_dim: cfg.head_dim,
    }
}

/// The values `[B, Hk, M, D]` of `maps` heads beside each other: `[B, Hk / maps, M, maps * D]`.
fn merge_values(v: &Tensor, maps: usize) -> Result<Tensor> {
    let (b, hk, m, d) = v.dims4()?;
    if maps == 1 {
        return Ok(v.clone());
    }
    v.reshape((b, hk / maps, maps, m, d))?.transpose(2, 3)?.reshape((b, hk / maps, m, maps * d))
}

/// The reverse of [`merge_values`] for an output.
fn split_output(y: &Tensor, maps: usize) -> Result<Tensor> {
    let (b, h, n, d) = y.dims4()?;
    if maps == 1 {
        return Ok(y.clone());
    }
    y.reshape((b, h, n, maps, d / maps))?.transpose(2, 3)?.reshape((b, h * maps, n, d / maps))
}

/// The positions of queries `[B, N]` and keys `[B, M]` in their packed sequence, i64.
fn positions(mask: &Mask, [b, n, m]: [usize; 3], device: &Device) -> Result<(Tensor, Tensor)> {
    let start = |b: usize, at: i64| match mask.boundaries() {
        None => 0,
        Some(all) => {
            let boundaries = &all[if all.len() == 1 { 0 } else { b }];
            let next = boundaries.partition_point(|&boundary| boundary as i64 <= at);
            boundaries[next.max(1) - 1] as i64
        }
    };
    let of = |first: &dyn Fn(usize) -> i64, length: usize| {
        let position = |row: usize| {
            let at = first(row / length) + (row % length) as i64;
            at - start(row / length, at)
        };
        Tensor::from_vec((0..b * length).map(position).collect::<Vec<i64>>(), (b, length), device)
    };
    Ok((of(&|b| mask.offset(b), n)?, of(&|_| 0, m)?))
}

impl Attention for MechanismAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, mut cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let (name, info) = (self.mechanism.name(), self.mechanism.info());
        let mut projected = match info.state {
            State::Constant(_) => self.heads.project_without_keys(x, pass, cache.as_deref_mut())?,
            _ => self.heads.project(x, pass, cache.as_deref_mut())?,
        };
        if let Some(window) = self.mechanism.window() {
            projected.mask = projected.mask.windowed(window);
        }
        check_mask(name, info.reads, &projected.mask)?;
        let inputs = self.inputs(x, &projected, cache.as_deref())?;
        let (b, _, n, _) = projected.q.dims4()?;
        let visible = Visible::new(&projected.mask, [b, n, projected.k.dim(2)?])?;
        let y = if info.independent_queries && pass.stats.is_none() {
            query_blocks::attend(&self.mechanism, &inputs, visible)?
        } else {
            let outputs = self.outputs(inputs, &visible, pass)?;
            if let Some(cache) = cache {
                cache.state = state_outputs(&info, &outputs)?;
            }
            outputs.get("out")?.clone()
        };
        self.heads.output(split_output(&y, info.maps)?, projected)
    }

    fn projections_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        self.heads.projections_mut()
    }
}

impl Module for MechanismAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}
