//! Softmax attention in the same frame: the swap partner of `GdAttention`.

use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::Mask;

use crate::attention::{Attention, Pass, Record, distinct};
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::heads::Heads;
use crate::rope::Rotary;
use crate::softmax::masked_softmax;

/// `softmax(q k^T / sqrt(D) + prior) v`, from candle's differentiable primitives. A query that sees
/// no key reads nothing (0).
///
/// ```
/// use std::sync::Arc;
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
    /// Reads or creates the weights under `vb`.
    ///
    /// # Errors
    /// A config that contradicts itself, or weights that are missing or of another shape.
    pub fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        Ok(Self { heads: Heads::new(cfg, rotary, vb)? })
    }
}

impl Attention for SoftmaxAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let ready = self.heads.prepare(x, pass, cache)?;
        let (b, hq, n, d) = ready.q.dims4()?;
        let (hk, m) = (ready.k.dim(1)?, ready.k.dim(2)?);
        let group = hq / hk;
        // The heads of a group share keys: fold them into the rows of one product.
        let q = (ready.q.contiguous()? * (d as f64).sqrt().recip())?.reshape((b, hk, group * n, d))?;
        let scores = q.matmul(&in_place(&ready.k)?.t()?)?.reshape((b, hq, n, m))?;
        let scores = match &ready.prior {
            Some(p) => {
                let p = p
                    .reshape((b, hk, 1, 1, m))?
                    .broadcast_as((b, hk, group, 1, m))?
                    .reshape((b, hq, 1, m))?;
                scores.broadcast_add(&p)?
            }
            None => scores,
        };
        let weights = masked_softmax(&scores, &ready.mask)?;
        if let Some(record) = pass.record {
            record.borrow_mut().push(summary(&weights)?);
        }
        let y =
            weights.reshape((b, hk, group * n, m))?.matmul(&in_place(&ready.v)?)?.reshape((b, hq, n, d))?;
        self.heads.finish(y, ready)
    }
}

/// What a batched product can read without a copy: a cache with room behind the positions it holds can.
fn in_place(t: &Tensor) -> Result<Tensor> {
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

/// Weights `[B, Hq, N, M]` in numbers; the margin is that of the scores, the log of the ratio of
/// the two greatest weights.
fn summary(weights: &Tensor) -> Result<Record> {
    let (b, _, n, m) = weights.dims4()?;
    let w = weights.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let (mut first, mut empty, mut lead, mut count) = (0f64, 0usize, 0f64, 0usize);
    let (mut entropy, mut picks) = (0f64, Vec::with_capacity(w.len() / m));
    for row in w.chunks(m) {
        let (mut top, mut next, mut pick) = (0f32, 0f32, -1);
        for (j, &x) in row.iter().enumerate() {
            if x > 0.0 {
                entropy -= f64::from(x * x.ln());
            }
            if x > top {
                (next, top, pick) = (top, x, j as i32);
            } else if x > next {
                next = x;
            }
        }
        first += f64::from(row[0]);
        empty += usize::from(top == 0.0);
        picks.push(pick);
        if next > 0.0 {
            lead += f64::from(top / next).ln();
            count += 1;
        }
    }
    let rows = (w.len() / m) as f64;
    Ok(Record {
        abstained: empty as f64 / rows,
        first_token: first / rows,
        margin: lead / count.max(1) as f64,
        entropy: entropy / rows,
        distinct: distinct(&picks, b, n),
        picks,
        selected: None,
    })
}
