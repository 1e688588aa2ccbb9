//! The configuration of an attention layer. Every struct reads and writes itself with serde; unknown keys are errors.

use gd_kernels::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Score, TieBreak};
use serde::{Deserialize, Serialize};

/// Shape and parts of an attention layer, softmax or selecting.
///
/// Deserialised from keys that are named as the fields. The first four are required; the others have the values of
/// [`AttentionConfig::new`] where they are absent.
///
/// # Examples
/// ```
/// use gd_layer::{AttentionConfig, BeaconConfig, GdConfig};
///
/// let config = AttentionConfig::new(256, 8, 32)
///     .with_key_value_heads(2)
///     .with_beacon(BeaconConfig::default())
///     .with_gd(GdConfig::default().with_candidates(16));
/// assert_eq!((config.group(), config.gd.candidates), (4, 16));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// Width C of the model.
    pub hidden_size: usize,
    /// Query heads Hq.
    pub num_attention_heads: usize,
    /// Key-value heads Hk; divides Hq.
    pub num_key_value_heads: usize,
    /// Dimension D of a head.
    pub head_dim: usize,
    /// Whether q, k and v projections have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether `o_proj` has a bias.
    #[serde(default)]
    pub output_bias: bool,
    /// Whether q and k pass an RMSNorm per head (weights `q_norm`, `k_norm`) before the rotation.
    #[serde(default)]
    pub qk_norm: bool,
    /// Epsilon of that norm.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Whether the output of the heads is multiplied by a sigmoid gate, `sigmoid(g_proj x)`, before `o_proj` (position
    /// G1 of Qiu et al., arXiv 2505.06708).
    #[serde(default)]
    pub output_gate: bool,
    /// Sliding window: the number of most recent keys, its own included, that a query sees; none for all keys that the
    /// mask of the pass leaves visible.
    #[serde(default)]
    pub window: Option<usize>,
    /// The number n of query heads that read keys, the first n of all; none for all heads. The other heads are the
    /// Beacon's running averages alone: they have no queries and keys, and no cache. A multiple of the heads of a group
    /// ([`AttentionConfig::group`]); 0 is allowed.
    #[serde(default)]
    pub selecting_heads: Option<usize>,
    /// The number n of query heads that match by content and read what follows the match, the first n of those that read.
    /// Their queries and keys are not rotated, and the key at a position is that of the position before it (0 at the
    /// first): a query reads the value that followed an earlier occurrence of its own token, as the induction heads of
    /// Olsson et al., arXiv 2209.11895, do in two layers. A multiple of the heads of a group; 0 for none.
    #[serde(default)]
    pub induction_heads: usize,
    /// The Beacon; none for a layer without one.
    #[serde(default)]
    pub beacon: Option<BeaconConfig>,
    /// The options of selection; a softmax layer ignores them.
    #[serde(default)]
    pub gd: GdConfig,
}

impl AttentionConfig {
    /// Plain multi-head attention: as many key-value heads as query heads, no biases, QK norm, gate, window or
    /// Beacon, [`GdConfig::default`]. Its weights are those of a Llama layer and, for selection attention, those under
    /// `gd`.
    pub fn new(hidden_size: usize, num_attention_heads: usize, head_dim: usize) -> Self {
        Self {
            hidden_size,
            num_attention_heads,
            num_key_value_heads: num_attention_heads,
            head_dim,
            attention_bias: false,
            output_bias: false,
            qk_norm: false,
            rms_norm_eps: default_eps(),
            output_gate: false,
            window: None,
            selecting_heads: None,
            induction_heads: 0,
            beacon: None,
            gd: GdConfig::default(),
        }
    }

    /// The same with `heads` key-value heads (grouped-query attention).
    #[must_use]
    pub fn with_key_value_heads(self, heads: usize) -> Self {
        Self { num_key_value_heads: heads, ..self }
    }

    /// The same with or without biases of the q, k and v projections.
    #[must_use]
    pub fn with_attention_bias(self, attention_bias: bool) -> Self {
        Self { attention_bias, ..self }
    }

