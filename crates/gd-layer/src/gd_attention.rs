//! Selection attention: every head reads the value of one key, or abstains.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{
    Candidates, DecodeUse, Estimator, Gate, KeyCache, Mask, Scan, Score, Select, Selected, decode, scan, scan_all,
    select,
};

use crate::attention::{Attention, Pass, Record, distinct};
use crate::cache::LayerCache;
use crate::config::{AttentionConfig, GdConfig};
use crate::heads::{Heads, Ready};
use crate::kept::Kept;
use crate::probe::{Found, Reading};
use crate::rope::Rotary;

/// The weight of the query's well starts beside 1/2, where the two wells tie.
const ALPHA: f64 = 0.6;

/// GD-Attention, in the place of a multi-head attention: same projections, same weight names, and
/// per head under `gd`: `beta [Hq]` (log), and if configured `threshold [Hq]`, `alpha [Hq]`
/// (logit), `rounds [Hq, R]` (deviation from (1, 0, ..)).
///
/// ```
/// use std::sync::Arc;
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_kernels::Mask;
/// use gd_layer::{Attention, AttentionConfig, GdAttention, Pass, RopeScaling, Rotary};
///
/// let (device, weights) = (Device::Cpu, VarMap::new());
/// let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
/// let rotary = Arc::new(Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &device)?);
/// let attention = GdAttention::new(&AttentionConfig::new(32, 4, 8), rotary, vb)?;
///
/// let x = Tensor::randn(0f32, 1.0, (2, 16, 32), &device)?;
/// let mask = Mask::window(4, 0);
/// let y = attention.attend(&x, &Pass::new(&mask), None)?;
/// let gradients = y.sqr()?.sum_all()?.backward()?;
/// for weight in weights.all_vars() {
///     assert!(gradients.get(&weight).is_some());
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct GdAttention {
    heads: Heads,
    log_beta: Tensor,
    threshold: Option<Tensor>,
    alpha_logit: Option<Tensor>,
    rounds: Option<Tensor>,
    // Behind a lock so that `forward` takes `&self`: an inherent `&mut self` method would lose to
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
        let (vb, hq, d) = (vb.pp("gd"), cfg.num_attention_heads, cfg.head_dim as f64);
        // The scores then start as softmax's <q, k> / sqrt(D): as dot products, and as energies, in which they
        // are 2 beta <q, k>, if all keys are of one norm or `norm_prior` makes up for it.
        let beta = match cfg.gd.score {
            Score::Dot => 1.0 / d.sqrt(),
            Score::Energy => 0.5 / d.sqrt(),
        };
        let log_beta = vb.get_with_hints(hq, "beta", Init::Const(beta.ln()))?;
        let threshold = match cfg.gd.threshold {
            Some(t) => Some(vb.get_with_hints(hq, "threshold", Init::Const(t * 2.0 * beta * d))?),
            None => None,
        };
        let alpha_logit = match cfg.gd.gate {
            Gate::Coherence => {
                Some(vb.get_with_hints(hq, "alpha", Init::Const((ALPHA / (1.0 - ALPHA)).ln()))?)
            }
            Gate::None | Gate::Energy { .. } => None,
        };
        let rounds = match cfg.gd.rounds {
            1 => None,
            r => Some(vb.get_with_hints((hq, r), "rounds", Init::Const(0.0))?),
        };
        Ok(Self { heads, log_beta, threshold, alpha_logit, rounds, cache: Mutex::default() })
    }

    /// As the attention of candle's own models: x `[B, N, C]`, an additive mask of 0 and -inf
    /// (`[N, M]` or with leading dimensions) or none for one query, and the position of the first
    /// query. Keeps a KV cache; `offset` 0 starts a new sequence. Without gradient.
    ///
    /// # Errors
    /// An offset that does not follow the cached positions, or a mask that does not leave each
    /// query one interval of keys.
    pub fn forward(&self, x: &Tensor, mask: Option<&Tensor>, offset: usize) -> Result<Tensor> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 {
            *cache = LayerCache::new();
        }
        if cache.len() != offset {
            candle_core::bail!("offset {offset} does not follow {} cached positions", cache.len());
        }
        let mask = match mask {
            Some(mask) => crate::mask::from_additive(mask, offset)?,
            None => Mask::causal(offset as i64),
        };
        self.attend_with(x, &Pass::new(&mask), Some(&mut cache), false)
    }

    /// Forgets the cached positions.
    pub fn clear_kv_cache(&self) {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = LayerCache::new();
    }

    /// The heads' thresholds in this pass, where they have one.
    fn thresholds(&self, pass: &Pass) -> Result<Option<Tensor>> {
        match (&self.threshold, pass.threshold) {
            (Some(threshold), Some(more)) => Ok(Some((threshold + more)?)),
            (threshold, _) => Ok(threshold.clone()),
        }
    }

    /// The layer's output; without a gradient if it is not `tracked`.
    fn attend_with(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cache: Option<&mut LayerCache>,
        tracked: bool,
    ) -> Result<Tensor> {
        let mut ready = self.heads.prepare(x, pass, cache.as_deref_mut())?;
        let mut beta = self.log_beta.exp()?;
        if !tracked {
            (ready.q, beta) = (ready.q.detach(), beta.detach());
        }
        let norm_prior = |k: &Tensor, learned: Option<&Tensor>| norm_prior(k, &beta, learned);
        // A cached prior has no gradient: where beta wants one, the prior is worked out anew.
        let keeps_prior = self.heads.cfg.gd.norm_prior && !beta.track_op();
        let kept = match cache {
            Some(cache) => {
                let reads = self.decode_use();
                cache.keep(self.heads.cfg.gd.score, reads, keeps_prior.then_some(&norm_prior))?
            }
            None => None,
        };
        let prior = match (keeps_prior.then_some(kept).flatten(), self.heads.cfg.gd.norm_prior) {
            (Some(kept), _) => kept.prior()?,
            (None, true) => Some(norm_prior(&ready.k, ready.prior.as_ref())?),
            (None, false) => ready.prior.clone(),
        };
        let seen = Seen { beta: &beta, prior: prior.as_ref(), kept: kept.and_then(Kept::keys) };
        let y = match seen.kept {
            Some(kept) if self.winner_suffices(&ready.q, pass) => self.winner(&ready, pass, &seen, kept)?,
            _ => {
                let (selected, candidates) = self.read(&ready, pass, &seen)?;
                let y = selected.y.clone();
                if let Some(record) = pass.record {
                    let temperature = pass.temperature.unwrap_or(self.heads.cfg.gd.temperature);
                    record.borrow_mut().push(summary(selected, &candidates, temperature)?);
                }
                y
            }
        };
        self.heads.finish(y, ready)
    }

    /// Whether what a pass returns is the winner's value row, as long as it is hard.
    fn returns_winner(&self) -> bool {
        let AttentionConfig { gd, beacon, .. } = &self.heads.cfg;
        let barrier = beacon.as_ref().is_some_and(|beacon| beacon.barrier.is_some());
        let mixes = matches!(gd.estimator, Estimator::Blend | Estimator::Dense);
        gd.gate == Gate::None && gd.rounds == 1 && !barrier && !mixes
    }

    /// What decoding asks of the cached keys; nothing where every key is a candidate.
    fn decode_use(&self) -> Option<DecodeUse> {
        let reads = if self.returns_winner() { DecodeUse::Winner } else { DecodeUse::Candidates };
        (self.heads.cfg.gd.estimator != Estimator::Dense).then_some(reads)
    }

    /// Whether this pass needs the value row of the winner and nothing else.
    fn winner_suffices(&self, q: &Tensor, pass: &Pass) -> bool {
        let plain = pass.record.is_none() && pass.probe.is_none() && pass.hardness == 1.0;
        plain && self.returns_winner() && !q.track_op()
    }

    /// The value rows of the winners `[B, Hq, N, D]`.
    fn winner(&self, ready: &Ready, pass: &Pass, seen: &Seen, kept: &KeyCache) -> Result<Tensor> {
        let GdConfig { score, tie, .. } = self.heads.cfg.gd;
        let candidates = pass.candidates.unwrap_or(self.heads.cfg.gd.candidates);
        let scan = Scan { prior: seen.prior, score, tie, ..Scan::new(seen.beta, &ready.mask, candidates) };
        let threshold = self.thresholds(pass)?;
        Ok(decode(&ready.q, &ready.k, &ready.v, &scan.with_cached(kept), threshold.as_ref())?.y)
    }

    /// Preserve and select: y `[B, Hq, N, D]` and its record.
    fn read(&self, ready: &Ready, pass: &Pass, seen: &Seen) -> Result<(Selected, Candidates)> {
        let Ready { q, k, v, mask, .. } = ready;
        let gd = &self.heads.cfg.gd;
        let Seen { beta, prior, kept } = *seen;
        let protected = match &self.heads.beacon {
            Some(beacon) => beacon.protect(ready.prior.as_ref(), q.dim(2)?, mask)?,
            None => None,
        };
        let own = pass.candidates.unwrap_or(gd.candidates);
        let count = pass.probe.map_or(own, |probe| probe.candidates(pass.layer, own));
        let what = Scan {
            prior,
            score: gd.score,
            tie: gd.tie,
            protected: protected.as_ref(),
            ..Scan::new(beta, mask, count)
        };
        let what = match kept {
            Some(kept) => what.with_cached(kept),
            None => what,
        };
        let candidates = match gd.estimator {
            Estimator::Dense => scan_all(q, k, &what)?,
            _ => scan(q, k, &what)?,
        };
        let alpha = self.alpha_logit.as_ref().map(candle_nn::ops::sigmoid).transpose()?;
        let rounds = self.rounds.as_ref().map(|r| first_round(r)?.broadcast_add(r)).transpose()?;
        let threshold = self.thresholds(pass)?;
        let (layer, threshold) = (pass.layer, threshold.as_ref());
        let candidates = match pass.probe {
            Some(probe) => probe.preserved(Found { layer, own, candidates, threshold, q, k, scan: &what })?,
            None => candidates,
        };
        let how = Select {
            prior,
            score: gd.score,
            tie: gd.tie,
            threshold,
            alpha: alpha.as_ref(),
            gate: gd.gate,
            estimator: gd.estimator,
            temperature: pass.temperature.unwrap_or(gd.temperature),
            preserve_floor: pass.preserve_floor.unwrap_or(gd.preserve_floor),
            value_floor: gd.value_floor,
            hardness: pass.hardness,
            barrier: self.heads.cfg.beacon.as_ref().and_then(|b| b.barrier),
            rounds: rounds.as_ref(),
            coherence: gd.coherence,
            ..Select::new(beta)
        };
        let selected = select(q, k, v, &candidates, &how)?;
        if let Some(probe) = pass.probe {
            let (memory, output_gate) = (ready.memory.as_ref(), ready.gate.as_ref());
            let (candidates, selected) = (&candidates, &selected);
            probe.selected(&Reading { layer, candidates, selected, threshold, memory, output_gate })?;
        }
        Ok((selected, candidates))
    }
}

