//! Steps that were submitted to a GPU and whose results the host has not read.
//!
//! The host submits step s, its update included, and then reads the results of step s - 1, whose copy was queued before
//! step s. So the device always has work. The device applies the guard by limits that the host computed from all steps
//! but the last. The host reads the verdict one step late, and corrects the count of updates if the update was skipped;
//! the update in between was submitted with the counts of both cases.

use candle_core::Tensor;
use gd_kernels::adamw::{self, GradientSquares, PendingVerdict};

use super::Trainer;
use crate::error::{Error, Result};
use crate::train::gradients::Gradients;
use crate::train::guard::Limit;
use crate::train::optimizer::{DeviceVerdict, Updated, squares};
use crate::train::step::Step;

/// A submitted step.
pub(super) struct InFlight {
    /// Its report, without the results that are still on the device.
    pub(super) step: Step,
    /// The results, if they are still on the device.
    pub(super) result: Option<DeviceResult>,
}

/// The results of a step that the device judges: loss, gradient norm, and whether the update was skipped.
pub(super) struct DeviceResult {
    verdict: PendingVerdict,
    updated: Updated,
    squares: GradientSquares,
    /// The names of the parameters with a gradient.
    names: Vec<String>,
    /// The limits by which the device judges.
    limits: [Limit; 2],
}

impl Trainer {
    /// Submits the update of this step, which the device applies or skips by the limits of the guard. These are made
    /// from the steps whose results the host has read: all before this one but the last.
    pub(super) fn submit_update(
        &mut self,
        gradients: &Gradients,
        losses: &Tensor,
        lr: f64,
    ) -> Result<DeviceResult> {
        let vars = self.params.vars();
        let Some((squares, names)) = squares(&vars, &gradients.store)? else {
            return Err(Error::Invalid("a step without a gradient".into()));
        };
        let names = names.into_iter().map(str::to_owned).collect();
        let limits = self.guard.limits().map(Limit::rounded);
        let bounds = adamw::Limits {
            weight: gradients.weight,
            clip: self.recipe().train.clip,
            loss: limits[0].above as f32,
            norm: limits[1].above as f32,
        };
        let verdict = squares.verdict(losses, &bounds)?;
        let last = self.in_flight.back().and_then(|submitted| submitted.result.as_ref());
        let previous = last.map(|result| (result.verdict.tensor(), &result.updated));
        let device_verdict = DeviceVerdict { verdict: verdict.tensor(), previous };
        let updated = self.optimizer.step_by_verdict(&gradients.store, lr, &device_verdict)?;
        Ok(DeviceResult { verdict, updated, squares, names, limits })
    }

    /// Completes the report of a submitted step; waits for its results.
    pub(super) fn finish(&mut self, submitted: InFlight) -> Result<Step> {
        let InFlight { mut step, result } = submitted;
        if let Some(result) = result {
            self.read_result(&mut step, result)?;
        }
        step.skipped = self.guard.skipped();
        if !step.is_empty {
            self.last_loss = Some(step.loss);
        }
        let seconds = self.clock.elapsed().as_secs_f64();
        self.clock = std::time::Instant::now();
        self.seconds += seconds;
        step.tokens_per_second = step.tokens as f64 / step.step as f64 / seconds;
        step.seconds_left = self.seconds / step.step as f64 * (step.total - step.step) as f64;
        Ok(step)
    }

    /// Reads the results of a step from the device into its report.
    fn read_result(&mut self, step: &mut Step, result: DeviceResult) -> Result<()> {
        let DeviceResult { verdict, updated, squares, names, limits } = result;
        let verdict = verdict.read()?;
        if self.device().is_metal() {
            // Metal reports the failure of an earlier command only when the whole queue is waited for.
            self.device().synchronize()?;
        }
        (step.loss, step.grad_norm) = (f64::from(verdict.loss), f64::from(verdict.norm));
        if !verdict.applies() {
            self.optimizer.undo_step(&updated);
        }
        let judged = self.guard.judge_by(step.step, step.loss, step.grad_norm, &limits)?;
        step.skip = self
            .skip_reason(step.step, judged, || Ok(squares.first_not_finite()?.map(|at| names[at].clone())))?;
        if step.skip.is_some() == verdict.applies() {
            let Step { step, loss, grad_norm, .. } = *step;
            return Err(Error::Invalid(format!(
                "step {step}: device and guard judge a loss of {loss} and a norm of {grad_norm} differently"
            )));
        }
        Ok(())
    }
}