    /// The same with or without a bias of the output projection.
    #[must_use]
    pub fn with_output_bias(self, output_bias: bool) -> Self {
        Self { output_bias, ..self }
    }

    /// The same with or without an RMSNorm on q and k per head.
    #[must_use]
    pub fn with_qk_norm(self, qk_norm: bool) -> Self {
        Self { qk_norm, ..self }
    }

    /// The same with another epsilon of the RMSNorm on q and k.
    #[must_use]
    pub fn with_rms_norm_eps(self, rms_norm_eps: f64) -> Self {
        Self { rms_norm_eps, ..self }
    }

    /// The same with or without a sigmoid gate on the heads' output.
    #[must_use]
    pub fn with_output_gate(self, output_gate: bool) -> Self {
        Self { output_gate, ..self }
    }

    /// The same with a sliding window of `keys` keys.
    #[must_use]
    pub fn with_window(self, keys: usize) -> Self {
        Self { window: Some(keys), ..self }
    }

    /// The same with `heads` query heads that read keys.
    #[must_use]
    pub fn with_selecting_heads(self, heads: usize) -> Self {
        Self { selecting_heads: Some(heads), ..self }
    }

    /// The same with `heads` query heads that read what follows a match of their content.
    #[must_use]
    pub fn with_induction_heads(self, heads: usize) -> Self {
        Self { induction_heads: heads, ..self }
    }

    /// The same with a Beacon.
    #[must_use]
    pub fn with_beacon(self, beacon: BeaconConfig) -> Self {
        Self { beacon: Some(beacon), ..self }
    }

    /// The same with other options of the selection.
    #[must_use]
    pub fn with_gd(self, gd: GdConfig) -> Self {
        Self { gd, ..self }
    }

    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Query heads that read keys.
    pub fn reading_heads(&self) -> usize {
        self.selecting_heads.unwrap_or(self.num_attention_heads)
    }

    /// Key-value heads whose keys and values are read, and cached.
    pub fn reading_key_value_heads(&self) -> usize {
        self.reading_heads() / self.group()
    }

    /// Checks the values against each other.
    ///
    /// # Errors
    /// Names the first value that does not fit.
    pub fn validate(&self) -> candle_core::Result<()> {
        let Self { num_attention_heads: hq, num_key_value_heads: hk, head_dim, hidden_size, .. } = *self;
        if hq == 0 || hk == 0 || hq % hk != 0 {
            candle_core::bail!("{hq} attention heads do not divide into {hk} key-value heads");
        }
        if head_dim == 0 || hidden_size == 0 {
            candle_core::bail!("hidden_size {hidden_size} and head_dim {head_dim} must be positive");
        }
        if let Some(n) = self.selecting_heads.filter(|n| *n > hq || n % (hq / hk) != 0) {
            candle_core::bail!("selecting_heads {n} is not a multiple of {} up to {hq}", hq / hk);
        }
        let (induction, reading) = (self.induction_heads, self.reading_heads());
        if induction > reading || induction % (hq / hk) != 0 {
            candle_core::bail!(
                "induction_heads {induction} is not a multiple of {} up to {reading}",
                hq / hk
            );
        }
        let averages = self.beacon.as_ref().map_or(0, |beacon| beacon.averages);
        if self.reading_heads() < hq && averages == 0 {
            candle_core::bail!(
                "selecting_heads {} of {hq} leaves heads to the Beacon, which needs beacon.averages of at least 1",
                self.reading_heads()
            );
        }
        if self.window == Some(0) {
            candle_core::bail!("a window of 0 keys lets no query see any");
        }
        if let Gate::Margin { .. } = self.gd.gate
            && self.gd.candidates <= self.gd.picks
        {
            let GdConfig { candidates, picks, .. } = &self.gd;
            candle_core::bail!(
                "the margin gate needs more gd.candidates than gd.picks, not {candidates} for {picks}"
            );
        }
        if self.gd.threshold_by_length && self.gd.threshold.is_none() {
            candle_core::bail!("gd.threshold_by_length needs gd.threshold, the initial threshold");
        }
        if let Some(beacon) = &self.beacon {
            if beacon.conv_width == 0 {
                candle_core::bail!("beacon.conv_width is 0; 1 is the plain projection");
            }
            if beacon.protected > 0 && !beacon.prior {
                candle_core::bail!(
                    "beacon.protected {} needs beacon.prior, which ranks the keys",
                    beacon.protected
                );
            }
        }
        Ok(())
    }
}

