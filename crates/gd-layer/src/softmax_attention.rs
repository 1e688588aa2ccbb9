//! Softmax attention with the projections, Beacon and cache of `GdAttention`.

use std::sync::Arc;

use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{Mask, softmax_attention};

use crate::attention::{Attention, Pass};
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::heads::{Heads, Projected, visible_keys};
use crate::linear::Linear;
use crate::probe::{GreatestWeights, Probe};
use crate::rope::Rotary;
use crate::stats::{SelectionStats, softmax_weights};
use crate::threshold::{Threshold, by_query};

/// Softmax attention, `softmax(q k^T / sqrt(D) + prior) v` (Vaswani et al., arXiv 1706.03762), with the learned prior
/// of a Beacon if there is one. Differentiable in all inputs. The output of a query that sees no key is 0. On the CPU
/// neither the forward nor the backward pass stores the weights.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_layer::{AttentionConfig, RopeScaling, Rotary, SoftmaxAttention};
///
/// let (device, weights) = (Device::Cpu, VarMap::new());
/// let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
/// let rotary = Arc::new(Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &device)?);
/// // Four query heads share two key-value heads.
/// let config = AttentionConfig::new(32, 4, 8).with_key_value_heads(2);
/// let attention = SoftmaxAttention::new(&config, rotary, vb)?;
///
/// let y = attention.forward(&Tensor::randn(0f32, 1.0, (2, 16, 32), &device)?)?;
/// assert_eq!(y.dims(), [2, 16, 32]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SoftmaxAttention {
    heads: Heads,
    null: Option<NullSlot>,
}

/// The parameters of softmax over selection energies with a null slot.
#[derive(Debug, Clone)]
struct NullSlot {
    /// `ln beta` `[Hq]`.
    log_beta: Tensor,
    /// The energy of the null slot.
    threshold: Threshold,
}

/// The initial energy of the null slot where the configuration has no threshold, in units of `2 beta D`: that of a key
/// whose inner product with the query is 0.
const NULL_ENERGY: f64 = 0.5;

impl SoftmaxAttention {
    /// Reads or creates the weights under `vb`: `q_proj`, `k_proj`, `v_proj`, `o_proj` and those of the configured
    /// parts.
    ///
    /// # Errors
    /// A config that contradicts itself, or weights that are missing or of another shape.
    pub fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        Ok(Self { heads: Heads::new(cfg, rotary, vb)?, null: None })
    }

    /// Attention with the score of selection: `softmax(-energies) v` over the keys and a null slot with the value 0, with
    /// energies `beta |q - k|^2 - prior` and a learned energy of the null slot. It blends what
    /// [`GdAttention`](crate::GdAttention) selects from, and is its control.
    ///
    /// Reads or creates the same weights, and `gd.beta [Hq]` (its logarithm), `gd.threshold [Hq]` and, with
    /// `threshold_by_length`, `gd.threshold_slope [Hq]`.
    ///
    /// # Errors
    /// As [`SoftmaxAttention::new`].
    pub fn with_null(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(cfg, rotary, vb.clone())?;
        let (vb, hq, d) = (vb.pp("gd"), cfg.reading_heads(), cfg.head_dim as f64);
        if hq == 0 {
            return Ok(Self { heads, null: None });
        }
        // Scores 2 beta <q, k> are then those of softmax attention, <q, k> / sqrt(D).
        let beta = 0.5 / d.sqrt();
        let energy = cfg.gd.threshold.unwrap_or(NULL_ENERGY) * 2.0 * beta * d;
        let log_beta = vb.get_with_hints(hq, "beta", Init::Const(beta.ln()))?;
        let threshold = Threshold::new(&cfg.gd, hq, energy, &vb)?;
        Ok(Self { heads, null: Some(NullSlot { log_beta, threshold }) })
    }
}

impl SoftmaxAttention {
    /// The output of the layer with a null slot.
    fn blend_with_null(&self, null: &NullSlot, projected: Projected, pass: &Pass) -> Result<Tensor> {
        let Projected { prior, mask, .. } = &projected;
        let [keys, v] = projected.widened()?;
        let [q, k, sink] = null.operands(&projected, &keys)?;
        if pass.stats.is_some() || asked(pass).is_some() {
            let weights = null_weights([&q, &k, &sink], prior.as_ref(), mask)?;
            if let Some(stats) = pass.stats {
                stats.borrow_mut().push(SelectionStats::of_weights(&weights)?);
            }
            if let Some((probe, count)) = asked(pass) {
                let (b, hq, n, _) = q.dims4()?;
                let mut greatest = GreatestWeights::new(count, [b, hq, n]);
                greatest.add(0, &weights)?;
                greatest.report(probe, pass.layer)?;
            }
        }
        let y = softmax_attention(&q, &k, &v, prior.as_ref(), Some(&sink), mask, 1.0)?;
        self.heads.output(y, projected)
    }
}

