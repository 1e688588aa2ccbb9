//! Options that operators, plans and the reference share.

use serde::{Deserialize, Serialize};

/// How a key is scored for a query (q, k of length D; b the key prior).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Score {
    /// Selection energy `eps = beta * |q - k|^2 - b`.
    #[default]
    Energy,
    /// Plain dot product, `eps = -beta * <q, k> - b`, for models trained with one.
    Dot,
}

/// Which of several keys with the same energy is selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum TieBreak {
    /// The least index.
    #[default]
    First,
    /// The greatest index: under a causal mask, the most recent.
    Last,
}

/// How a scan finds its candidates. The result is the same, to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Every score in the accumulator type.
    #[default]
    Native,
    /// Scores of 8-bit integers with an error bound decide which keys can be candidates; those are
    /// scored again in the accumulator type. For f32, f16 and bf16, on the CPU and on CUDA, there with at
    /// most 32 candidates.
    Certified,
}

/// The gradient estimator of the hard choice. With `p` the softmax of `-eps / T` over
/// the candidates and the null slot (energy: the threshold), `a_j = <dy, v_j>`, `a_null = 0` and
/// `J(p)a = p * (a - <p, a>)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Estimator {
    /// Scores: `J(p~)a` with `p~ = (1 - f) p + f / |C|` over the candidates. Values:
    /// `((1 - lambda) * [j = j*] + lambda * p~_j) dy`.
    #[default]
    Candidates,
    /// Scores only through the consistency gate, values only through the winner.
    Winner,
    /// `Candidates` over all keys, O(N * M): the reference for the others.
    Dense,
    /// Scores: `2 J((p + D) / 2) a - J(p) a / 2`, D the one-hot choice. Values as `Candidates`.
    Reinmax,
    /// The forward pass itself is the soft mixture over the candidates; its exact gradient.
    Blend,
}

/// How the estimators of a hard choice form their softmax and its scale. The default is a fixed temperature, the null slot
/// among the candidates, and the gate as it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct CandidateGradient {
    /// Factor c >= 0 of the spread of a row's candidates: the temperature of the row is `T + c * (mean eps - min eps)`
    /// over its candidates. The temperature is a constant of the gradient.
    pub temperature_spread: f64,
    /// Least factor in [0, 1] of the gradient of the scores. The energy gate rho scales it, so that a head that has
    /// closed would learn nothing; with a floor f the factor is `max(rho, f)`.
    pub gate_floor: f64,
    /// Whether the softmax has the null slot, whose energy is the threshold.
    pub null: bool,
}

impl Default for CandidateGradient {
    fn default() -> Self {
        Self { temperature_spread: 0.0, gate_floor: 0.0, null: true }
    }
}

/// The factor of the selected value row.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Gate {
    /// No gate: `y = v_j*` (gamma = 0).
    #[default]
    None,
    /// `y = rho * v_j*` with `rho = sigmoid((tau - eps_j*) / T)` (gamma = 1); needs a threshold.
    Energy {
        /// The temperature T > 0.
        temperature: f64,
    },
    /// The energy gate with a threshold that each query measures from its runner-up: `y = rho * v_j*` with
    /// `rho = sigmoid((tau + eps_2 - eps_1) / T)`, where `eps_1` is the energy of the winner and `eps_2` that of the next
    /// candidate, so that a clearer choice counts more. `rho` is 1 for a query with a single candidate. With R picks
    /// `eps_2` is the energy of the first candidate that is not read. Needs a threshold and the candidates in order of
    /// their energies: it excludes rounds and barrier.
    Margin {
        /// The temperature T > 0.
        temperature: f64,
    },
    /// `y = rho * v_j*` with `rho = exp(-E*)`, the mixture density at the coherence point: 1 where
    /// query and key coincide, `max(alpha, 1 - alpha)` far away. Needs alpha, and is the gate
    /// through which alpha learns.
    Coherence,
}

impl Gate {
    /// The temperature T of a gate `sigmoid((tau - eps) / T)`; none for other gates.
    pub fn temperature(self) -> Option<f64> {
        match self {
            Self::Energy { temperature } | Self::Margin { temperature } => Some(temperature),
            Self::None | Self::Coherence => None,
        }
    }

    /// By how much the energy of a candidate that can be selected may exceed the threshold tau of the query. With the energy
    /// and margin gates, `rho = sigmoid((tau - eps) / T) >= exclude_below` is
    /// `eps <= tau + T ln((1 - exclude_below) / exclude_below)`; without them the limit is tau.
    pub fn admission(self, exclude_below: f64) -> f64 {
        self.temperature().map_or(0.0, |t| t * ((1.0 - exclude_below) / exclude_below).ln())
    }
}

/// Which root of the coherence equation is used for a pair whose energy has two wells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum CoherenceMode {
    /// The global minimum of the energy; the tie at alpha = 1/2 goes to the query.
    #[default]
    Global,
    /// The root that bisection on [0, 1] meets first (at alpha = 1/2 always u = 1/2, a saddle for
    /// t > 2): as the public reference demo computes it.
    Passage,
}

/// Conditional protection of the protected candidate with the lowest energy (score `s = -eps`).
///
/// With `w` its softmax weight and `gap = greatest other score - s`, the barrier activates if
/// `w < floor and gap <= margin + slack`, or `gap <= margin` and the normalised entropy of the
/// softmax is at least `entropy_trigger`. It then adds `strength * max(0, margin - gap)` to `s`,
/// and if the weight is still below `floor` raises `s` to
/// `ln(floor / (1 - floor)) + logsumexp(others)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schemars", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Barrier {
    /// Least softmax weight of an activated candidate, in (0, 1).
    pub floor: f64,
    /// Greatest gap that a lift closes.
    pub margin: f64,
    /// Lift per unit of gap below the margin, >= 0.
    pub strength: f64,
    /// Normalised entropy in [0, 1] from which a near tie counts as contested.
    pub entropy_trigger: f64,
    /// Extra gap allowed to a candidate below the floor.
    pub slack: f64,
}
