//! Softmax attention with the projections, Beacon and cache of `GdAttention`.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::{Mask, masked_softmax};

use crate::attention::{Attention, Pass};
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::heads::Heads;
use crate::rope::Rotary;
use crate::stats::SelectionStats;

/// Softmax attention, `softmax(q k^T / sqrt(D) + prior) v` (Vaswani et al., arXiv 1706.03762), with the learned prior
/// of a Beacon if there is one. Differentiable in all inputs. The output of a query that sees no key is 0.
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
        let (b, hq, n, d) = projected.q.dims4()?;
        let (hk, m) = (projected.k.dim(1)?, projected.k.dim(2)?);
        let group = hq / hk;
        // The heads of a group share keys: fold them into the rows of one product.
        let q = (projected.q.contiguous()? * (d as f64).sqrt().recip())?.reshape((b, hk, group * n, d))?;
        let scores = q.matmul(&batch_of_matrices(&projected.k)?.t()?)?.reshape((b, hq, n, m))?;
        let scores = match &projected.prior {
            Some(p) => {
                let p = p
                    .reshape((b, hk, 1, 1, m))?
                    .broadcast_as((b, hk, group, 1, m))?
                    .reshape((b, hq, 1, m))?;
                scores.broadcast_add(&p)?
            }
            None => scores,
        };
        let weights = masked_softmax(&scores, &projected.mask)?;
        if let Some(stats) = pass.stats {
            stats.borrow_mut().push(SelectionStats::of_weights(&weights)?);
        }
        let weights = weights.reshape((b, hk, group * n, m))?;
        let y = weights.matmul(&batch_of_matrices(&projected.v)?)?.reshape((b, hq, n, d))?;
        self.heads.output(y, projected)
    }
}

/// `t` in a layout that a batched product reads without a copy: itself where the matrices are contiguous and evenly
/// spaced, as in a cache with capacity for more positions, or else a contiguous copy.
fn batch_of_matrices(t: &Tensor) -> Result<Tensor> {
    let (dims, stride) = (t.dims(), t.stride());
    let even = dims.len() == 4 && stride[3] == 1 && (dims[0] == 1 || stride[0] == dims[1] * stride[1]);
    if even && stride[2] == dims[3] { Ok(t.clone()) } else { t.contiguous() }
}

impl Module for SoftmaxAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}
