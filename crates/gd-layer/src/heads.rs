//! The parts that softmax and selection attention share: projections, norms, rotation, Beacon, cache and output.
//!
//! Shapes: x `[B, N, C]`, q `[B, Hq, N, D]`, k and v `[B, Hk, M, D]` with M = cached + N, where Hq and Hk are the heads that
//! read; the running averages, the output gate and `o_proj` have all heads.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::{
    HeadProjection, Mask, causal_conv, packed_causal_conv, project_from_heads, project_to_heads,
};

use crate::attention::Pass;
use crate::beacon::{Beacon, GatedAverages};
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
    averages: Option<GatedAverages>,
    gate: Option<Tensor>,
    /// The products of x with the projections of queries and keys, if they were computed together with the values.
    queries_keys: Option<[Tensor; 2]>,
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
    /// The Beacon's running averages, which are added to the output of the heads that read.
    pub(crate) averages: Option<GatedAverages>,
    /// The output gate of all heads `[B, N, H * D]`.
    pub(crate) gate: Option<Tensor>,
    /// Whether the output is computed without what the heads read.
    pub(crate) cut_reads: bool,
}

impl Projected {
    /// Keys and values in the dtype of the queries. A cache may hold them in another one.
    pub(crate) fn widened(&self) -> Result<[Tensor; 2]> {
        Ok([self.k.to_dtype(self.q.dtype())?, self.v.to_dtype(self.q.dtype())?])
    }

    /// The numbers of sequences, queries and keys `[B, N, M]`.
    pub(crate) fn sizes(&self) -> Result<[usize; 3]> {
        let (b, _, n, _) = self.q.dims4()?;
        Ok([b, n, self.k.dim(2)?])
    }
}

/// Where the positions of the rotary embedding are counted from, in rows that hold several sequences.
#[derive(Debug, Clone, Copy)]
enum Positions {
    /// From the start of the row. Scores depend on differences of positions alone.
    InRow,
    /// From the start of each sequence.
    InSequence,
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

