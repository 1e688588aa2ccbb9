//! Selection attention: every head selects the value of one key, or abstains.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{
    Candidates, DecodeUse, Estimator, Gate, KeyCache, Mask, Scan, Score, Select, Selected, decode,
    decode_reads_protected, scan, scan_all, select,
};

use crate::attention::{Attention, Pass};
use crate::beacon::GatedAverages;
use crate::cache::LayerCache;
use crate::config::{AttentionConfig, GdConfig};
use crate::derived::DerivedCache;
use crate::heads::{Heads, Projected};
use crate::linear::Linear;
use crate::probe::{CandidateView, SelectionView};
use crate::rope::Rotary;
use crate::stats::SelectionStats;
use crate::threshold::{Threshold, by_query, limit};

/// The initial weight of the query's well: near 1/2, where the two wells tie, but not at it.
const INITIAL_ALPHA: f64 = 0.6;

/// Selection attention, a replacement for multi-head attention.
///
/// Each head scans all visible keys for the candidates of least energy and selects the value of one of them, or
/// abstains. Projections and weight names are those of a Llama attention. Added per head under `gd` are `beta [Hq]`
/// (its logarithm), and if configured `threshold [Hq]`, `threshold_slope [Hq]`, `alpha [Hq]` (its logit) and
/// `rounds [Hq, R]` (deviation from (1, 0, ..)).
///
/// Through [`Module`] it is causal self-attention over x `[B, N, C]`; [`GdAttention::forward`] has the signature of the
/// attention of candle's own models and holds a cache; [`Attention::attend`] takes mask, options and cache.
///
/// # Examples
/// ```
/// use std::sync::Arc;
///
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_layer::{AttentionConfig, GdAttention, RopeScaling, Rotary};
///
/// let map = VarMap::new();
/// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
/// // Width 32, four query heads of 8 elements, two key-value heads.
/// let config = AttentionConfig::new(32, 4, 8).with_key_value_heads(2);
/// let rotary = Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &Device::Cpu)?;
/// let attention = GdAttention::new(&config, Arc::new(rotary), vb)?;
/// let x = Tensor::randn(0f32, 1.0, (1, 6, 32), &Device::Cpu)?;
/// // Six tokens at once, then one more.
/// let y = attention.forward(&x, None, 0)?;
/// assert_eq!(y.dims(), [1, 6, 32]);
/// let next = Tensor::randn(0f32, 1.0, (1, 1, 32), &Device::Cpu)?;
/// assert_eq!(attention.forward(&next, None, 6)?.dims(), [1, 1, 32]);
/// // Gradients reach the weights.
/// assert!(y.sum_all()?.backward()?.get(&map.data().lock().unwrap()["v_proj.weight"]).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GdAttention {
    heads: Heads,
    /// None without heads that read.
    log_beta: Option<Tensor>,
    threshold: Option<Threshold>,
    alpha_logit: Option<Tensor>,
    rounds: Option<Tensor>,
    // In a mutex so that `forward` takes `&self`: an inherent `&mut self` method would lose to
    // `Module::forward` wherever that trait is in scope.
    cache: Mutex<LayerCache>,
}

impl GdAttention {
    /// Reads or creates the weights under `vb`.
    ///
    /// # Errors
    /// A config that contradicts itself, or weights that are missing or of another shape.
    pub fn new(cfg: &AttentionConfig, rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        let heads = Heads::new(cfg, rotary, vb.clone())?;
        let (vb, hq, d) = (vb.pp("gd"), cfg.reading_heads(), cfg.head_dim as f64);
        if hq == 0 {
            let (log_beta, threshold, alpha_logit, rounds) = (None, None, None, None);
            return Ok(Self { heads, log_beta, threshold, alpha_logit, rounds, cache: Mutex::default() });
        }
        // The initial scores are then those of softmax attention, <q, k> / sqrt(D). Energies contain them as
        // 2 beta <q, k>, and order keys alike if all keys have the same norm or `norm_prior` is set.
        let beta = match cfg.gd.score {
            Score::Dot => 1.0 / d.sqrt(),
            Score::Energy => 0.5 / d.sqrt(),
        };
        let log_beta = Some(vb.get_with_hints(hq, "beta", Init::Const(beta.ln()))?);
        let threshold = match cfg.gd.threshold {
            Some(t) => Some(Threshold::new(&cfg.gd, hq, t * 2.0 * beta * d, &vb)?),
            None => None,
        };
        let alpha_logit = match cfg.gd.gate {
            Gate::Coherence => Some(vb.get_with_hints(
                hq,
                "alpha",
                Init::Const((INITIAL_ALPHA / (1.0 - INITIAL_ALPHA)).ln()),
            )?),
            Gate::None | Gate::Energy { .. } | Gate::Margin { .. } => None,
        };
        let rounds = match cfg.gd.rounds {
            1 => None,
            r => Some(vb.get_with_hints((hq, r), "rounds", Init::Const(0.0))?),
        };
        Ok(Self { heads, log_beta, threshold, alpha_logit, rounds, cache: Mutex::default() })
    }

