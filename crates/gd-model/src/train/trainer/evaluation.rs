//! Evaluations of the model in training.

use super::Trainer;
use crate::error::Result;
use crate::eval::{Evaluation, evaluate, observe};
use crate::model::Transformer;
use crate::train::step::StepEvaluation;

/// The number of windows of the validation text in the evaluation of a step. The end of a run measures all of it.
const EVAL_WINDOWS: usize = 32;

impl Trainer {
    /// Evaluates the model, and the averaged parameters if the run has them, on the first windows of the validation
    /// text. Compares the selections in the first batch with those of the last evaluation.
    ///
    /// # Errors
    /// An error of the device.
    pub fn evaluate(&mut self) -> Result<StepEvaluation> {
        let train = &self.recipe.train;
        let tokens = self.corpus.valid.head(EVAL_WINDOWS * train.context + 1);
        let mut selections = None;
        let size = (train.context, train.batch);
        let result = observe(&self.frozen, &tokens, tokens.len(), size, &self.device, |records| {
            selections.get_or_insert_with(|| records.iter().flat_map(|r| r.picks.iter().copied()).collect());
        })?;
        let averaged = self.ema.as_ref().map(|ema| {
            evaluate(ema.model(), &tokens, tokens.len(), train.context, train.batch, &self.device)
        });
        Ok(StepEvaluation {
            loss: result.loss,
            loss_ema: averaged.transpose()?.map(|result| result.loss),
            heads: result.heads,
            churn: self.churn.update(selections.unwrap_or_default()),
        })
    }

    /// Evaluates the model on the whole validation text.
    ///
    /// # Errors
    /// An error of the device.
    pub fn validate(&self) -> Result<Evaluation> {
        self.validate_model(&self.frozen)
    }

    /// Evaluates the averaged parameters, if the run has them, on the whole validation text.
    ///
    /// # Errors
    /// An error of the device.
    pub fn validate_ema(&self) -> Result<Option<Evaluation>> {
        self.ema.as_ref().map(|ema| self.validate_model(ema.model())).transpose()
    }

    fn validate_model(&self, model: &Transformer) -> Result<Evaluation> {
        let train = &self.recipe.train;
        evaluate(model, &self.corpus.valid, self.corpus.valid_bytes, train.context, train.batch, &self.device)
    }
}