    /// The projections by the names of their weights.
    pub(crate) fn projections_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        let mut all = vec![("v_proj", &mut self.v_proj), ("o_proj", &mut self.o_proj)];
        if let Some((q_proj, k_proj)) = &mut self.qk_proj {
            all.extend([("q_proj", q_proj), ("k_proj", k_proj)]);
        }
        all.extend(self.g_proj.as_mut().map(|g_proj| ("g_proj", g_proj)));
        all
    }

    /// Queries of x, and keys, values and priors of the cached positions followed by those of x. With a cache, the
    /// latter three carry no gradient.
    pub(crate) fn project(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Projected> {
        let projected = self.project_new(x, pass, cache.as_deref_mut(), Positions::InRow)?;
        let Some(cache) = cache else { return Ok(projected) };
        let (k, v, prior) = cache.extend(&projected.k, &projected.v, projected.prior.as_ref())?;
        Ok(Projected { k, v, prior, ..projected })
    }

    /// As [`Heads::project`], but with keys and values of x alone, which the cache does not hold: it counts the positions. They
    /// are rotated by the position in their own sequence, for mechanisms that depend on more than differences of positions.
    pub(crate) fn project_without_keys(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
    ) -> Result<Projected> {
        let projected = self.project_new(x, pass, cache.as_deref_mut(), Positions::InSequence)?;
        let (b, n, _) = x.dims3()?;
        if let Some(cache) = cache {
            cache.advance(b, n);
        }
        Ok(projected)
    }

    /// As [`Heads::project`], but keys, values and priors of x carry gradients; those of the cached positions are
    /// constants.
    pub(crate) fn project_with_gradients(
        &self,
        x: &Tensor,
        pass: &Pass,
        cache: &mut LayerCache,
    ) -> Result<Projected> {
        let new = self.project_new(x, pass, Some(cache), Positions::InRow)?;
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
    fn project_new(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
        counted: Positions,
    ) -> Result<Projected> {
        let (b, n, _) = x.dims3()?;
        let Some((q_proj, k_proj)) = &self.qk_proj else {
            candle_core::bail!("a layer without reading heads")
        };
        let offsets = offsets(cache.as_deref(), pass.mask, [b, n])?;
        let together = self.qk_proj.as_ref().filter(|_| self.cfg.induction_heads == 0);
        let Preserved { x, v, averages, gate, queries_keys } =
            self.preserve(x, pass, cache.as_deref_mut(), together)?;
        let boundaries = pass.mask.boundaries().filter(|_| matches!(counted, Positions::InSequence));
        let rotated = |heads: &dyn Fn(Option<&[usize]>) -> Result<Tensor>| match boundaries {
            Some(boundaries) => self.rotary.apply_packed(&heads(None)?, boundaries),
            None => heads(Some(&offsets)),
        };
        let norms = self.norms.as_ref();
        let (q_norm, k_norm) = (norms.map(|(q_norm, _)| q_norm), norms.map(|(_, k_norm)| k_norm));
        let (q, k) = match (queries_keys, self.cfg.induction_heads) {
            (Some([q, k]), _) => (
                rotated(&|offsets| self.heads_of(&q, q_norm, offsets))?,
                rotated(&|offsets| self.heads_of(&k, k_norm, offsets))?,
            ),
            (None, 0) => (
                rotated(&|offsets| self.to_heads(q_proj, &x, q_norm, offsets))?,
                rotated(&|offsets| self.to_heads(k_proj, &x, k_norm, offsets))?,
            ),
            (None, heads) => {
                let before = preceding(&x, pass.mask, cache)?;
                let parts = |projection: &Linear, rows: &Tensor, norm: Option<&RmsNorm>, heads: usize| {
                    let (width, all) = (heads * self.cfg.head_dim, projection.dims()?.0);
                    let by_content = self.to_heads(&projection.outputs(0, width)?, rows, norm, None)?;
                    if width == all {
                        return Ok(by_content);
                    }
                    let rest = projection.outputs(width, all - width)?;
                    let by_position = rotated(&|offsets| self.to_heads(&rest, &x, norm, offsets))?;
                    Tensor::cat(&[by_content, by_position], 1)
                };
                let key_heads = heads / self.cfg.group();
                (parts(q_proj, &x, q_norm, heads)?, parts(k_proj, &before, k_norm, key_heads)?)
            }
        };
        let v = v.narrow(1, 0, self.cfg.reading_key_value_heads())?;
        let prior = match &self.beacon {
            Some(beacon) => beacon.prior(&x)?,
            None => None,
        };
        let mask = match self.cfg.window {
            Some(window) => pass.mask.clone().windowed(window),
            None => pass.mask.clone(),
        };
        Ok(Projected { q, k, v, mask, prior, averages, gate, cut_reads: pass.cut_reads })
    }

    /// Convolution, values, running averages and output gate of x `[B, N, C]`, and outside of trainings the products with the
    /// projections `qk_proj`.
    fn preserve(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
        qk_proj: Option<&(Linear, Linear)>,
    ) -> Result<Preserved> {
        if x.dims3()?.2 != self.cfg.hidden_size {
            candle_core::bail!("x {:?} does not have hidden_size {}", x.dims(), self.cfg.hidden_size);
        }
        let x = match &self.beacon {
            Some(beacon) => beacon.convolve(x, pass.mask, cache.as_deref_mut())?,
            None => x.clone(),
        };
        let (v, queries_keys) = match qk_proj.filter(|qk_proj| !self.is_trained(&x, qk_proj)) {
            Some((q_proj, k_proj)) => {
                let [q, k, v] = Linear::forward_all([q_proj, k_proj, &self.v_proj], &x)?;
                (self.heads_of(&v, None, None)?, Some([q, k]))
            }
            None => (self.to_heads(&self.v_proj, &x, None, None)?, None),
        };
        let averages = match &self.beacon {
            Some(beacon) => beacon.averages(&x, &v, pass.mask, cache)?,
            None => None,
        };
        let gate = self.g_proj.as_ref().map(|g| candle_nn::ops::sigmoid(&g.forward(&x)?)).transpose()?;
        Ok(Preserved { x, v, averages, gate, queries_keys })
    }

    /// Whether queries, keys or values of x have gradients, each of which is one operator together with norm and rotation then.
    fn is_trained(&self, x: &Tensor, (q_proj, k_proj): &(Linear, Linear)) -> bool {
        let weights = [q_proj, k_proj, &self.v_proj].into_iter().filter_map(Linear::plain_weight);
        let norms = self.norms.iter().flat_map(|(q_norm, k_norm)| [q_norm.weight(), k_norm.weight()]);
        [x].into_iter().chain(weights).chain(norms).any(Tensor::track_op)
    }

    /// The heads `[B, H, N, D]` of a projection of x `[B, N, C]`, normalised and rotated where these are given.
    fn to_heads(
        &self,
        projection: &Linear,
        x: &Tensor,
        norm: Option<&RmsNorm>,
        offsets: Option<&[usize]>,
    ) -> Result<Tensor> {
        let Some(weight) = projection.plain_weight() else {
            return self.heads_of(&projection.forward(x)?, norm, offsets);
        };
        let heads = HeadProjection {
            head_dim: self.cfg.head_dim,
            bias: projection.bias(),
            norm: norm.map(|norm| (norm.weight(), norm.eps())),
            rotation: offsets.map(|offsets| self.rotary.rotation(offsets)),
        };
        Ok(project_to_heads(x, weight, &heads)?)
    }

    /// The same from the product `[B, N, H D]` of the projection.
    fn heads_of(&self, y: &Tensor, norm: Option<&RmsNorm>, offsets: Option<&[usize]>) -> Result<Tensor> {
        let (b, n, _) = y.dims3()?;
        let y = y.reshape((b, n, (), self.cfg.head_dim))?;
        let y = norm.map_or(Ok(y.clone()), |norm| norm.forward(&y))?.transpose(1, 2)?;
        offsets.map_or(Ok(y.clone()), |offsets| self.rotary.apply_each(&y, offsets))
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
        let Preserved { averages, gate, .. } = self.preserve(x, pass, cache.as_deref_mut(), None)?;
        if let Some(cache) = cache {
            cache.advance(b, n);
        }
        let Some(averages) = averages else {
            candle_core::bail!("a layer without reading heads needs averages")
        };
        self.project_output(&averages.output()?, gate)
    }

    /// The output of the layer `[B, N, C]` from that of the heads that read `[B, Hq, N, D]`: averages, output gate and
    /// `o_proj`.
    pub(crate) fn output(&self, y: Tensor, projected: Projected) -> Result<Tensor> {
        let y = match (projected.cut_reads, &projected.averages) {
            (true, Some(averages)) => averages.output()?,
            (true, None) => y.zeros_like()?,
            (false, None) => y,
            (false, Some(averages)) => averages.added_to(&y)?,
        };
        self.project_output(&y, projected.gate)
    }

    /// The output gate and `o_proj` on the output of all heads `[B, H, N, D]`.
    fn project_output(&self, y: &Tensor, gate: Option<Tensor>) -> Result<Tensor> {
        if let (None, Some(weight)) = (&gate, self.o_proj.plain_weight()) {
            return Ok(project_from_heads(y, weight, self.o_proj.bias())?);
        }
        let (b, _, n, _) = y.dims4()?;
        let y = y.transpose(1, 2)?.reshape((b, n, ()))?;
        self.o_proj.forward(&gate.map_or(Ok(y.clone()), |gate| y * gate)?)
    }
}

/// The row before each of x `[B, N, C]`; 0 before the first of a sequence.
fn preceding(x: &Tensor, mask: &Mask, cache: Option<&mut LayerCache>) -> Result<Tensor> {
    // A convolution whose filters are 1 at the position before and 0 at their own.
    let channels = x.dim(2)?;
    let filters: Vec<f32> = [1.0, 0.0].repeat(channels);
    let filters = Tensor::from_vec(filters, (channels, 2), x.device())?.to_dtype(x.dtype())?;
    if let Some(boundaries) = mask.boundaries() {
        return Ok(packed_causal_conv(x, &filters, boundaries)?);
    }
    let last = cache.as_ref().and_then(|cache| cache.last_input.clone());
    let (before, last) = causal_conv(x, &filters, last.as_ref())?;
    if let Some(cache) = cache {
        cache.last_input = Some(last);
    }
    Ok(before)
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