    /// The output of the layer, in the signature of the attention of candle's own models. The layer holds the cache.
    ///
    /// * `x`: `[B, N, C]`.
    /// * `mask`: additive, 0 where a key is visible and -inf elsewhere, `[N, M]` or with leading dimensions; none for a
    ///   causal mask.
    /// * `offset`: the position of the first query, which is the number of cached positions; 0 starts a new sequence.
    ///
    /// Returns `[B, N, C]`. Gradients flow to x and to every parameter; keys and values that earlier calls have cached
    /// are constants.
    ///
    /// # Errors
    /// An offset that is not the number of cached positions, or a mask that does not leave each query one interval of
    /// keys.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>, offset: usize) -> Result<Tensor> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 {
            *cache = LayerCache::new();
        }
        if cache.len() != offset {
            candle_core::bail!("offset {offset} does not follow {} cached positions", cache.len());
        }
        let mask = match mask {
            Some(mask) => Mask::from_additive(mask, offset)?,
            None => Mask::causal(offset as i64),
        };
        let pass = Pass::new(&mask);
        if self.log_beta.is_none() {
            return self.heads.without_reads(x, &pass, Some(&mut cache));
        }
        let projected = self.heads.project_with_gradients(x, &pass, &mut cache)?;
        self.attend_to(projected, &pass, Some(&mut cache))
    }

    /// Empties the cache.
    pub fn clear_kv_cache(&self) {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = LayerCache::new();
    }

    /// The thresholds of this pass, of the heads `[Hq]` or of every query `[B, Hq, N]`; none without thresholds.
    fn thresholds(&self, pass: &Pass, projected: &Projected) -> Result<Option<Tensor>> {
        let of_pass = |t: &Threshold| t.of_queries(pass.threshold, &projected.mask, projected.sizes()?);
        self.threshold.as_ref().map(of_pass).transpose()
    }

    /// What the number of visible keys adds to the thresholds `[B, Hq, N]`, if they follow it.
    fn threshold_shift(&self, projected: &Projected) -> Result<Option<Tensor>> {
        match &self.threshold {
            Some(threshold) => threshold.shift(&projected.mask, projected.sizes()?),
            None => Ok(None),
        }
    }

    /// The layer's output from its projections.
    fn attend_to(&self, projected: Projected, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let Some(log_beta) = &self.log_beta else { candle_core::bail!("a layer without reading heads") };
        let beta = log_beta.exp()?;
        let norm_prior = |k: &Tensor, learned: Option<&Tensor>| norm_prior(k, &beta, learned);
        // A cached prior has no gradient: where beta has one, the prior is computed again.
        let caches_prior = self.heads.cfg.gd.norm_prior && !beta.track_op();
        let derived = match cache {
            Some(cache) => {
                let reads = self.decode_use();
                cache.update_derived(self.heads.cfg.gd.score, reads, caches_prior.then_some(&norm_prior))?
            }
            None => None,
        };
        let prior = match (caches_prior.then_some(derived).flatten(), self.heads.cfg.gd.norm_prior) {
            (Some(derived), _) => derived.prior()?,
            (None, true) => Some(norm_prior(&projected.k, projected.prior.as_ref())?),
            (None, false) => projected.prior.clone(),
        };
        let scoring = ScoringInputs {
            beta: &beta,
            prior: prior.as_ref(),
            key_cache: derived.and_then(DerivedCache::keys),
        };
        let differentiate = [&projected.q, &projected.k, &projected.v, &beta]
            .into_iter()
            .chain(prior.as_ref())
            .any(Tensor::track_op);
        let y = match scoring.key_cache {
            Some(key_cache) if !differentiate && self.winner_suffices(pass) => {
                self.winner(&projected, pass, &scoring, key_cache)?
            }
            _ => {
                let (selected, candidates) = self.preserve_and_select(&projected, pass, &scoring)?;
                let y = selected.y.clone();
                if let Some(stats) = pass.stats {
                    let temperature = pass.temperature.unwrap_or(self.heads.cfg.gd.temperature);
                    let of_pass = SelectionStats::of_selection(selected, &candidates, temperature)?;
                    let threshold_shift = self.threshold_shift(&projected)?;
                    stats.borrow_mut().push(SelectionStats { threshold_shift, ..of_pass });
                }
                y
            }
        };
        self.heads.output(y, projected)
    }

    /// Whether the output of a pass with hardness 1 is the value row of the winner, or that row times its energy gate, so that
    /// no other candidate is needed.
    fn returns_winner(&self) -> bool {
        let AttentionConfig { gd, beacon, .. } = &self.heads.cfg;
        let barrier = beacon.as_ref().is_some_and(|beacon| beacon.barrier.is_some());
        let mixes = matches!(gd.estimator, Estimator::Blend | Estimator::Dense);
        let of_winner = matches!(gd.gate, Gate::None | Gate::Energy { .. });
        of_winner && gd.rounds == 1 && gd.picks == 1 && !barrier && !mixes
    }

    /// How decoding uses data derived from the cached keys; none where every key is a candidate.
    fn decode_use(&self) -> Option<DecodeUse> {
        let reads = if self.returns_winner() { DecodeUse::Winner } else { DecodeUse::Candidates };
        (self.heads.cfg.gd.estimator != Estimator::Dense).then_some(reads)
    }

    /// Whether this pass needs only the value rows of the winners.
    fn winner_suffices(&self, pass: &Pass) -> bool {
        let plain = pass.stats.is_none() && pass.probe.is_none() && pass.hardness == 1.0;
        plain && self.returns_winner()
    }

    /// The value rows of the winners, times their energy gates if there are any, `[B, Hq, N, D]`.
    fn winner(
        &self,
        projected: &Projected,
        pass: &Pass,
        scoring: &ScoringInputs,
        key_cache: &KeyCache,
    ) -> Result<Tensor> {
        let Projected { q, k, v, mask, .. } = projected;
        let GdConfig { score, tie, candidates, .. } = self.heads.cfg.gd;
        let candidates = pass.candidates.unwrap_or(candidates);
        let protected = match &self.heads.beacon {
            Some(beacon) if decode_reads_protected(q, candidates)? => {
                beacon.protect(projected.prior.as_ref(), q.dim(2)?, mask)?
            }
            _ => None,
        };
        let options = Scan {
            prior: scoring.prior,
            score,
            tie,
            protected: protected.as_ref(),
            ..Scan::new(scoring.beta, mask, candidates)
        };
        let (options, threshold) = (options.with_cached(key_cache), self.thresholds(pass, projected)?);
        let GdConfig { gate, exclude_below, .. } = self.heads.cfg.gd;
        let (Gate::Energy { temperature }, Some(threshold)) = (gate, &threshold) else {
            return Ok(decode(q, k, v, &options, threshold.as_ref())?.y);
        };
        let limit = (threshold + gate.admission(exclude_below))?;
        let winner = decode(q, k, v, &options, Some(&limit))?;
        let threshold = by_query(&threshold.to_dtype(winner.energy.dtype())?)?;
        // A quotient, not a product with the reciprocal: the bits are those of `select`.
        let temperature = Tensor::new(temperature, q.device())?.to_dtype(threshold.dtype())?;
        let logits = threshold.broadcast_sub(&winner.energy)?.broadcast_div(&temperature)?;
        let rho = candle_nn::ops::sigmoid(&logits)?.unsqueeze(3)?;
        winner.y.to_dtype(rho.dtype())?.broadcast_mul(&rho)?.to_dtype(winner.y.dtype())
    }

    /// The selections, and the candidates that they were made from.
    fn preserve_and_select(
        &self,
        projected: &Projected,
        pass: &Pass,
        scoring: &ScoringInputs,
    ) -> Result<(Selected, Candidates)> {
        let Projected { q, k, v, mask, .. } = projected;
        let gd = &self.heads.cfg.gd;
        let ScoringInputs { beta, prior, key_cache } = *scoring;
        let protected = match &self.heads.beacon {
            Some(beacon) => beacon.protect(projected.prior.as_ref(), q.dim(2)?, mask)?,
            None => None,
        };
        let configured = pass.candidates.unwrap_or(gd.candidates);
        let count = pass.probe.map_or(configured, |probe| probe.candidates(pass.layer, configured));
        let options = Scan {
            prior,
            score: gd.score,
            tie: gd.tie,
            protected: protected.as_ref(),
            ..Scan::new(beta, mask, count)
        };
        let options = match key_cache {
            Some(key_cache) => options.with_cached(key_cache),
            None => options,
        };
        let candidates = match gd.estimator {
            Estimator::Dense => scan_all(q, k, &options)?,
            _ => scan(q, k, &options)?,
        };
        let alpha = self.alpha_logit.as_ref().map(candle_nn::ops::sigmoid).transpose()?;
        let rounds = self.rounds.as_ref().map(|r| first_round(r)?.broadcast_add(r)).transpose()?;
        let threshold = self.thresholds(pass, projected)?;
        let (layer, threshold) = (pass.layer, threshold.as_ref());
        let candidates = match pass.probe {
            Some(probe) => {
                let (limit, scan) = (limit(gd, threshold, &candidates)?, &options);
                let limit = limit.as_ref();
                probe.preserved(CandidateView { layer, configured, candidates, limit, q, k, scan })?
            }
            None => candidates,
        };
        let select_options = Select {
            prior,
            score: gd.score,
            tie: gd.tie,
            threshold,
            alpha: alpha.as_ref(),
            gate: gd.gate,
            exclude_below: gd.exclude_below,
            picks: gd.picks,
            estimator: gd.estimator,
            temperature: pass.temperature.unwrap_or(gd.temperature),
            preserve_floor: pass.preserve_floor.unwrap_or(gd.preserve_floor),
            gradient: gd.gradient,
            value_floor: gd.value_floor,
            hardness: pass.hardness,
            barrier: self.heads.cfg.beacon.as_ref().and_then(|b| b.barrier),
            rounds: rounds.as_ref(),
            coherence: gd.coherence,
            ..Select::new(beta)
        };
        let selected = select(q, k, v, &candidates, &select_options)?;
        if let Some(probe) = pass.probe {
            let memory = projected.averages.as_ref().map(GatedAverages::output).transpose()?;
            let (memory, output_gate) = (memory.as_ref(), projected.gate.as_ref());
            let (limit, candidates, selected) = (limit(gd, threshold, &candidates)?, &candidates, &selected);
            let limit = limit.as_ref();
            probe.selected(&SelectionView { layer, candidates, selected, limit, memory, output_gate })?;
        }
        Ok((selected, candidates))
    }
}

