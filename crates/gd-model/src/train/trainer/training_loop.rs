//! The training loop: submit a step, drain what is in flight, evaluate.

use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use gd_kernels::with_matmul_precision;
use gd_layer::Pass;

use super::Trainer;
use super::in_flight::InFlight;
use crate::data::{Batch, places};
use crate::error::{Error, Result};
use crate::train::gradients::Gradients;
use crate::train::optimizer::{clip_scale, not_finite};
use crate::train::schedule::{ScheduledValues, progress};
use crate::train::step::Step;

impl Trainer {
    /// Trains to the end of the run and calls `watch` with the report of every step.
    ///
    /// # Errors
    /// As [`Trainer::next_steps`], or the error of `watch`.
    pub fn run(&mut self, mut watch: impl FnMut(&Step) -> Result<()>) -> Result<()> {
        while self.step < self.recipe.train.steps {
            self.next_steps()?.iter().try_for_each(&mut watch)?;
        }
        self.drain(0)?.iter().try_for_each(watch)
    }

    /// Submits one step and returns the reports that are complete, oldest first; evaluates the model if it is due.
    ///
    /// On a GPU that works ahead of the host the report is that of the step before: none after the first step, and two
    /// if this step ends with something that needs its result (an evaluation, a checkpoint, a sample, the end of the
    /// run). Elsewhere it is the report of this step.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the guard skipped too many updates in a row, or if the parameters are such that the model
    /// cannot be computed; an error of the device.
    pub fn next_steps(&mut self) -> Result<Vec<Step>> {
        self.advance(true).map_err(|e| self.diagnosed(e))
    }

    /// Submits one step, waits for it and returns its report; evaluates the model if it is due.
    ///
    /// # Errors
    /// As [`Trainer::next_steps`].
    pub fn train_step(&mut self) -> Result<Step> {
        let mut steps = self.advance(false).map_err(|e| self.diagnosed(e))?;
        steps.pop().ok_or_else(|| Error::Invalid("a step without a report".into()))
    }

    /// Submits one step and evaluates the model if it is due. With `ahead` a step may stay in flight on a GPU.
    fn advance(&mut self, ahead: bool) -> Result<Vec<Step>> {
        self.submit()?;
        let ahead = ahead && self.is_asynchronous() && !self.needs_result();
        let mut steps = self.drain(usize::from(ahead))?;
        self.evaluate_if_due(&mut steps)?;
        Ok(steps)
    }

    /// Computes the gradients of the next step and submits its update. [`Trainer::drain`] returns the report.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the guard skipped too many updates in a row, or an error of the device.
    pub fn submit(&mut self) -> Result<()> {
        if self.in_flight.is_empty() {
            self.clock = Instant::now();
        }
        let train = &self.recipe.train;
        if self.step > 0 && train.aligns(self.step - 1) != train.aligns(self.step) {
            // The losses of the steps before are those of another objective.
            self.guard.reset_window();
        }
        let precision = train.precision(&self.device).matmul();
        let (gradients, losses) = with_matmul_precision(precision, || self.gradients())?;
        let mut step = self.report();
        self.is_updating = true;
        let result = match self.is_asynchronous() {
            true if gradients.is_empty() => {
                self.skip_without_targets(&mut step);
                None
            }
            true => Some(self.submit_update(&gradients, &losses, step.lr)?),
            false => {
                self.apply_update(&mut step, gradients, &losses)?;
                None
            }
        };
        self.step += 1;
        self.is_updating = false;
        self.in_flight.push_back(InFlight { step, result });
        Ok(())
    }

