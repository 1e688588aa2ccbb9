//! The options of `select`.

use candle_core::Tensor;

use crate::options::{Barrier, CandidateGradient, CoherenceMode, Estimator, Gate, Score, TieBreak};

/// The options of a selection among candidates.
///
/// [`Select::new`] gives hard selection with the gradient of [`Estimator::Candidates`] at temperature 1, without
/// threshold, gate or floors; the `with_` methods set the other options.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::{Estimator, Select};
///
/// let beta = Tensor::new(&[1f32, 1.0], &Device::Cpu)?;
/// let threshold = Tensor::new(&[4f32, 4.0], &Device::Cpu)?;
/// let select =
///     Select::new(&beta).with_threshold(&threshold).with_estimator(Estimator::Reinmax).with_temperature(0.5);
/// assert_eq!(select.hardness, 1.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Select<'a> {
    /// Inverse bandwidth per query head `[Hq]`, > 0.
    pub beta: &'a Tensor,
    /// The key prior of the scan `[B|1, Hq|Hk, M]`.
    pub prior: Option<&'a Tensor>,
    /// The score of the scan.
    pub score: Score,
    /// Which of several candidates with the same energy wins.
    pub tie: TieBreak,
    /// Threshold tau per query head `[Hq]` or per query `[B, Hq, N]`: candidates with more energy are excluded, or with the
    /// energy gate those whose gate is below `exclude_below`. The margin gate adds it to the energy of the runner-up.
    pub threshold: Option<&'a Tensor>,
    /// Weight of the query's well per query head `[Hq]`, in (0, 1); when given, coherence points are resolved.
    pub alpha: Option<&'a Tensor>,
    /// The factor of the selected row.
    pub gate: Gate,
    /// Least energy or margin gate rho in [0, 1) of a candidate that can be selected. At 0 none is excluded; at 1/2, the
    /// default, those whose energy exceeds the threshold. Without these gates it is not used.
    pub exclude_below: f64,
    /// Rows R in 1..=4 that a query reads: the first R candidates, with weights `e^(-eps_r / T) / (e^(-tau / T) + sum
    /// e^(-eps_r / T))`, T the temperature of the energy or margin gate. Without these T is 1 and there is no null. More than
    /// one pick excludes rounds, barrier and coherence gate, and has the gradient of `Candidates` or `Winner`.
    pub picks: usize,
    /// Gradient of the choice.
    pub estimator: Estimator,
    /// Temperature T > 0 of the estimator's softmax.
    pub temperature: f64,
    /// Preserve floor f in [0, 1]: the share of the estimator's softmax that is spread evenly over the candidates.
    pub preserve_floor: f64,
    /// Temperature, scale and null slot of the estimator's softmax.
    pub gradient: CandidateGradient,
    /// Value floor lambda in [0, 1]: the share of the values' gradient that is weighted by the softmax instead of given
    /// to the winner.
    pub value_floor: f64,
    /// Share h in [0, 1] of the hard forward pass: `y = (1 - h) blend + h hard`.
    pub hardness: f64,
    /// Conditional protection of the protected candidates.
    pub barrier: Option<Barrier>,
    /// Weights of the refinement rounds `[Hq, R]`; without them one round of weight 1.
    pub rounds: Option<&'a Tensor>,
    /// Which of two wells the coherence point of a query and a key lies in.
    pub coherence: CoherenceMode,
}

impl<'a> Select<'a> {
    /// Hard selection with inverse bandwidths `beta` `[Hq]`; see [`Select`].
    pub fn new(beta: &'a Tensor) -> Self {
        Self {
            beta,
            prior: None,
            score: Score::default(),
            tie: TieBreak::default(),
            threshold: None,
            alpha: None,
            gate: Gate::default(),
            exclude_below: 0.5,
            picks: 1,
            estimator: Estimator::default(),
            temperature: 1.0,
            preserve_floor: 0.0,
            gradient: CandidateGradient::default(),
            value_floor: 0.0,
            hardness: 1.0,
            barrier: None,
            rounds: None,
            coherence: CoherenceMode::default(),
        }
    }

    /// Sets the key prior `[B|1, Hq|Hk, M]`.
    #[must_use]
    pub fn with_prior(mut self, prior: impl Into<Option<&'a Tensor>>) -> Self {
        self.prior = prior.into();
        self
    }

    /// Sets how keys are scored.
    #[must_use]
    pub fn with_score(mut self, score: Score) -> Self {
        self.score = score;
        self
    }

    /// Sets which of several candidates with the same energy wins.
    #[must_use]
    pub fn with_tie(mut self, tie: TieBreak) -> Self {
        self.tie = tie;
        self
    }

    /// Sets the threshold per query head `[Hq]` or per query `[B, Hq, N]`.
    #[must_use]
    pub fn with_threshold(mut self, threshold: impl Into<Option<&'a Tensor>>) -> Self {
        self.threshold = threshold.into();
        self
    }

