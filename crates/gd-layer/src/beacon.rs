//! The Beacon: the parts of a layer that keep information about keys which the selection would not read.
//!
//! Shapes: x `[B, N, C]`, v `[B, Hk, N, D]`; R running averages for each of the Hq heads.

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{Mask, Scan, Score, causal_conv, gated_sum, packed_causal_conv, running_average, scan};

use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::linear::Linear;

/// The decay logits at bias 0 of the first and the last head; those of the other heads are evenly spaced between. The
/// half-lives are then from about half a position to about 23 positions.
const DECAY_LOGITS: (f64, f64) = (-1.0, 3.5);

/// The smallest head dimension for which every device has kernels.
const MIN_HEAD_DIM: usize = 8;

/// A causal convolution before the projections, a memory of running averages that is added to the output of the heads,
/// and a learned prior that ranks and protects keys. The config enables each of them.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_layer::{AttentionConfig, Beacon, BeaconConfig};
///
/// let weights = VarMap::new();
/// let vb = VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
/// let beacon = BeaconConfig { conv_width: 4, averages: 2, prior: true, ..BeaconConfig::default() };
/// Beacon::new(&AttentionConfig::new(32, 4, 8).with_beacon(beacon), vb.pp("beacon"))?;
///
/// let weights = weights.data().lock().unwrap();
/// assert_eq!(weights["beacon.conv.weight"].dims(), [32, 4]);
/// assert_eq!(weights["beacon.memory.weight"].dims(), [3 * 2 * 4, 32]);
/// assert_eq!(weights["beacon.prior.weight"].dims(), [4, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Beacon {
    conv: Option<Tensor>,
    memory: Option<Memory>,
    prior: Option<Linear>,
    protected: usize,
}

/// Gated running averages: decay `sigmoid(w_a x + b)`, write weight `e^(w_i x)`, output `sigmoid(w_g x) * mean`. The
/// three projections are one matrix.
#[derive(Debug, Clone)]
struct Memory {
    proj: Linear,
    /// The decay logits at bias 0, and 0 for the other rows, `[3 R Hq]`.
    offset: Tensor,
    heads: usize,
    averages: usize,
}

impl Memory {
    fn new(channels: usize, heads: usize, averages: usize, vb: VarBuilder) -> Result<Self> {
        let rows = heads * averages;
        let weight =
            vb.get_with_hints((3 * rows, channels), "weight", Init::Randn { mean: 0.0, stdev: 0.02 })?;
        let bias = vb.get_with_hints(3 * rows, "bias", Init::Const(0.0))?;
        // From heads of fast decay to heads of slow decay; every second average in the opposite order.
        let mut offset = vec![0f32; 3 * rows];
        for (at, logit) in offset[..rows].iter_mut().enumerate() {
            let (h, r) = (at / averages, at % averages);
            let rank = if r % 2 == 0 { h } else { heads - 1 - h };
            let share = rank as f64 / (heads.max(2) - 1) as f64;
            *logit = (DECAY_LOGITS.0 + share * (DECAY_LOGITS.1 - DECAY_LOGITS.0)) as f32;
        }
        let offset = Tensor::new(offset, weight.device())?.to_dtype(weight.dtype())?;
        Ok(Self { proj: Linear::new(weight, Some(bias)), offset, heads, averages })
    }
}

impl Beacon {
    /// Weights under `vb`: `conv.weight [C, W]`, `memory.weight [3 R Hq, C]`, `memory.bias`,
    /// `prior.weight [Hk, C]` (Hk that are read), each for a part that the config enables.
    ///
    /// # Errors
    /// Weights that are missing or of another shape.
    pub fn new(cfg: &AttentionConfig, vb: VarBuilder) -> Result<Self> {
        let Some(beacon) = &cfg.beacon else { candle_core::bail!("a Beacon needs its config") };
        let (c, heads, r) = (cfg.hidden_size, cfg.num_attention_heads, beacon.averages);
        let conv = match beacon.conv_width {
            1 => None,
            w => Some(vb.pp("conv").get_with_hints((c, w), "weight", Init::Const(0.0))?),
        };
        let memory = match r {
            0 => None,
            _ => Some(Memory::new(c, heads, r, vb.pp("memory"))?),
        };
        let prior = match beacon.prior && cfg.reading_heads() > 0 {
            true => {
                let weight = vb.pp("prior").get_with_hints(
                    (cfg.reading_key_value_heads(), c),
                    "weight",
                    Init::Const(0.0),
                )?;
                Some(Linear::new(weight, None))
            }
            false => None,
        };
        Ok(Self { conv, memory, prior, protected: beacon.protected })
    }

