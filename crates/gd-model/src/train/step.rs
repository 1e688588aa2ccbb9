//! The report of a training step.

use serde::Serialize;

use crate::eval::HeadStats;

/// The report of a training step. Its serialized form is a line of the log.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// The number of steps done, this one included.
    pub step: u64,
    /// The number of steps of the whole run.
    pub total: u64,
    /// The training loss in nats per token. In a step that aligns layers with those of a teacher it is the mean squared
    /// error of the layers relative to the mean square of the teacher's.
    pub loss: f64,
    /// Whether the step aligned layers with those of the teacher. `None` in a run without a teacher.
    #[serde(rename = "aligned", skip_serializing_if = "Option::is_none")]
    pub layer_alignment: Option<bool>,
    /// The norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// The number of updates that have been skipped so far.
    pub skipped: u64,
    /// Why the update of this step was skipped, if it was. The log has it as an event of its own.
    #[serde(skip)]
    pub skip: Option<String>,
    /// Whether no token was predicted in this step, because its documents have a single token each. Its loss is NaN then.
    #[serde(skip)]
    pub is_empty: bool,
    /// The weight of the hard forward pass, in [0, 1].
    pub hardness: f64,
    /// The number of candidates per query, if the run schedules it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidates: Option<usize>,
    /// The number of training tokens so far.
    pub tokens: u64,
    /// Training tokens per second in this step, without evaluation.
    pub tokens_per_second: f64,
    /// The expected time to the end of the run in seconds. Not logged.
    #[serde(skip)]
    pub seconds_left: f64,
    /// The loss on the start of the validation text in nats per token, if this step was evaluated.
    pub valid_loss: Option<f64>,
    /// The same for the averaged parameters, if the run has them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss_ema: Option<f64>,
    /// Statistics of the heads in this evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadStats>,
    /// The fraction of the selections in the first batch of this evaluation that differ from the last evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub churn: Option<f64>,
}

/// The result of [`Trainer::evaluate`](super::Trainer::evaluate).
#[derive(Debug, Clone, PartialEq)]
pub struct StepEvaluation {
    /// The loss in nats per token.
    pub loss: f64,
    /// The loss with the averaged parameters, if the run has them.
    pub loss_ema: Option<f64>,
    /// Statistics of the heads.
    pub heads: HeadStats,
    /// The fraction of the selections that differ from the last evaluation; `None` in the first one.
    pub churn: Option<f64>,
}

impl Step {
    /// Adds an evaluation to the report.
    pub fn record(&mut self, evaluation: StepEvaluation) {
        let StepEvaluation { loss, loss_ema, heads, churn } = evaluation;
        (self.valid_loss, self.valid_loss_ema) = (Some(loss), loss_ema);
        (self.heads, self.churn) = (Some(heads), churn);
    }
}
