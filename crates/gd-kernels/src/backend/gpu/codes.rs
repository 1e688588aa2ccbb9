//! Conversion of options to the codes that the kernels take.

use crate::backend::gpu::params::{CoherenceCode, EstimatorCode, ScoreCode, TieCode};
use crate::error::{Error, Result};
use crate::options::{CoherenceMode, Estimator, Score, TieBreak};

impl From<Score> for ScoreCode {
    fn from(score: Score) -> Self {
        match score {
            Score::Energy => Self::Energy,
            Score::Dot => Self::Dot,
        }
    }
}

impl From<TieBreak> for TieCode {
    fn from(tie: TieBreak) -> Self {
        match tie {
            TieBreak::First => Self::First,
            TieBreak::Last => Self::Last,
        }
    }
}

impl From<CoherenceMode> for CoherenceCode {
    fn from(mode: CoherenceMode) -> Self {
        match mode {
            CoherenceMode::Global => Self::Global,
            CoherenceMode::Passage => Self::Passage,
        }
    }
}

impl TryFrom<Estimator> for EstimatorCode {
    type Error = Error;

    /// A blend is hardness 0, for which the estimator has no effect.
    fn try_from(estimator: Estimator) -> Result<Self> {
        match estimator {
            Estimator::Candidates | Estimator::Blend => Ok(Self::Candidates),
            Estimator::Winner => Ok(Self::Winner),
            Estimator::Reinmax => Ok(Self::Reinmax),
            Estimator::Dense => Err(Error::Unsupported(
                "select: the dense estimator on a GPU; the other estimators are supported".into(),
            )),
        }
    }
}