    /// The convolution with a residual connection, x + conv(x) `[B, N, C]`.
    pub(crate) fn convolve(&self, x: &Tensor, mask: &Mask, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let Some(weight) = &self.conv else { return Ok(x.clone()) };
        if let Some(boundaries) = mask.boundaries() {
            return x + packed_causal_conv(x, weight, boundaries)?;
        }
        let state = cache.as_ref().and_then(|c| c.conv.clone());
        let (y, state) = causal_conv(x, weight, state.as_ref())?;
        if let Some(cache) = cache {
            cache.conv = Some(state);
        }
        x + y
    }

    /// The running averages of the values; none if the Beacon has none.
    pub(crate) fn averages(
        &self,
        x: &Tensor,
        v: &Tensor,
        mask: &Mask,
        cache: Option<&mut LayerCache>,
    ) -> Result<Option<GatedAverages>> {
        let Some(memory) = &self.memory else { return Ok(None) };
        let (b, n, _) = x.dims3()?;
        let (h, r) = (memory.heads, memory.averages);
        // [B, N, 3 R H] -> [B, 3, H R, N]
        let logits = memory.proj.forward(x)?.broadcast_add(&memory.offset)?;
        let parts = logits.reshape((b, n, 3, h * r))?.permute((0, 2, 3, 1))?.contiguous()?;
        let part = |i: usize| parts.narrow(1, i, 1)?.squeeze(1);
        let decay = match mask.boundaries() {
            Some(boundaries) => part(0)?.broadcast_add(&resets(boundaries, n, &parts)?)?,
            None => part(0)?,
        };
        let state = cache.as_ref().and_then(|c| c.average.clone());
        let (mean, state) = running_average(&decay, &part(1)?, v, state.as_ref())?;
        if let Some(cache) = cache {
            cache.average = Some(state);
        }
        Ok(Some(GatedAverages { mean, gate: part(2)?, heads: h }))
    }

    /// The learned prior of the keys `[B, Hk, N]`; none without one.
    pub(crate) fn prior(&self, x: &Tensor) -> Result<Option<Tensor>> {
        self.prior.as_ref().map(|p| p.forward(x)?.transpose(1, 2)?.contiguous()).transpose()
    }

    /// For every query the P visible keys of greatest prior, i32 `[B, Hk, N, P]`; none if P is 0.
    pub(crate) fn protect(
        &self,
        prior: Option<&Tensor>,
        queries: usize,
        mask: &Mask,
    ) -> Result<Option<Tensor>> {
        let (Some(prior), 1..) = (prior, self.protected) else { return Ok(None) };
        // A scan with q = k = 0 scores keys by the prior alone: the top P under any mask.
        let (b, hk, m) = prior.dims3()?;
        let prior = prior.detach().to_dtype(DType::F32)?;
        let beta = Tensor::ones(hk, DType::F32, prior.device())?;
        let q = Tensor::zeros((b, hk, queries, MIN_HEAD_DIM), DType::F32, prior.device())?;
        let k = Tensor::zeros((b, hk, m, MIN_HEAD_DIM), DType::F32, prior.device())?;
        let top = Scan { prior: Some(&prior), score: Score::Dot, ..Scan::new(&beta, mask, self.protected) };
        Ok(Some(scan(&q, &k, &top)?.index))
    }
}

/// The running averages of a Beacon, which are gated and added to the output of the heads.
#[derive(Debug)]
pub(crate) struct GatedAverages {
    /// `[B, Hq R, N, D]`.
    mean: Tensor,
    /// The logits of the gates `[B, Hq R, N]`.
    gate: Tensor,
    /// Hq.
    heads: usize,
}

impl GatedAverages {
    /// The output of all heads `[B, Hq, N, D]` from that of the first ones.
    pub(crate) fn added_to(&self, y: &Tensor) -> Result<Tensor> {
        Ok(gated_sum(&self.mean, &self.gate, y, self.heads)?)
    }

    /// The contribution to the output of all heads `[B, Hq, N, D]`.
    pub(crate) fn output(&self) -> Result<Tensor> {
        let (b, _, n, d) = self.mean.dims4()?;
        self.added_to(&Tensor::zeros((b, self.heads, n, d), self.mean.dtype(), self.mean.device())?)
    }
}

/// A bias of the decay logits: -inf where a packed sequence starts, which discards the positions before it, and 0
/// elsewhere; `[B|1, 1, N]` in the dtype of `like`.
fn resets(boundaries: &[Vec<usize>], n: usize, like: &Tensor) -> Result<Tensor> {
    let mut bias = vec![0f32; boundaries.len() * n];
    for (row, starts) in bias.chunks_mut(n).zip(boundaries) {
        starts.iter().filter(|&&s| s < n).for_each(|&s| row[s] = f32::NEG_INFINITY);
    }
    Tensor::from_vec(bias, (boundaries.len(), 1, n), like.device())?.to_dtype(like.dtype())
}
