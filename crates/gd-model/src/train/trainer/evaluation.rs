//! Evaluations of the model in training.

use super::Trainer;
use crate::data::Tokens;
use crate::error::{Error, Result};
use crate::eval::reading::{ReadingReport, measure_reading};
use crate::eval::{Evaluation, evaluate, observe};
use crate::model::Transformer;
use crate::train::schedule::ScheduledValues;
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
        let mut tokens = self.corpus.valid.head(EVAL_WINDOWS * train.context + 1);
        if tokens.len() == tokens.document_count() {
            // Documents of one token each have nothing to predict.
            tokens = self.corpus.valid.clone();
        }
        let mut selections = None;
        let size = (train.context, train.batch);
        let result = observe(&self.frozen, &tokens, tokens.len(), size, &self.device, |observed| {
            let picks = || observed.stats.iter().flat_map(|r| r.picks.iter().copied()).collect();
            selections.get_or_insert_with(picks);
            Ok(())
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

    /// Measures what the reads of the heads are worth on the whole validation text, with n-grams of `ngram` tokens.
    ///
    /// # Errors
    /// As [`measure_reading`].
    pub fn measure_reading(&self, ngram: usize) -> Result<ReadingReport> {
        let size = (self.recipe.train.context, self.recipe.train.batch);
        measure_reading(&self.frozen, &self.corpus.valid, size, ngram, &self.device)
    }

    /// Whether there is a validation text.
    pub fn has_validation(&self) -> bool {
        !self.corpus.valid.is_empty()
    }

    /// Checks that the model gives a finite loss, for a text of two tokens.
    ///
    /// # Errors
    /// [`Error::NotFinite`], or the refusal of a parameter by an operator.
    fn check_parameters(&self) -> Result<()> {
        let tokens = Tokens::from(self.corpus.train.read(0..2));
        evaluate(&self.frozen, &tokens, tokens.len(), 1, 1, &self.device).map(|_| ())
    }

    /// Checks that the parameters can be computed with, so that a checkpoint of them is worth saving.
    ///
    /// # Errors
    /// [`Error::Diverged`].
    pub(crate) fn require_usable(&self) -> Result<()> {
        self.check_parameters().map_err(|e| self.diagnosed(e))
    }

    /// The error of a step: [`Error::Diverged`] with the values of the last step if the parameters are the cause, or the
    /// same error.
    pub(crate) fn diagnosed(&self, error: Error) -> Error {
        let done = self.step;
        let last_lr = done.checked_sub(1).map(|last| ScheduledValues::at(&self.recipe.train, last).lr);
        match error {
            Error::Diverged { step, loss, reason, checkpoint, .. } => {
                let lr = step.checked_sub(1).map(|at| ScheduledValues::at(&self.recipe.train, at).lr);
                Error::Diverged { step, loss, lr, reason, checkpoint }
            }
            // The operators worked with the first parameters, so the updates made the difference. If they fail for two
            // tokens as well, it is not the memory of the device.
            _ if done > 0
                && (matches!(error, Error::NotFinite { .. }) || self.check_parameters().is_err()) =>
            {
                let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
                Error::Diverged { step: done, loss: self.last_loss, lr: last_lr, reason, checkpoint: None }
            }
            _ => error,
        }
    }

    /// Evaluates the model on the whole validation text.
    ///
    /// # Errors
    /// No validation text, or an error of the device.
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