/// What the scores of a pass are made of besides queries and keys.
struct Seen<'a> {
    /// `[Hq]`.
    beta: &'a Tensor,
    /// `[B, Hq|Hk, M]`.
    prior: Option<&'a Tensor>,
    /// What the cache keeps of the keys.
    kept: Option<&'a KeyCache>,
}

/// The prior of keys `[B, Hk, M, D]` with which energies order them as dot products do: `beta |k|^2` and, where there
/// is one, the learned prior `[B, Hk, M]`, as `[B, Hq, M]` for beta `[Hq]`, in f32 at least.
///
/// # Errors
/// Shapes that do not belong together.
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

/// (1, 0, ..) in the shape of `rounds`: before training only the first selection counts.
fn first_round(rounds: &Tensor) -> Result<Tensor> {
    let mut first = vec![0f32; rounds.dim(1)?];
    first[0] = 1.0;
    Tensor::new(first, rounds.device())?.to_dtype(rounds.dtype())?.unsqueeze(0)?.broadcast_as(rounds.shape())
}

impl Attention for GdAttention {
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        self.attend_with(x, pass, cache, true)
    }
}

impl Module for GdAttention {
    /// Causal self-attention over x `[B, N, C]`, without a cache.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.attend(x, &Pass::new(&Mask::causal(0)), None)
    }
}