    /// Returns the reports of submitted steps, oldest first, and leaves at most `in_flight` steps in flight. Waits for
    /// the device as far as necessary.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the guard skipped too many updates in a row, or an error of the device.
    pub fn drain(&mut self, in_flight: usize) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        while self.in_flight.len() > in_flight {
            let Some(submitted) = self.in_flight.pop_front() else { break };
            steps.push(self.finish(submitted)?);
        }
        Ok(steps)
    }

    /// The report of the next step without its results.
    fn report(&self) -> Step {
        let train = &self.recipe.train;
        let scheduled = ScheduledValues::at(train, self.step);
        Step {
            step: self.step + 1,
            total: train.steps,
            loss: f64::NAN,
            layer_alignment: self.teacher.is_some().then_some(scheduled.layer_alignment),
            grad_norm: f64::NAN,
            lr: scheduled.lr,
            skipped: 0,
            skip: None,
            is_empty: false,
            hardness: scheduled.hardness,
            candidates: scheduled.candidates,
            tokens: (self.step + 1) * (train.batch * train.context * train.accumulation) as u64,
            tokens_per_second: f64::NAN,
            seconds_left: f64::NAN,
            valid_loss: None,
            valid_loss_ema: None,
            heads: None,
            churn: None,
        }
    }

    /// The sums over the micro-batches of this step, except that of the losses. These are returned as a tensor f32
    /// `[micro-batches]` on the device, so that the host does not wait for them.
    fn gradients(&self) -> Result<(Gradients, Tensor)> {
        let train = &self.recipe.train;
        let vars = self.params.vars();
        let (mut sums, mut losses) = (None::<Gradients>, Vec::new());
        for micro in 0..train.accumulation as u64 {
            let at = self.step * train.accumulation as u64 + micro;
            let places = places(at, train.batch, self.group.rank(), self.group.world());
            let first = places.start;
            let Batch { inputs, targets, mask, predicted } =
                self.batches.batch(places, train.context, &self.device)?;
            // Documents of one token each.
            if predicted == 0 {
                continue;
            }
            let pass = train.select.pass(&mask, progress(train, self.step));
            // The fraction of the whole micro-batch, of which this process may have a part. If every token is predicted in
            // one process the weight is 1 and changes no bit.
            let weight = predicted as f64 / (train.batch * train.context) as f64;
            self.dropout.iter().for_each(|dropout| dropout.start(first));
            let objective = self.objective((&inputs, &targets), &pass, &vars, weight);
            self.dropout.iter().for_each(|dropout| dropout.stop());
            let (loss, store) = objective?;
            losses.push(loss.detach().to_dtype(DType::F32)?);
            let one = Gradients { loss: 0.0, weight, store };
            match &mut sums {
                None => sums = Some(one),
                Some(sums) => sums.add(&vars, &one)?,
            }
        }
        match sums {
            Some(sums) => Ok((sums, Tensor::stack(&losses, 0)?)),
            None => Ok((Gradients::default(), Tensor::zeros(1, DType::F32, &self.device)?)),
        }
    }

    /// The loss of a micro-batch times its weight, and the gradients of this product.
    fn objective(
        &self,
        (ids, targets): (&Tensor, &Tensor),
        pass: &Pass,
        vars: &[(String, Var)],
        weight: f64,
    ) -> Result<(Tensor, GradStore)> {
        let uptrain = self.teacher.as_ref().zip(self.recipe.train.uptrain.as_ref());
        if let (Some((teacher, _)), true) = (uptrain, self.recipe.train.aligns(self.step)) {
            let (model, layers) = (teacher.model(), teacher.changed());
            return Ok(self.model.layer_alignment(model, vars, layers, ids, pass, weight)?);
        }
        let head = |hidden: &Tensor| match uptrain {
            Some((teacher, config)) => {
                teacher.loss(&self.model, hidden, (ids, targets), pass, config.kl)? * weight
            }
            None => self.model.head_loss(hidden, targets)? * weight,
        };
        if self.recipe.train.checkpoint_blocks {
            return Ok(self.model.checkpointed(&self.frozen, vars, ids, pass, &head)?);
        }
        let loss = head(&self.model.hidden(ids, pass, None)?)?;
        let store = loss.backward()?;
        Ok((loss, store))
    }

    /// Updates the parameters, or skips the update if the guard says so, and completes the report. The host waits for
    /// the loss and for the norm of the gradient.
    fn apply_update(&mut self, step: &mut Step, mut gradients: Gradients, losses: &Tensor) -> Result<()> {
        gradients.loss = losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
        // Metal reports the failure of an earlier command only when the whole queue is waited for.
        self.device.synchronize()?;
        let vars = self.params.vars();
        self.group.all_reduce(&vars, &mut gradients)?;
        if gradients.is_empty() {
            self.skip_without_targets(step);
            return Ok(());
        }
        (step.loss, step.grad_norm) = (gradients.loss(), gradients.norm(&vars)?);
        let verdict = self.guard.judge(step.step, step.loss, step.grad_norm)?;
        step.skip = self.skip_reason(step.step, verdict, || {
            Ok(not_finite(&vars, &gradients.store)?.map(str::to_owned))
        })?;
        if step.skip.is_none() {
            let scale = clip_scale(step.grad_norm, self.recipe.train.clip)? / gradients.weight;
            self.optimizer.step(&gradients.store, step.lr, scale)?;
            self.ema.as_mut().map_or(Ok(()), |ema| ema.update(&vars))?;
        }
        Ok(())
    }

    /// Completes the report of a step without a token to predict: its update is skipped and counted.
    fn skip_without_targets(&mut self, step: &mut Step) {
        self.guard.count_skipped();
        step.is_empty = true;
        step.skip = Some("no token to predict".into());
        if self.group.leads() {
            tracing::warn!("step {}: update skipped: no token to predict in its documents", step.step);
        }
    }

    /// The reason of the guard, completed by the name of the first parameter whose gradient is not finite.
    pub(super) fn skip_reason(
        &self,
        step: u64,
        verdict: Option<String>,
        first: impl FnOnce() -> Result<Option<String>>,
    ) -> Result<Option<String>> {
        let Some(reason) = verdict else { return Ok(None) };
        let reason = match first()? {
            Some(name) => format!("{reason} (first in {name})"),
            None => reason,
        };
        if self.group.leads() {
            tracing::warn!("step {step}: update skipped: {reason}");
        }
        Ok(Some(reason))
    }

    /// Whether the host submits a step before it has read the result of the one before: on a GPU with AdamW for all
    /// parameters. Several processes, Muon, averaged parameters and a teacher need the result of every step on the host.
    pub fn is_asynchronous(&self) -> bool {
        let alone = self.group.world() == 1 && self.ema.is_none() && self.teacher.is_none();
        alone && self.optimizer.is_asynchronous()
    }

    /// Whether something follows the last submitted step that needs its result.
    fn needs_result(&self) -> bool {
        let train = &self.recipe.train;
        let every = [Some(train.eval_every), Some(train.save_every()), train.sample_every];
        self.step == train.steps || every.into_iter().flatten().any(|n| self.step.is_multiple_of(n))
    }

    /// Evaluates the model after the last submitted step if an evaluation is due and its report is among `steps`.
    fn evaluate_if_due(&mut self, steps: &mut [Step]) -> Result<()> {
        let train = &self.recipe.train;
        let due = self.step.is_multiple_of(train.eval_every) || self.step == train.steps;
        let due = due && self.has_validation();
        match steps.last_mut() {
            Some(last) if due && last.step == self.step && self.group.leads() => {
                last.record(self.evaluate()?)
            }
            _ => {}
        }
        Ok(())
    }
}
