//! The frame of an attention layer: everything around the moment in which positions read each
//! other, and the same for every mechanism.
//!
//! Shapes: x `[B, N, C]`, q `[B, Hq, N, D]`, k and v `[B, Hk, M, D]` with M = cached + N.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::Mask;

use crate::attention::Pass;
use crate::beacon::Beacon;
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::linear::{Linear, linear};
use crate::norm::RmsNorm;
use crate::rope::Rotary;

/// Projections, norms, rotation, output gate and Beacon. Weight names as in Llama and Qwen3:
/// `q_proj`, `k_proj`, `v_proj`, `o_proj`, `q_norm`, `k_norm`; new are `g_proj` and `beacon.*`.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    pub(crate) cfg: AttentionConfig,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    g_proj: Option<Linear>,
    norms: Option<(RmsNorm, RmsNorm)>,
    rotary: Arc<Rotary>,
    pub(crate) beacon: Option<Beacon>,
}

/// What a mechanism reads.
pub(crate) struct Ready {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// Which keys each query sees: those of the pass, within the layer's window.
    pub(crate) mask: Mask,
    /// Key prior `[B, Hk, M]`.
    pub(crate) prior: Option<Tensor>,
    /// What the Beacon's running averages add to the heads `[B, Hq, N, D]`.
    pub(crate) memory: Option<Tensor>,
    /// The output gate `[B, N, Hq * D]`.
    pub(crate) gate: Option<Tensor>,
}

impl Heads {
    pub(crate) fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let (c, d, bias) = (cfg.hidden_size, cfg.head_dim, cfg.attention_bias);
        let (q, kv) = (cfg.num_attention_heads * d, cfg.num_key_value_heads * d);
        let norm = |name| RmsNorm::new(d, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            q_proj: linear(c, q, bias, false, vb.pp("q_proj"))?,
            k_proj: linear(c, kv, bias, false, vb.pp("k_proj"))?,
            v_proj: linear(c, kv, bias, false, vb.pp("v_proj"))?,
            o_proj: linear(q, c, cfg.output_bias, true, vb.pp("o_proj"))?,
            g_proj: if cfg.output_gate { Some(linear(c, q, false, false, vb.pp("g_proj"))?) } else { None },
            norms: if cfg.qk_norm { Some((norm("q_norm")?, norm("k_norm")?)) } else { None },
            beacon: cfg.beacon.as_ref().map(|_| Beacon::new(cfg, vb.pp("beacon"))).transpose()?,
            cfg: cfg.clone(),
            rotary,
        })
    }

    /// From x to queries, keys and values, with the cached ones before the new.
    pub(crate) fn prepare(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Ready> {
        let (b, n, c) = x.dims3()?;
        if c != self.cfg.hidden_size {
            candle_core::bail!("x {:?} does not have hidden_size {}", x.dims(), self.cfg.hidden_size);
        }
        // Each sequence goes on where its cache ends.
        let offsets = match cache.as_deref() {
            Some(cache) if !cache.is_empty() => cache.lengths().to_vec(),
            Some(_) => vec![0; b],
            None => vec![0],
        };
        if offsets.len() != 1 && offsets.len() != b {
            candle_core::bail!("a cache of {} sequences for a batch of {b}", offsets.len());
        }
        let cached = offsets.iter().copied().max().unwrap_or(0);
        pass.mask.validate(b, cached + n)?;
        if offsets.iter().any(|offset| *offset != cached) && !pass.mask.is_causal() {
            candle_core::bail!("cached sequences of different lengths need a causal mask");
        }
        if cache.is_some() && pass.mask.is_causal() {
            for (b, offset) in offsets.iter().enumerate() {
                if pass.mask.offset(b) != *offset as i64 {
                    let found = pass.mask.offset(b);
                    candle_core::bail!("mask offset {found} does not follow {offset} cached positions");
                }
            }
        }
        if cache.is_some() && pass.mask.boundaries().is_some() {
            candle_core::bail!("a cache continues one sequence, the mask packs several");
        }
        let x = match &self.beacon {
            Some(beacon) => beacon.mix(x, pass.mask, cache.as_deref_mut())?,
            None => x.clone(),
        };
        let d = self.cfg.head_dim;
        let split = |y: Tensor| y.reshape((b, n, (), d));
        let (mut q, mut k) = (split(self.q_proj.forward(&x)?)?, split(self.k_proj.forward(&x)?)?);
        let v = split(self.v_proj.forward(&x)?)?.transpose(1, 2)?;
        if let Some((q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let q = self.rotary.apply_each(&q.transpose(1, 2)?, &offsets)?;
        let k = self.rotary.apply_each(&k.transpose(1, 2)?, &offsets)?;
        let (mut memory, mut prior) = (None, None);
        if let Some(beacon) = &self.beacon {
            memory = beacon.remember(&x, &v, pass.mask, cache.as_deref_mut())?;
            prior = beacon.prior(&x)?;
        }
        let gate = self.g_proj.as_ref().map(|g| candle_nn::ops::sigmoid(&g.forward(&x)?)).transpose()?;
        let (k, v, prior) = match cache {
            Some(cache) => cache.extend(&k, &v, prior.as_ref())?,
            None => (k, v, prior),
        };
        let mask = match self.cfg.window {
            Some(window) => pass.mask.clone().windowed(window),
            None => pass.mask.clone(),
        };
        Ok(Ready { q, k, v, mask, prior, memory, gate })
    }

    /// From the heads' reading y `[B, Hq, N, D]` to the layer's output.
    pub(crate) fn finish(&self, y: Tensor, ready: Ready) -> Result<Tensor> {
        let y = match ready.memory {
            Some(memory) => (y + memory)?,
            None => y,
        };
        let (b, _, n, _) = y.dims4()?;
        let y = y.transpose(1, 2)?.reshape((b, n, ()))?;
        let y = match ready.gate {
            Some(gate) => (y * gate)?,
            None => y,
        };
        self.o_proj.forward(&y)
    }
}
