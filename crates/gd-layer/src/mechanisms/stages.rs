//! The stages of an attention mechanism: score, mask, warp, support, normalise, aggregate.
//!
//! Shapes: scores and weights `[.., N, M]` (N queries, M keys), for heads `[B, H, N, M]`. Sets of keys are u8 tensors
//! of the same shape, 1 for the keys in the set.

use std::fmt;

use candle_core::{Result, Tensor};

use super::inputs::{Inputs, Outputs};
use super::{dot, masks, softmax};

/// One forward pass through the stages: the inputs, and what stages return besides their result.
#[derive(Debug)]
pub struct Run<'a> {
    /// The tensors of the mechanism.
    pub inputs: &'a Inputs,
    /// Further outputs of the stages.
    pub outputs: Outputs,
}

/// Scores every key for every query.
pub trait Score {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// The scores `[.., N, M]`.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    fn score(&self, run: &mut Run) -> Result<Tensor>;
}

/// Decides which keys a query may see.
pub trait Mask {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// The visible keys, u8 in the shape of the scores.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    fn mask(&self, scores: &Tensor, run: &mut Run) -> Result<Tensor>;
}

/// Changes scores by means of positions, numbers of keys, other heads or noise.
pub trait Warp {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// The new scores, in the same shape. Scores of invisible keys have no meaning.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    fn warp(&self, scores: &Tensor, visible: &Tensor, run: &mut Run) -> Result<Tensor>;
}

/// Chooses the keys that may get a weight, by their scores.
pub trait Support {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// A subset of the visible keys, u8 in the shape of the scores. Without gradient.
    ///
    /// # Errors
    /// Sizes that do not fit.
    fn support(&self, scores: &Tensor, visible: &Tensor, run: &mut Run) -> Result<Tensor>;
}

/// The weights of the keys.
#[derive(Debug, Clone)]
pub struct Normalised {
    /// `[.., N, M]`, 0 outside the support.
    pub weights: Tensor,
    /// The weight of no key at all `[.., N, 1]`, where the mechanism has one: with it, a row with a key sums to 1.
    pub null: Option<Tensor>,
}

impl From<Tensor> for Normalised {
    fn from(weights: Tensor) -> Self {
        Self { weights, null: None }
    }
}

/// Turns scores into weights.
pub trait Normalise {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// The weights; all 0 in a row without support.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    fn normalise(&self, scores: &Tensor, support: &Tensor, run: &mut Run) -> Result<Normalised>;
}

/// Combines the values.
pub trait Aggregate {
    /// A short name for the table of mechanisms.
    fn name(&self) -> &'static str;
    /// The output of the mechanism.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    fn aggregate(&self, weights: &Tensor, run: &mut Run) -> Result<Tensor>;
}

/// A mechanism as a sequence of stages. [`Stages::default`] is softmax attention; a mechanism replaces the stages in
/// which it differs.
pub struct Stages {
    /// The first stage.
    pub score: Box<dyn Score>,
    /// The second stage.
    pub mask: Box<dyn Mask>,
    /// The third stage; none for the scores themselves.
    pub warp: Option<Box<dyn Warp>>,
    /// The fourth stage; none for all visible keys.
    pub support: Option<Box<dyn Support>>,
    /// The fifth stage.
    pub normalise: Box<dyn Normalise>,
    /// The last stage.
    pub aggregate: Box<dyn Aggregate>,
}

impl Default for Stages {
    fn default() -> Self {
        Self {
            score: Box::new(dot::ScaledDot),
            mask: Box::new(masks::Given),
            warp: None,
            support: None,
            normalise: Box::new(softmax::Normaliser),
            aggregate: Box::new(dot::Values),
        }
    }
}

impl Stages {
    /// Runs all stages. The outputs are `scores` (before masking), `weights`, `null` if there is such a weight, `out`,
    /// and those of the stages.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    pub fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let mut run = Run { inputs, outputs: Outputs::default() };
        let scores = self.score.score(&mut run)?;
        run.outputs.insert("scores", scores.clone());
        let visible = self.mask.mask(&scores, &mut run)?;
        let scores = match &self.warp {
            Some(warp) => warp.warp(&scores, &visible, &mut run)?,
            None => scores,
        };
        let support = match &self.support {
            Some(support) => support.support(&scores, &visible, &mut run)?,
            None => visible,
        };
        let Normalised { weights, null } = self.normalise.normalise(&scores, &support, &mut run)?;
        let out = self.aggregate.aggregate(&weights, &mut run)?;
        run.outputs.insert("weights", weights);
        run.outputs.insert("out", out);
        if let Some(null) = null {
            run.outputs.insert("null", null);
        }
        Ok(run.outputs)
    }
}

impl fmt::Display for Stages {
    /// The names of the stages.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {} > ", self.score.name(), self.mask.name())?;
        if let Some(warp) = &self.warp {
            write!(f, "{} > ", warp.name())?;
        }
        if let Some(support) = &self.support {
            write!(f, "{} > ", support.name())?;
        }
        write!(f, "{} > {}", self.normalise.name(), self.aggregate.name())
    }
}

/// A mechanism as a function of its inputs.
pub type Attend<'a> = Box<dyn Fn(&Inputs) -> Result<Outputs> + 'a>;

/// How a mechanism is computed.
pub enum Computation<'a> {
    /// By stages.
    Stages(Stages),
    /// As a whole, where stages do not describe it.
    Whole {
        /// The steps in words, for the table of mechanisms.
        steps: &'static str,
        /// The outputs for the inputs.
        attend: Attend<'a>,
    },
}

impl<'a> Computation<'a> {
    /// A computation as a whole.
    pub fn whole(steps: &'static str, attend: impl Fn(&Inputs) -> Result<Outputs> + 'a) -> Self {
        Self::Whole { steps, attend: Box::new(attend) }
    }

    /// Runs the computation.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit.
    pub fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        match self {
            Self::Stages(stages) => stages.attend(inputs),
            Self::Whole { attend, .. } => attend(inputs),
        }
    }
}

impl fmt::Debug for Computation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Computation<'_> {
    /// The names of the stages, or the steps.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stages(stages) => stages.fmt(f),
            Self::Whole { steps, .. } => f.write_str(steps),
        }
    }
}
