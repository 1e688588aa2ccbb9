//! Stand-in for the operators until they land.
use candle_core::Tensor;
use gd_kernels::{Barrier, Candidates, CoherenceMode, Error, Estimator, Gate, Result, Score};

pub struct Select<'a> {
    pub beta: &'a Tensor,
    pub prior: Option<&'a Tensor>,
    pub score: Score,
    pub threshold: Option<&'a Tensor>,
    pub alpha: Option<&'a Tensor>,
    pub gate: Gate,
    pub estimator: Estimator,
    pub temperature: f64,
    pub preserve_floor: f64,
    pub value_floor: f64,
    pub hardness: f64,
    pub barrier: Option<Barrier>,
    pub rounds: Option<&'a Tensor>,
    pub coherence: CoherenceMode,
}
impl<'a> Select<'a> {
    pub fn new(beta: &'a Tensor) -> Self {
        Self {
            beta,
            prior: None,
            score: Score::Energy,
            threshold: None,
            alpha: None,
            gate: Gate::None,
            estimator: Estimator::Candidates,
            temperature: 1.0,
            preserve_floor: 0.0,
            value_floor: 0.0,
            hardness: 1.0,
            barrier: None,
            rounds: None,
            coherence: CoherenceMode::Global,
        }
    }
}
pub struct Selected {
    pub y: Tensor,
    pub index: Tensor,
    pub energy: Tensor,
    pub margin: Tensor,
    pub gate: Tensor,
    pub coherence: Option<Tensor>,
}
pub fn select(_q: &Tensor, _k: &Tensor, _v: &Tensor, _c: &Candidates, _s: &Select) -> Result<Selected> {
    Err(Error::Unsupported("pending".into()))
}