/// The epsilon of the norms.
fn default_eps() -> f64 {
    1e-5
}

/// The options of a selection, the same for all heads of a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct GdConfig {
    /// Candidates per query: 1, 2, 4, 8, 16, 32 or 64.
    pub candidates: usize,
    /// How keys are scored: `energy`, β‖q − k‖² − b, or `dot`, −β⟨q, k⟩ − b.
    pub score: Score,
    /// Whether `beta |k|^2` is added to the prior of every key, so that energies order keys as dot products
    /// do.
    pub norm_prior: bool,
    /// Which of several keys with the same energy wins: that of the lowest index (`first`) or of the highest (`last`).
    pub tie: TieBreak,
    /// The factor of the selected row: none, `{"energy": {"temperature": T}}` for ρ = σ((τ − ε)/T),
    /// `{"margin": {"temperature": T}}` for ρ = σ((τ + ε₂ − ε)/T) with the energy ε₂ of the runner-up, or `coherence`.
    pub gate: Gate,
    /// Abstention with the energy or margin gate: a read whose gate ρ is below this is dropped, in [0, 1). At 0 none is; at 1/2,
    /// the default, those whose energy exceeds the threshold.
    pub exclude_below: f64,
    /// Rows R in 1..=4 that a query reads from one scan, with weights e^(−ε_r/T)/(e^(−τ/T) + Σ e^(−ε_r/T)), T the
    /// temperature of the energy gate (without it 1, and no τ). 1 is the plain selection.
    pub picks: usize,
    /// Gradient of the hard choice.
    pub estimator: Estimator,
    /// Temperature T > 0 of the estimator's softmax.
    pub temperature: f64,
    /// Preserve floor f in [0, 1], the share of the gradient that is spread evenly over the candidates.
    pub preserve_floor: f64,
    /// Temperature by the spread of a row's candidates, floor of the gate, and null slot of the gradient.
    pub gradient: CandidateGradient,
    /// Value floor λ in [0, 1], the share of the value gradient that goes to the candidates by weight.
    pub value_floor: f64,
    /// Initial threshold in units of `beta * (|q|^2 + |k|^2)` at unit RMS, that is `2 beta D`; the
    /// head learns it from there. None: a head never abstains. The energy gate needs it.
    pub threshold: Option<f64>,
    /// Whether the threshold of a query follows the number n of keys that it sees: τ + c ln n, with a slope c per head that
    /// is learned from 0. It needs a threshold.
    pub threshold_by_length: bool,
    /// Refinement rounds with learned weights; 1 is the plain selection.
    pub rounds: usize,
    /// Which of two wells the coherence point of a query and a key lies in.
    pub coherence: CoherenceMode,
}

impl GdConfig {
    /// The same with `candidates` candidates per query.
    #[must_use]
    pub fn with_candidates(self, candidates: usize) -> Self {
        Self { candidates, ..self }
    }

    /// The same with another score.
    #[must_use]
    pub fn with_score(self, score: Score) -> Self {
        Self { score, ..self }
    }

    /// The same with or without `beta |k|^2` in the prior of every key.
    #[must_use]
    pub fn with_norm_prior(self, norm_prior: bool) -> Self {
        Self { norm_prior, ..self }
    }

    /// The same with another tie break.
    #[must_use]
    pub fn with_tie(self, tie: TieBreak) -> Self {
        Self { tie, ..self }
    }

    /// The same with another gate.
    #[must_use]
    pub fn with_gate(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }

    /// The same with another least gate of a read.
    #[must_use]
    pub fn with_exclude_below(self, exclude_below: f64) -> Self {
        Self { exclude_below, ..self }
    }

