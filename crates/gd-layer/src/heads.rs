//! The parts that softmax and selection attention share: projections, norms, rotation, Beacon, cache and output.
//!
//! Shapes: x `[B, N, C]`, q `[B, Hq, N, D]`, k and v `[B, Hk, M, D]` with M = cached + N, where Hq and Hk are the heads that
//! read; the running averages, the output gate and `o_proj` have all heads.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::Mask;

use crate::attention::Pass;
use crate::beacon::Beacon;
use crate::cache::LayerCache;
use crate::config::AttentionConfig;
use crate::linear::{Linear, linear};
use crate::norm::RmsNorm;
use crate::rope::Rotary;

/// Projections, norms, rotation, output gate and Beacon. Weight names are those of Llama and Qwen3, `q_proj`, `k_proj`,
/// `v_proj`, `o_proj`, `q_norm` and `k_norm`, and besides `g_proj` and `beacon.*`.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    pub(crate) cfg: AttentionConfig,
    /// Projections of queries and keys; none without heads that read.
    qk_proj: Option<(Linear, Linear)>,
    v_proj: Linear,
    o_proj: Linear,
    g_proj: Option<Linear>,
    norms: Option<(RmsNorm, RmsNorm)>,
    rotary: Arc<Rotary>,
    pub(crate) beacon: Option<Beacon>,
}

/// What a layer computes from x besides queries and keys.
struct Preserved {
    /// The input of the projections: x after the convolution.
    x: Tensor,
    /// Values of all heads `[B, Hk, N, D]`.
    v: Tensor,
    memory: Option<Tensor>,
    gate: Option<Tensor>,
}

/// The inputs of softmax or selection attention.
pub(crate) struct Projected {
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    /// Which keys each query sees: those of the pass, within the layer's window.
    pub(crate) mask: Mask,
    /// Key prior `[B, Hk, M]`.
    pub(crate) prior: Option<Tensor>,
    /// Output of the Beacon's running averages for all heads, which is added to that of the heads that read.
    pub(crate) memory: Option<Tensor>,
    /// The output gate of all heads `[B, N, H * D]`.
    pub(crate) gate: Option<Tensor>,
    /// Whether the output is computed without what the heads read.
    pub(crate) cut_reads: bool,
}

