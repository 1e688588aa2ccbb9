//! Softmax attention with the projections, Beacon and cache of `GdAttention`.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::{Mask, softmax_attention};

use crate::attention::{Attention, Pass};
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::heads::{Heads, Projected};
use crate::rope::Rotary;
use crate::stats::SelectionStats;

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
}

impl SoftmaxAttention {
    /// Reads or creates the weights under `vb`: `q_proj`, `k_proj`, `v_proj`, `o_proj` and those of the configured
    /// parts.
    ///
    /// # Errors
    /// A config that contradicts itself, or weights that are missing or of another shape.
    pub fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        Ok(Self { heads: Heads::new(cfg, rotary, vb)? })
    }
}

impl Attention for SoftmaxAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let projected = self.heads.project(x, pass, cache)?;
        let Projected { q, k, v, prior, mask, .. } = &projected;
        let scale = (q.dim(3)? as f64).sqrt().recip();
        if let Some(stats) = pass.stats {
            stats.borrow_mut().push(SelectionStats::of_softmax([q, k], prior.as_ref(), mask, scale)?);
        }
        let y = softmax_attention(q, k, v, prior.as_ref(), None, mask, scale)?;
        self.heads.output(y, projected)
    }
}

impl Module for SoftmaxAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}
