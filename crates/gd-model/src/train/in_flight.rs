//! Steps that a GPU has been given and whose figures the host has not read yet.
//!
//! The host launches step s, update included, and then reads the figures of step s - 1, whose copy was queued before
//! step s: the device always has work. What the guard decides is decided on the device, by limits that the host gave it
//! when it knew all steps but the last; it learns of a skipped update one step late, and corrects the count of updates
//! then (the update in between was launched with the numbers of both cases).

use candle_core::Tensor;
use gd_kernels::adamw::{self, GradientSquares, PendingVerdict};

use super::trainer::{Gradients, Step, Trainer};
use crate::error::{Error, Result};
use crate::train::guard::Limit;
use crate::train::optimizer::{DeviceVerdict, Updated, squares};

/// A step that has been launched.
pub(super) struct Launched {
    /// Its figures, without those that are awaited.
    pub(super) step: Step,
    /// What only the device knows: loss and norm, and whether the update was skipped.
    pub(super) awaited: Option<Awaited>,
}

/// What tells about a step that is judged on the device.
pub(super) struct Awaited {
    judged: PendingVerdict,
    updated: Updated,
    squares: GradientSquares,
    /// Of the parameters with a gradient.
    names: Vec<String>,
    /// By which the device judges.
    limits: [Limit; 2],
}

impl Trainer {
    /// One step, and the figures that are known when it has been launched. On a GPU that runs ahead they are those of
    /// the step before, so that the device is never out of work: none after the first step, and two where this one
    /// ends with something that needs its outcome (a look at the validation text, a checkpoint, a sample, the end).
    /// Elsewhere they are those of this step.
    ///
    /// # Errors
    /// As [`Trainer::advance`], for any of these steps.
    pub fn proceed(&mut self) -> Result<Vec<Step>> {
        self.launch()?;
        self.known(usize::from(self.runs_ahead() && !self.pauses()))
    }

    /// The figures of all steps that have been launched and not been told.
    ///
    /// # Errors
    /// As [`Trainer::advance`].
    pub fn settle(&mut self) -> Result<Vec<Step>> {
        self.known(0)
    }

    /// Whether the host need not know the outcome of a step to launch the next: on a GPU, for AdamW alone. Other
    /// processes, Muon, an average of the parameters and a run that learns from a model take part in every update.
    pub fn runs_ahead(&self) -> bool {
        let alone = self.group.world() == 1 && self.ema.is_none() && self.original.is_none();
        !gd_kernels::on_cpu(&self.device) && alone && self.optimizer.runs_ahead()
    }

    /// Whether something follows this step that needs its outcome.
    fn pauses(&self) -> bool {
        let train = &self.recipe.train;
        let every = [Some(train.eval_every), Some(train.save_every()), train.sample_every];
        self.step == train.steps || every.into_iter().flatten().any(|n| self.step.is_multiple_of(n))
    }

    /// The figures of all launched steps but the last `behind` ones, the first of them first.
    pub(super) fn known(&mut self, behind: usize) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        while self.launched.len() > behind {
            let Some(launched) = self.launched.pop_front() else { break };
            steps.push(self.read(launched)?);
        }
        let train = &self.recipe.train;
        let looks = self.step.is_multiple_of(train.eval_every) || self.step == train.steps;
        if let Some(last) = steps.last_mut()
            && last.step == self.step
            && looks
            && self.group.leads()
        {
            let look = self.look()?;
            (last.valid_loss, last.valid_loss_ema) = (Some(look.seen.loss), look.averaged);
            (last.heads, last.churn) = (Some(look.seen.heads), look.churn);
        }
        Ok(steps)
    }

    /// Launches the update of this step behind its judgement, which the host learns later. The limits are those of
    /// the steps that the host knows by now: all before this one but the last.
    pub(super) fn update_ahead(
        &mut self,
        gradients: &Gradients,
        losses: &Tensor,
        lr: f64,
    ) -> Result<Awaited> {
        let vars = self.params.vars();
        let Some((squares, names)) = squares(&vars, &gradients.store)? else {
            return Err(Error::Invalid("a step without a gradient".into()));
        };
        let names = names.into_iter().map(str::to_owned).collect();
        let limits = self.guard.limits().map(Limit::rounded);
        let bounds = adamw::Limits {
            weight: gradients.weight,
            clip: self.recipe.train.clip,
            loss: limits[0].above as f32,
            norm: limits[1].above as f32,
        };
        let judged = squares.verdict(losses, &bounds)?;
        let last = self.launched.back().and_then(|launched| launched.awaited.as_ref());
        let previous = last.map(|awaited| (awaited.judged.tensor(), &awaited.updated));
        let verdict = DeviceVerdict { verdict: judged.tensor(), previous };
        let updated = self.optimizer.step_by_verdict(&gradients.store, lr, &verdict)?;
        Ok(Awaited { judged, updated, squares, names, limits })
    }

    /// The figures of a launched step; waits for them.
    pub(super) fn read(&mut self, launched: Launched) -> Result<Step> {
        let Launched { mut step, awaited } = launched;
        if let Some(Awaited { judged, updated, squares, names, limits }) = awaited {
            let verdict = judged.read()?;
            if self.device.is_metal() {
                // It reports commands that failed before the last ones only when it is waited for as a whole.
                self.device.synchronize()?;
            }
            (step.loss, step.grad_norm) = (f64::from(verdict.loss), f64::from(verdict.norm));
            if !verdict.applies() {
                self.optimizer.undo_step(&updated);
            }
            let judged = self.guard.judge_by(step.loss, step.grad_norm, &limits);
            step.skip = self
                .skipped(step.step, judged, || Ok(squares.first_not_finite()?.map(|at| names[at].clone())))?;
            if step.skip.is_some() == verdict.applies() {
                let Step { step, loss, grad_norm, .. } = step;
                return Err(Error::Invalid(format!(
                    "step {step}: device and guard judge a loss of {loss} and a norm of {grad_norm} differently"
                )));
            }
        }
        step.skipped = self.guard.skipped();
        let seconds = self.clock.elapsed().as_secs_f64();
        self.clock = std::time::Instant::now();
        self.seconds += seconds;
        step.tokens_per_second = step.tokens as f64 / step.step as f64 / seconds;
        step.seconds_left = self.seconds / step.step as f64 * (step.total - step.step) as f64;
        Ok(step)
    }
}