/// What was selected in numbers; the entropy is that of the scan's energies at `temperature`.
fn summary(selected: Selected, candidates: &Candidates, temperature: f64) -> Result<Record> {
    let (b, _, n) = selected.index.dims3()?;
    let picks = selected.index.flatten_all()?.to_vec1::<i32>()?;
    // Widened on the host: Metal has no f64.
    let wide = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let margin = wide(&selected.margin)?;
    let share = |wanted: i32| picks.iter().filter(|&&j| j == wanted).count() as f64 / picks.len() as f64;
    let energies = wide(&candidates.energy.detach())?;
    let rows = energies.chunks(candidates.energy.dim(3)?);
    Ok(Record {
        abstained: share(-1),
        first_token: share(0),
        margin: mean(margin.into_iter().filter(|m| m.is_finite())),
        entropy: mean(rows.map(|energies| entropy(energies, temperature))),
        distinct: distinct(&picks, b, n),
        picks,
        selected: Some(Selected { y: selected.y.detach(), ..selected }),
    })
}

/// 0 of nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
    sum / count.max(1) as f64
}

/// Entropy of `softmax(-energies / temperature)`, nats; padding has infinite energy and no weight.
fn entropy(energies: &[f64], temperature: f64) -> f64 {
    let least = energies.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut sum, mut moment) = (0.0, 0.0);
    for &energy in energies.iter().filter(|e| e.is_finite()) {
        let height = (least - energy) / temperature;
        sum += height.exp();
        moment += height * height.exp();
    }
    // ln(sum) - sum(w ln w') with w' the weights before they are divided by their sum.
    if sum > 0.0 { sum.ln() - moment / sum } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_equal_of_certain_and_of_no_candidates() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(entropy(&[3.0, 3.0, 3.0, f64::INFINITY], 1.0), 3f64.ln());
        close(entropy(&[-900.0, 900.0], 1.0), 0.0);
        close(entropy(&[f64::INFINITY; 2], 1.0), 0.0);
        // Weights 2/3 and 1/3.
        let expected = -(2.0 / 3.0 * (2f64 / 3.0).ln() + 1.0 / 3.0 * (1f64 / 3.0).ln());
        close(entropy(&[0.0, 2.0 * 2f64.ln()], 2.0), expected);
    }
}