    /// The same with another number of rows that a query reads.
    #[must_use]
    pub fn with_picks(self, picks: usize) -> Self {
        Self { picks, ..self }
    }

    /// The same with other options of the estimator's softmax.
    #[must_use]
    pub fn with_gradient(self, gradient: CandidateGradient) -> Self {
        Self { gradient, ..self }
    }

    /// The same with another estimator.
    #[must_use]
    pub fn with_estimator(self, estimator: Estimator) -> Self {
        Self { estimator, ..self }
    }

    /// The same with another temperature of the estimator's softmax.
    #[must_use]
    pub fn with_temperature(self, temperature: f64) -> Self {
        Self { temperature, ..self }
    }

    /// The same with another preserve floor.
    #[must_use]
    pub fn with_preserve_floor(self, preserve_floor: f64) -> Self {
        Self { preserve_floor, ..self }
    }

    /// The same with another value floor.
    #[must_use]
    pub fn with_value_floor(self, value_floor: f64) -> Self {
        Self { value_floor, ..self }
    }

    /// The same with another initial threshold, or none.
    #[must_use]
    pub fn with_threshold(self, threshold: Option<f64>) -> Self {
        Self { threshold, ..self }
    }

    /// The same with thresholds that follow the number of visible keys, or not.
    #[must_use]
    pub fn with_threshold_by_length(self, threshold_by_length: bool) -> Self {
        Self { threshold_by_length, ..self }
    }

    /// The same with another number of refinement rounds.
    #[must_use]
    pub fn with_rounds(self, rounds: usize) -> Self {
        Self { rounds, ..self }
    }

    /// The same with another coherence mode.
    #[must_use]
    pub fn with_coherence(self, coherence: CoherenceMode) -> Self {
        Self { coherence, ..self }
    }
}

impl Default for GdConfig {
    fn default() -> Self {
        Self {
            candidates: 8,
            score: Score::Energy,
            norm_prior: false,
            tie: TieBreak::First,
            gate: Gate::None,
            exclude_below: 0.5,
            picks: 1,
            estimator: Estimator::Candidates,
            temperature: 1.0,
            preserve_floor: 0.02,
            gradient: CandidateGradient::default(),
            value_floor: 0.0,
            threshold: None,
            threshold_by_length: false,
            rounds: 1,
            coherence: CoherenceMode::Global,
        }
    }
}

/// The parts of a [`Beacon`](crate::Beacon): convolution, memory and key prior.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct BeaconConfig {
    /// Width of the causal convolution before the projections; 1 for none.
    pub conv_width: usize,
    /// Gated running averages per head; 0 for no memory.
    pub averages: usize,
    /// Whether keys have a learned prior.
    pub prior: bool,
    /// Protected keys per query, those of greatest prior among the visible, which are candidates in any case: 0, 1, 2, 4,
    /// 8, 16, 32 or 64. They need the prior.
    pub protected: usize,
    /// Conditional protection of the protected candidates.
    pub barrier: Option<Barrier>,
}

impl Default for BeaconConfig {
    fn default() -> Self {
        Self { conv_width: 4, averages: 2, prior: true, protected: 0, barrier: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_keys_have_the_values_of_new_and_unknown_keys_are_refused() {
        let sizes =
            r#""hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16"#;
        let read = |text: String| serde_json::from_str::<AttentionConfig>(&text);
        assert_eq!(read(format!("{{{sizes}}}")).unwrap(), AttentionConfig::new(64, 4, 16));
        let error = read(format!("{{{sizes}, \"windw\": 3}}")).unwrap_err().to_string();
        assert!(error.contains("windw"), "{error}");
        let config = AttentionConfig::new(64, 4, 16)
            .with_key_value_heads(2)
            .with_qk_norm(true)
            .with_window(8)
            .with_beacon(BeaconConfig::default())
            .with_gd(GdConfig::default().with_candidates(16).with_threshold(Some(1.0)));
        assert_eq!(read(serde_json::to_string(&config).unwrap()).unwrap(), config);
    }
}