impl NullSlot {
    /// Queries, keys and sinks whose softmax attention with scale 1 has the weights of q and k: the scores
    /// `2 beta <q, k> - beta |k|^2` and the sink `beta |q|^2 - threshold` are those of the energies and of the null slot,
    /// each with `beta |q|^2` added. k are the keys in the dtype of the queries.
    fn operands(&self, projected: &Projected, k: &Tensor) -> Result<[Tensor; 3]> {
        let Projected { q, mask, .. } = projected;
        let ((b, hq, n, _), dtype) = (q.dims4()?, q.dtype());
        let per_head = |t: &Tensor| t.to_dtype(dtype)?.reshape((1, hq, 1, 1));
        let beta = per_head(&self.log_beta.exp()?)?;
        let queries = q.broadcast_mul(&(&beta * 2.0)?)?;
        let queries = Tensor::cat(&[queries, beta.neg()?.broadcast_as((b, hq, n, 1))?], D::Minus1)?;
        let keys = Tensor::cat(&[k, &k.sqr()?.sum_keepdim(D::Minus1)?], D::Minus1)?;
        let norms = q.sqr()?.sum_keepdim(D::Minus1)?.broadcast_mul(&beta)?;
        let threshold = self.threshold.of_queries(None, mask, projected.sizes()?)?;
        let threshold = by_query(&threshold.to_dtype(dtype)?)?.unsqueeze(3)?;
        Ok([queries, keys, norms.broadcast_sub(&threshold)?.squeeze(D::Minus1)?])
    }
}

/// The weights `[B, Hq, N, M]` of the softmax attention of [`NullSlot::operands`], without that of the null slot.
fn null_weights([q, k, sink]: [&Tensor; 3], prior: Option<&Tensor>, mask: &Mask) -> Result<Tensor> {
    let ((b, hq, n, d), (hk, m), dtype) = (q.dims4()?, (k.dim(1)?, k.dim(2)?), q.dtype());
    // The heads of a group share keys: fold them into the rows of one product.
    let rows = q.contiguous()?.reshape((b, hk, hq / hk * n, d))?;
    let scores = rows.matmul(&k.contiguous()?.t()?)?;
    let scores = match prior {
        Some(prior) => scores.broadcast_add(&prior.to_dtype(dtype)?.unsqueeze(2)?)?,
        None => scores,
    };
    let scores = scores.reshape((b, hq, n, m))?;
    let visible = visible_keys(mask, [b, n, m], scores.device())?.broadcast_as(scores.shape())?;
    let none =
        Tensor::new(f32::NEG_INFINITY, scores.device())?.to_dtype(dtype)?.broadcast_as(scores.shape())?;
    let scores = visible.where_cond(&scores, &none)?;
    let all = Tensor::cat(&[&scores, &sink.unsqueeze(3)?], 3)?.to_dtype(wide(dtype))?;
    candle_nn::ops::softmax(&all, D::Minus1)?.narrow(3, 0, m)?.to_dtype(dtype)
}

/// The probe of a pass, if it asks for the greatest weights of this layer, and their number.
fn asked<'a>(pass: &Pass<'a>) -> Option<(&'a dyn Probe, usize)> {
    let probe = pass.probe?;
    Some((probe, probe.greatest_weights(pass.layer))).filter(|(_, count)| *count > 0)
}

/// The dtype in which a softmax is computed.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

impl Attention for SoftmaxAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        if self.heads.cfg.reading_heads() == 0 {
            return self.heads.without_reads(x, pass, cache);
        }
        let projected = self.heads.project(x, pass, cache)?;
        if let Some(null) = &self.null {
            return self.blend_with_null(null, projected, pass);
        }
        let Projected { q, k, v, prior, mask, .. } = &projected;
        let scale = (q.dim(3)? as f64).sqrt().recip();
        if let Some(stats) = pass.stats {
            stats.borrow_mut().push(SelectionStats::of_softmax(
                [q, &projected.widened()?[0]],
                prior.as_ref(),
                mask,
                scale,
            )?);
        }
        if let Some((probe, count)) = asked(pass) {
            let (b, hq, n, _) = q.dims4()?;
            let mut greatest = GreatestWeights::new(count, [b, hq, n]);
            let add = |first: usize, weights: &Tensor| greatest.add(first, weights);
            softmax_weights([q, &projected.widened()?[0]], prior.as_ref(), mask, scale, add)?;
            greatest.report(probe, pass.layer)?;
        }
        let y = softmax_attention(q, k, v, prior.as_ref(), None, mask, scale)?;
        self.heads.output(y, projected)
    }

    fn projections_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        self.heads.projections_mut()
    }
}

impl Module for SoftmaxAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}