/// The inputs of the scores of a pass besides queries and keys.
struct ScoringInputs<'a> {
    /// Inverse bandwidth `[Hq]`.
    beta: &'a Tensor,
    /// Key prior `[B, Hq|Hk, M]`.
    prior: Option<&'a Tensor>,
    /// Data derived from the cached keys.
    key_cache: Option<&'a KeyCache>,
}

/// The key prior under which energies order keys as dot products do: `beta |k|^2`, plus the learned prior if there is
/// one.
///
/// * `k`: keys `[B, Hk, M, D]`; `beta`: `[Hq]`; `learned`: `[B, Hk, M]`.
///
/// Returns `[B, Hq, M]` in f32 (f64 for f64), differentiable in all three.
///
/// # Errors
/// Shapes that do not fit.
pub fn norm_prior(k: &Tensor, beta: &Tensor, learned: Option<&Tensor>) -> Result<Tensor> {
    let wide = if k.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (b, hk, m, _) = k.dims4()?;
    let hq = beta.dim(0)?;
    // [B, Hk, M] -> [B, Hk, Hq / Hk, M] -> [B, Hq, M]
    let spread =
        |t: &Tensor| t.to_dtype(wide)?.unsqueeze(2)?.broadcast_as((b, hk, hq / hk, m))?.reshape((b, hq, m));
    let norms = spread(&k.to_dtype(wide)?.sqr()?.sum(3)?)?;
    let prior = norms.broadcast_mul(&beta.to_dtype(wide)?.reshape((1, hq, 1))?)?;
    match learned {
        Some(learned) => prior + spread(learned)?,
        None => Ok(prior),
    }
}

/// (1, 0, ..) in the shape of `rounds`: initially only the first selection contributes to the output.
fn first_round(rounds: &Tensor) -> Result<Tensor> {
    let mut first = vec![0f32; rounds.dim(1)?];
    first[0] = 1.0;
    Tensor::new(first, rounds.device())?.to_dtype(rounds.dtype())?.unsqueeze(0)?.broadcast_as(rounds.shape())
}

impl Attention for GdAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        if self.log_beta.is_none() {
            return self.heads.without_reads(x, pass, cache);
        }
        match cache {
            Some(cache) => {
                let projected = self.heads.project(x, pass, Some(&mut *cache))?;
                self.attend_to(projected, pass, Some(cache))
            }
            None => self.attend_to(self.heads.project(x, pass, None)?, pass, None),
        }
    }

    fn projections_mut(&mut self) -> Vec<(&'static str, &mut Linear)> {
        self.heads.projections_mut()
    }
}

impl Module for GdAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}