impl Heads {
    /// Reads or creates the weights under `vb`.
    pub(crate) fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        cfg.validate()?;
        let (c, d, bias) = (cfg.hidden_size, cfg.head_dim, cfg.attention_bias);
        let (q, kv) = (cfg.num_attention_heads * d, cfg.num_key_value_heads * d);
        let reads = cfg.reading_heads() > 0;
        let [read_q, read_k] = [cfg.reading_heads() * d, cfg.reading_key_value_heads() * d];
        let project = |width, name| linear(c, width, bias, false, vb.pp(name));
        let norm = |name| RmsNorm::new(d, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            qk_proj: if reads {
                Some((project(read_q, "q_proj")?, project(read_k, "k_proj")?))
            } else {
                None
            },
            v_proj: project(kv, "v_proj")?,
            o_proj: linear(q, c, cfg.output_bias, true, vb.pp("o_proj"))?,
            g_proj: if cfg.output_gate { Some(linear(c, q, false, false, vb.pp("g_proj"))?) } else { None },
            norms: if cfg.qk_norm && reads { Some((norm("q_norm")?, norm("k_norm")?)) } else { None },
            beacon: cfg.beacon.as_ref().map(|_| Beacon::new(cfg, vb.pp("beacon"))).transpose()?,
            cfg: cfg.clone(),
            rotary,
        })
    }

    /// Queries of x, and keys, values and priors of the cached positions followed by those of x. With a cache, the
    /// latter three carry no gradient.
    pub(crate) fn project(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Projected> {
        let projected = self.project_new(x, pass, cache.as_deref_mut())?;
        let Some(cache) = cache else { return Ok(projected) };
        let (k, v, prior) = cache.extend(&projected.k, &projected.v, projected.prior.as_ref())?;
        Ok(Projected { k, v, prior, ..projected })
    }

    /// As [`Heads::project`], but keys, values and priors of x carry gradients; those of the cached positions are
    /// constants.
    pub(crate) fn project_with_gradients(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: &mut LayerCache,
    ) -> Result<Projected> {
        let new = self.project_new(x, pass, Some(cache))?;
        let cached = cache.len();
        let (k, v, prior) = cache.extend(&new.k, &new.v, new.prior.as_ref())?;
        if ![&new.k, &new.v].into_iter().chain(&new.prior).any(Tensor::track_op) {
            return Ok(Projected { k, v, prior, ..new });
        }
        let with_cached = |all: &Tensor, new: &Tensor| match cached {
            0 => Ok(new.clone()),
            _ => Tensor::cat(&[&all.narrow(2, 0, cached)?, new], 2),
        };
        let prior = match (&prior, &new.prior) {
            (Some(all), Some(new)) => Some(with_cached(all, new)?),
            _ => None,
        };
        Ok(Projected { k: with_cached(&k, &new.k)?, v: with_cached(&v, &new.v)?, prior, ..new })
    }

    /// Queries, keys and values of x alone, `[B, H, N, D]`, at the positions that follow the cached ones.
    fn project_new(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Projected> {
        let (b, n, _) = x.dims3()?;
        let Some((q_proj, k_proj)) = &self.qk_proj else {
            candle_core::bail!("a layer without reading heads")
        };
        let offsets = offsets(cache.as_deref(), pass.mask, [b, n])?;
        let Preserved { x, v, memory, gate } = self.preserve(x, pass, cache)?;
        let split = |y: Tensor| y.reshape((b, n, (), self.cfg.head_dim));
        let (mut q, mut k) = (split(q_proj.forward(&x)?)?, split(k_proj.forward(&x)?)?);
        if let Some((q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let q = self.rotary.apply_each(&q.transpose(1, 2)?, &offsets)?;
        let k = self.rotary.apply_each(&k.transpose(1, 2)?, &offsets)?;
        let v = v.narrow(1, 0, self.cfg.reading_key_value_heads())?;
        let prior = match &self.beacon {
            Some(beacon) => beacon.prior(&x)?,
            None => None,
        };
        let mask = match self.cfg.window {
            Some(window) => pass.mask.clone().windowed(window),
            None => pass.mask.clone(),
        };
        Ok(Projected { q, k, v, mask, prior, memory, gate, cut_reads: pass.cut_reads })
    }

    /// Convolution, values, running averages and output gate of x `[B, N, C]`.
    fn preserve(&self, x: &Tensor, pass: &Pass, mut cache: Option<&mut LayerCache>) -> Result<Preserved> {
        let (b, n, c) = x.dims3()?;
        if c != self.cfg.hidden_size {
            candle_core::bail!("x {:?} does not have hidden_size {}", x.dims(), self.cfg.hidden_size);
        }
        let x = match &self.beacon {
            Some(beacon) => beacon.convolve(x, pass.mask, cache.as_deref_mut())?,
            None => x.clone(),
        };
        let v = self.v_proj.forward(&x)?.reshape((b, n, (), self.cfg.head_dim))?.transpose(1, 2)?;
        let memory = match &self.beacon {
            Some(beacon) => beacon.memory_output(&x, &v, pass.mask, cache)?,
            None => None,
        };
        let gate = self.g_proj.as_ref().map(|g| candle_nn::ops::sigmoid(&g.forward(&x)?)).transpose()?;
        Ok(Preserved { x, v, memory, gate })
    }

    /// The output `[B, N, C]` of a layer whose heads do not read, from the Beacon alone.
    pub(crate) fn without_reads(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let (b, n, _) = x.dims3()?;
        offsets(cache.as_deref(), pass.mask, [b, n])?;
        let Preserved { memory, gate, .. } = self.preserve(x, pass, cache.as_deref_mut())?;
        if let Some(cache) = cache {
            cache.advance(b, n);
        }
        let Some(memory) = memory else { candle_core::bail!("a layer without reading heads needs averages") };
        self.project_output(memory, gate)
    }

    /// The output of the layer `[B, N, C]` from that of the heads that read `[B, Hq, N, D]`: memory, output gate and
    /// `o_proj`.
    pub(crate) fn output(&self, y: Tensor, projected: Projected) -> Result<Tensor> {
        let heads = self.cfg.num_attention_heads;
        let y = match (projected.cut_reads, projected.memory) {
            (true, Some(memory)) => memory,
            (true, None) => y.zeros_like()?,
            (false, None) => y,
            (false, Some(memory)) if y.dim(1)? == heads => (y + memory)?,
            (false, Some(memory)) => {
                let reading = y.dim(1)?;
                let sum = (y + memory.narrow(1, 0, reading)?)?;
                Tensor::cat(&[&sum, &memory.narrow(1, reading, heads - reading)?], 1)?
            }
        };
        self.project_output(y, projected.gate)
    }

    /// The output gate and `o_proj` on the output of all heads `[B, H, N, D]`.
    fn project_output(&self, y: Tensor, gate: Option<Tensor>) -> Result<Tensor> {
        let (b, _, n, _) = y.dims4()?;
        let y = y.transpose(1, 2)?.reshape((b, n, ()))?;
        let y = match gate {
            Some(gate) => (y * gate)?,
            None => y,
        };
        self.o_proj.forward(&y)
    }
}

/// The mask as a tensor, u8 `[B|1, 1, N, M]`, 1 where a key is visible. Only the first and the last visible key of each
/// query are copied to the device.
pub(crate) fn visible_keys(mask: &Mask, [b, n, m]: [usize; 3], device: &Device) -> Result<Tensor> {
    mask.validate(b, m)?;
    let b = if mask.differs() { b } else { 1 };
    let ranges: Vec<Range<usize>> = (0..b * n).map(|row| mask.visible(row / n, row % n, m)).collect();
    let column = |f: fn(&Range<usize>) -> u32| {
        Tensor::from_vec(ranges.iter().map(f).collect::<Vec<_>>(), (b, 1, n, 1), device)
    };
    let keys = Tensor::arange(0u32, m as u32, device)?.reshape((1, 1, 1, m))?;
    keys.broadcast_ge(&column(|range| range.start as u32)?)?
        * keys.broadcast_lt(&column(|range| range.end as u32)?)?
}

/// The position of the first new token, for every sequence or one for all: the number of cached positions. Checks the
/// mask against it.
fn offsets(cache: Option<&LayerCache>, mask: &Mask, [b, n]: [usize; 2]) -> Result<Vec<usize>> {
    let offsets = match cache {
        Some(cache) if !cache.is_empty() => cache.lengths().to_vec(),
        Some(_) => vec![0; b],
        None => vec![0],
    };
    if offsets.len() != 1 && offsets.len() != b {
        candle_core::bail!("a cache of {} sequences for a batch of {b}", offsets.len());
    }
    let cached = offsets.iter().copied().max().unwrap_or(0);
    mask.validate(b, cached + n)?;
    if offsets.iter().any(|offset| *offset != cached) && !mask.is_causal() {
        candle_core::bail!("cached sequences of different lengths need a causal mask");
    }
    if cache.is_some() && mask.is_causal() {
        for (b, offset) in offsets.iter().enumerate() {
            let mask_offset = mask.offset(b);
            if mask_offset != *offset as i64 {
                candle_core::bail!("mask offset {mask_offset} does not follow {offset} cached positions");
            }
        }
    }
    if cache.is_some() && mask.boundaries().is_some() {
        candle_core::bail!("a cache continues one sequence, the mask packs several");
    }
    Ok(offsets)
}
