//! What an attention layer is made of. Every struct reads and writes itself as JSON; unknown keys
//! are errors.

use gd_kernels::{Barrier, CoherenceMode, Estimator, Gate, Score, TieBreak};
use serde::{Deserialize, Serialize};

/// Shape and parts of an attention layer, softmax or selecting.
#[derive(Debug, Clone, PartialEq)]
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
    pub attention_bias: bool,
    /// Whether `o_proj` has a bias.
    pub output_bias: bool,
    /// Whether q and k pass an RMSNorm per head (weights `q_norm`, `k_norm`) before the rotation.
    pub qk_norm: bool,
    /// Epsilon of that norm.
    pub rms_norm_eps: f64,
    /// Whether the heads' output passes an elementwise sigmoid gate before `o_proj` (G1).
    pub output_gate: bool,
    /// Keys, counted back from its own position, that a query sees at most; none: as many as the pass allows.
    pub window: Option<usize>,
    /// The preserving half in front of the heads; none leaves them bare.
    pub beacon: Option<BeaconConfig>,
    /// How a selecting layer selects; a softmax layer does not read it.
    pub gd: GdConfig,
}

impl AttentionConfig {
    /// Plain multi-head attention: as many key-value heads as query heads, no biases, QK norm, gate, window or
    /// Beacon, [`GdConfig::default`]. Its weights are those of a Llama layer and the few under `gd`.
    pub fn new(hidden_size: usize, num_attention_heads: usize, head_dim: usize) -> Self {
        Self {
            hidden_size,
            num_attention_heads,
            num_key_value_heads: num_attention_heads,
            head_dim,
            attention_bias: false,
            output_bias: false,
            qk_norm: false,
            rms_norm_eps: 1e-5,
            output_gate: false,
            window: None,
            beacon: None,
            gd: GdConfig::default(),
        }
    }

    /// The same with `heads` key-value heads (grouped-query attention).
    #[must_use]
    pub fn with_key_value_heads(self, heads: usize) -> Self {
        Self { num_key_value_heads: heads, ..self }
    }

    /// The same with or without an RMSNorm on q and k per head.
    #[must_use]
    pub fn with_qk_norm(self, qk_norm: bool) -> Self {
        Self { qk_norm, ..self }
    }

    /// The same with a sliding window of `keys` keys.
    #[must_use]
    pub fn with_window(self, keys: usize) -> Self {
        Self { window: Some(keys), ..self }
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
        if self.window == Some(0) {
            candle_core::bail!("a window of 0 keys lets no query see any");
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

/// How a head selects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GdConfig {
    /// Candidates kept per query, one of [`gd_kernels::CANDIDATES`].
    pub candidates: usize,
    /// How keys are scored.
    pub score: Score,
    /// Whether `beta |k|^2` is added to the prior of every key, so that energies order keys as dot products
    /// do.
    pub norm_prior: bool,
    /// Which of equals wins.
    pub tie: TieBreak,
    /// What scales the selected row.
    pub gate: Gate,
    /// Gradient of the choice.
    pub estimator: Estimator,
    /// Temperature of the estimator's softmax.
    pub temperature: f64,
    /// Preserve floor f.
    pub preserve_floor: f64,
    /// Value floor lambda.
    pub value_floor: f64,
    /// Initial threshold in units of `beta * (|q|^2 + |k|^2)` at unit RMS, that is `2 beta D`; the
    /// head learns it from there. None: a head never abstains.
    pub threshold: Option<f64>,
    /// Refinement rounds with learned weights; 1 is the plain selection.
    pub rounds: usize,
    /// Which well stands for a pair with two.
    pub coherence: CoherenceMode,
}

impl Default for GdConfig {
    fn default() -> Self {
        Self {
            candidates: 8,
            score: Score::Energy,
            norm_prior: false,
            tie: TieBreak::First,
            gate: Gate::None,
            estimator: Estimator::Candidates,
            temperature: 1.0,
            preserve_floor: 0.02,
            value_floor: 0.0,
            threshold: None,
            rounds: 1,
            coherence: CoherenceMode::Global,
        }
    }
}

/// The preserving half: what keeps minority candidates in play.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BeaconConfig {
    /// Width of the causal convolution before the projections; 1 leaves it out.
    pub conv_width: usize,
    /// Gated running averages per head; 0 leaves the memory out.
    pub averages: usize,
    /// Whether keys carry a learned prior b.
    pub prior: bool,
    /// Keys that stay candidates because their prior is among the greatest visible: 0, or one of
    /// [`gd_kernels::CANDIDATES`].
    pub protected: usize,
    /// Conditional lift of the protected candidates.
    pub barrier: Option<Barrier>,
}

impl Default for BeaconConfig {
    fn default() -> Self {
        Self { conv_width: 4, averages: 2, prior: true, protected: 0, barrier: None }
    }
}