    /// Sets the weight of the query's well per query head `[Hq]`, in (0, 1).
    #[must_use]
    pub fn with_alpha(mut self, alpha: impl Into<Option<&'a Tensor>>) -> Self {
        self.alpha = alpha.into();
        self
    }

    /// Sets the factor of the selected row.
    #[must_use]
    pub fn with_gate(mut self, gate: Gate) -> Self {
        self.gate = gate;
        self
    }

    /// Sets the least energy gate in [0, 1) of a candidate that can be selected.
    #[must_use]
    pub fn with_exclude_below(mut self, exclude_below: f64) -> Self {
        self.exclude_below = exclude_below;
        self
    }

    /// Sets the number of rows that a query reads, 1..=4.
    #[must_use]
    pub fn with_picks(mut self, picks: usize) -> Self {
        self.picks = picks;
        self
    }

    /// Sets temperature, scale and null slot of the estimator's softmax.
    #[must_use]
    pub fn with_gradient(mut self, gradient: CandidateGradient) -> Self {
        self.gradient = gradient;
        self
    }

    /// Sets the gradient of the choice.
    #[must_use]
    pub fn with_estimator(mut self, estimator: Estimator) -> Self {
        self.estimator = estimator;
        self
    }

    /// Sets the temperature T > 0 of the estimator's softmax.
    #[must_use]
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets the preserve floor in [0, 1].
    #[must_use]
    pub fn with_preserve_floor(mut self, preserve_floor: f64) -> Self {
        self.preserve_floor = preserve_floor;
        self
    }

    /// Sets the value floor in [0, 1].
    #[must_use]
    pub fn with_value_floor(mut self, value_floor: f64) -> Self {
        self.value_floor = value_floor;
        self
    }

    /// Sets the share of the hard forward pass in [0, 1].
    #[must_use]
    pub fn with_hardness(mut self, hardness: f64) -> Self {
        self.hardness = hardness;
        self
    }

    /// Sets the conditional protection of the protected candidates.
    #[must_use]
    pub fn with_barrier(mut self, barrier: impl Into<Option<Barrier>>) -> Self {
        self.barrier = barrier.into();
        self
    }

    /// Sets the weights of the refinement rounds `[Hq, R]`.
    #[must_use]
    pub fn with_rounds(mut self, rounds: impl Into<Option<&'a Tensor>>) -> Self {
        self.rounds = rounds.into();
        self
    }

    /// Sets which of two wells the coherence point of a query and a key lies in.
    #[must_use]
    pub fn with_coherence(mut self, coherence: CoherenceMode) -> Self {
        self.coherence = coherence;
        self
    }
}

/// The options of a selection that are not tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(
    not(feature = "gpu"),
    allow(unreachable_pub, reason = "builds for a GPU export it to tests of launches")
)]
pub struct Rule {
    /// How keys are scored.
    pub score: Score,
    /// Which of several candidates with the same energy wins.
    pub tie: TieBreak,
    /// Gradient of the choice.
    pub estimator: Estimator,
    /// Temperature of the estimator's softmax.
    pub temperature: f64,
    /// Preserve floor.
    pub preserve_floor: f64,
    /// Temperature, scale and null slot of the estimator's softmax.
    pub gradient: CandidateGradient,
    /// Value floor.
    pub value_floor: f64,
    /// Share of the hard forward pass.
    pub hardness: f64,
    /// Temperature of the energy or margin gate; none without these gates.
    pub gate_temperature: Option<f64>,
    /// By how much the energy of a candidate that can be selected may exceed the threshold: -T logit of `exclude_below`
    /// with the energy or margin gate, +inf to exclude none, 0 without these gates.
    pub admission: f64,
    /// Rows that a query reads.
    pub picks: usize,
    /// Conditional protection.
    pub barrier: Option<Barrier>,
    /// Which of two wells the coherence point of a query and a key lies in.
    pub coherence: CoherenceMode,
}

impl Rule {
    /// The options of `select` that are not tensors.
    pub(crate) fn of(select: &Select) -> Self {
        Self {
            score: select.score,
            tie: select.tie,
            estimator: select.estimator,
            temperature: select.temperature,
            preserve_floor: select.preserve_floor,
            gradient: select.gradient,
            value_floor: select.value_floor,
            hardness: select.hardness,
            gate_temperature: select.gate.temperature(),
            admission: select.gate.admission(select.exclude_below),
            picks: select.picks,
            barrier: select.barrier,
            coherence: select.coherence,
        }
    }

    /// The share of the hard forward pass; a blend has none.
    pub(crate) fn hard_share(&self) -> f64 {
        if self.estimator == Estimator::Blend { 0.0 } else { self.hardness }
    }
}

impl Default for Rule {
    fn default() -> Self {
        Self {
            score: Score::default(),
            tie: TieBreak::default(),
            estimator: Estimator::default(),
            temperature: 1.0,
            preserve_floor: 0.0,
            gradient: CandidateGradient::default(),
            value_floor: 0.0,
            hardness: 1.0,
            gate_temperature: None,
            admission: 0.0,
            picks: 1,
            barrier: None,
            coherence: CoherenceMode::default(),
        }
    }
}
