//! A model in training.
//!
//! A training loop makes three calls per step:
//!
//! 1. [`Trainer::submit`] computes the gradients of a step and submits its update.
//! 2. [`Trainer::drain`] waits for submitted steps and returns their reports. On a GPU one step may stay in flight, so
//!    that the device is never idle.
//! 3. [`Trainer::evaluate`] measures the model on the start of the validation text.
//!
//! [`Trainer::next_steps`] makes these calls for one step, [`Trainer::run`] for all steps of a run.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_layer::Pass;
use serde::{Deserialize, Serialize};

use super::churn::Churn;
use super::ema::Ema;
use super::gradients::Gradients;
use super::guard::Guard;
use super::in_flight::InFlight;
use super::optimizer::{Optimizer, clip_scale, not_finite};
use super::parallel::Group;
use super::schedule::{ScheduledValues, progress};
use super::state::{State, Stateful};
use super::step::{Step, StepEvaluation};
use super::teacher::Teacher;
use crate::config::{Precision, Recipe};
use crate::data::{Batch, Batches, Corpus, places};
use crate::error::{Error, Result};
use crate::eval::{Evaluation, evaluate, observe};
use crate::model::Transformer;
use crate::model::params::Params;
use crate::model::pretrained::Parts;
use crate::model::swap::remove_scores;

/// The number of windows of the validation text in the evaluation of a step. The end of a run measures all of it.
const EVAL_WINDOWS: usize = 32;

/// The part of the training state that belongs to no component.
#[derive(Serialize, Deserialize)]
struct Progress {
    step: u64,
    /// Seconds spent on these steps, without evaluation.
    seconds: f64,
}

/// A model in training, with its data and everything that changes from step to step.
pub struct Trainer {
    recipe: Recipe,
    /// The model.
    pub model: Transformer,
    /// The same model over the same parameters, without gradients.
    frozen: Transformer,
    /// The parameters of the model.
    pub params: Params,
    pub(super) optimizer: Optimizer,
    ema: Option<Ema>,
    pub(super) guard: Guard,
    churn: Churn,
    teacher: Option<Teacher>,
    batches: Batches,
    corpus: Corpus,
    device: Device,
    group: Group,
    /// Submitted steps whose reports have not been returned, oldest first.
    pub(super) in_flight: VecDeque<InFlight>,
    step: u64,
    pub(super) seconds: f64,
    /// The time of the last report, or of the submission of the first step after it.
    pub(super) clock: Instant,
}

impl Trainer {
    /// A new model, trained on `corpus`. Its parameters and the order of the data depend on `seed`.
    ///
    /// # Errors
    /// A text shorter than one window, or a recipe that contradicts itself or needs a teacher.
    pub fn new(recipe: Recipe, corpus: Corpus, seed: u64, device: &Device) -> Result<Self> {
        if recipe.train.uptrain.is_some() {
            return Err(Error::Invalid(
                "train.uptrain: the run needs a teacher; use Trainer::uptrain".into(),
            ));
        }
        let params = Params::new(seed, recipe.train.precision(device).dtype(), device);
        Self::start(recipe, corpus, seed, params, device)
    }

    /// The model `teacher` with the attention mechanism of `recipe`, which learns from it as `train.uptrain` says.
    /// Parameters that the teacher lacks are initialized from `seed`.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Teacher::new`].
    pub fn uptrain(
        recipe: Recipe,
        corpus: Corpus,
        seed: u64,
        teacher: Parts,
        device: &Device,
    ) -> Result<Self> {
        let mut tensors = teacher.tensors.clone();
        let dtype = recipe.train.precision(device).dtype();
        let teacher = Teacher::new(teacher, &recipe.model, dtype, device)?;
        remove_scores(&mut tensors, teacher.changed());
        let params = Params::stored(tensors, Some(seed), dtype, device);
        let mut trainer = Self::start(recipe, corpus, seed, params, device)?;
        trainer.teacher = Some(teacher);
        Ok(trainer)
    }

    fn start(mut recipe: Recipe, corpus: Corpus, seed: u64, params: Params, device: &Device) -> Result<Self> {
        corpus.check(recipe.train.context)?;
        // A precision that the device decided is written into the recipe, so that a resumed run has it on any device.
        let precision = recipe.train.precision(device);
        let usual = device.is_cpu() && precision == Precision::F32;
        recipe.train.precision = (!usual).then_some(precision);
        if precision == Precision::Bf16 {
            // The saved weights are those of the model, not the master weights.
            recipe.model.dtype = "bfloat16".into();
        }
        let model = Transformer::new(&recipe.model, params.builder())?;
        let optimizer = Optimizer::new(params.vars(), recipe.train.adamw, recipe.train.muon)?;
        let ema = |config| Ema::new(config, model.config(), &params, device);
        let ema = recipe.train.ema.map(ema).transpose()?;
        let guard = Guard::new(recipe.train.guard)?;
        let batches = Batches::new(corpus.train.clone(), seed);
        Ok(Self {
            recipe,
            frozen: Transformer::new(model.config(), params.frozen())?,
            model,
            params,
            optimizer,
            ema,
            guard,
            churn: Churn::default(),
            teacher: None,
            batches,
            corpus,
            device: device.clone(),
            group: Group::single(),
            in_flight: VecDeque::new(),
            step: 0,
            seconds: 0.0,
            clock: Instant::now(),
        })
    }

    /// The components that change from step to step, by the names under which a checkpoint stores them.
    fn components(&mut self) -> Vec<(&'static str, &mut dyn Stateful)> {
        let mut components: Vec<(&'static str, &mut dyn Stateful)> =
            vec![("optimizer", &mut self.optimizer), ("guard", &mut self.guard), ("picks", &mut self.churn)];
        components.extend(self.ema.as_mut().map(|ema| ("ema", ema as &mut dyn Stateful)));
        components
    }

    /// The training state. With the parameters it is all that an exact continuation needs.
    ///
    /// # Errors
    /// A step in flight (see [`Trainer::drain`]), or a state that cannot be copied.
    pub fn state(&mut self) -> Result<State> {
        if let Some(InFlight { step, .. }) = self.in_flight.front() {
            return Err(Error::Invalid(format!("step {} is in flight; drain it first", step.step)));
        }
        let mut state = State::of(&Progress { step: self.step, seconds: self.seconds })?;
        for (name, component) in self.components() {
            state.insert(name, component.save()?);
        }
        Ok(state)
    }

    /// Restores the parameters and the state of a trainer with the same recipe, text and seed.
    ///
    /// # Errors
    /// Names the tensor or component that is missing or does not fit.
    pub fn restore(&mut self, tensors: &BTreeMap<String, Tensor>, mut state: State) -> Result<()> {
        let progress: Progress = state.read()?;
        for (name, component) in self.components() {
            component.restore(state.remove(name)?)?;
        }
        self.params.set(tensors)?;
        (self.step, self.seconds) = (progress.step, progress.seconds);
        Ok(())
    }

    /// The number of submitted steps.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Shares every micro-batch with the other processes of `group`. All processes call this.
    ///
    /// # Errors
    /// - [`Error::OutOfRange`] for a micro-batch with fewer rows than processes.
    /// - [`Error::RanksDiffer`] if recipe, text or parameters differ between the processes.
    pub fn join(&mut self, group: Group) -> Result<()> {
        group.check(self.recipe.train.batch)?;
        if group.world() == 1 {
            return Ok(());
        }
        let recipe = serde_json::to_vec(&self.recipe).map_err(|e| Error::Invalid(e.to_string()))?;
        group.require_equal("the configuration", blake3::hash(&recipe))?;
        group.require_equal("the training text", self.corpus.hash())?;
        self.group = group;
        self.require_equal()
    }

    /// The processes of this training.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Checks that all processes hold the same parameters. All processes call this before every save.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] with the ranks that differ from rank 0.
    pub fn require_equal(&self) -> Result<()> {
        if self.group.world() == 1 {
            return Ok(());
        }
        let state = [&self.params.hash()?.as_bytes()[..], &self.step.to_le_bytes()].concat();
        self.group.require_equal(&format!("the parameters at step {}", self.step), blake3::hash(&state))
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The training and validation text.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// The device of the model.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number of steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.recipe.train.steps
    }

    /// Training tokens per second since the start of the run, without evaluation.
    pub fn tokens_per_second(&self) -> f64 {
        let train = &self.recipe.train;
        (self.step * (train.batch * train.context * train.accumulation) as u64) as f64 / self.seconds
    }

    /// The teacher that the model learns from, if it has one.
    pub fn teacher(&self) -> Option<&Teacher> {
        self.teacher.as_ref()
    }

    /// The averaged parameters, if the run has them.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

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
    /// [`Error::Diverged`] if the guard skipped too many updates in a row.
    pub fn next_steps(&mut self) -> Result<Vec<Step>> {
        self.submit()?;
        let mut steps = self.drain(usize::from(self.is_asynchronous() && !self.needs_result()))?;
        self.evaluate_if_due(&mut steps)?;
        Ok(steps)
    }

    /// Submits one step, waits for it and returns its report; evaluates the model if it is due.
    ///
    /// # Errors
    /// As [`Trainer::next_steps`].
    pub fn train_step(&mut self) -> Result<Step> {
        self.submit()?;
        let mut steps = self.drain(0)?;
        self.evaluate_if_due(&mut steps)?;
        steps.pop().ok_or_else(|| Error::Invalid("a step without a report".into()))
    }

    /// Computes the gradients of the next step and submits its update. [`Trainer::drain`] returns the report.
    ///
    /// # Errors
    /// [`Error::Diverged`] if the guard skipped too many updates in a row, or an error of the device.
    pub fn submit(&mut self) -> Result<()> {
        if self.in_flight.is_empty() {
            self.clock = Instant::now();
        }
        if self.step > 0 && self.recipe.train.aligns(self.step - 1) != self.recipe.train.aligns(self.step) {
            // The loss is another one from here on.
            self.guard.reset_window();
        }
        let (mut gradients, losses) = self.gradients()?;
        let mut step = self.report();
        let result = match self.is_asynchronous() {
            true => Some(self.submit_update(&gradients, &losses, step.lr)?),
            false => {
                gradients.loss = losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
                // Metal reports the failure of an earlier command only when the whole queue is waited for.
                self.device.synchronize()?;
                self.group.all_reduce(&self.params.vars(), &mut gradients)?;
                (step.loss, step.grad_norm) = (gradients.loss()?, gradients.norm(&self.params.vars())?);
                step.skip = self.judge(&gradients, step.loss, step.grad_norm)?;
                if step.skip.is_none() {
                    self.update(&gradients, step.grad_norm, step.lr)?;
                }
                None
            }
        };
        self.step += 1;
        self.in_flight.push_back(InFlight { step, result });
        Ok(())
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
            let Batch { inputs, targets, mask, predicted } =
                self.batches.batch(places, train.context, &self.device)?;
            let pass = train.select.pass(&mask, progress(train, self.step));
            // Relative to the whole micro-batch, of which this may be the share of one process. The weight is 1 where
            // every token is predicted, and then changes no bit.
            let weight = predicted as f64 / (train.batch * train.context) as f64;
            let (loss, store) = self.objective((&inputs, &targets), &pass, &vars, weight)?;
            losses.push(loss.detach().to_dtype(DType::F32)?);
            let one = Gradients { loss: 0.0, weight, store };
            match &mut sums {
                None => sums = Some(one),
                Some(sums) => sums.add(&vars, &one)?,
            }
        }
        let sums = sums.ok_or_else(|| Error::out_of_range("train.accumulation", 0, "at least 1"))?;
        Ok((sums, Tensor::stack(&losses, 0)?))
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

    /// Why the guard skips the update of this step; `None` if it does not.
    fn judge(&mut self, gradients: &Gradients, loss: f64, grad_norm: f64) -> Result<Option<String>> {
        let verdict = self.guard.judge(self.step + 1, loss, grad_norm)?;
        let vars = self.params.vars();
        self.skip_reason(self.step + 1, verdict, || {
            Ok(not_finite(&vars, &gradients.store)?.map(str::to_owned))
        })
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

    /// Updates the parameters.
    fn update(&mut self, gradients: &Gradients, grad_norm: f64, lr: f64) -> Result<()> {
        let scale = clip_scale(grad_norm, self.recipe.train.clip)? / gradients.weight;
        self.optimizer.step(&gradients.store, lr, scale)?;
        self.ema.as_mut().map_or(Ok(()), |ema| ema.update(&self.params.vars()))
    }

    /// Whether the host submits a step before it knows the result of the one before: on a GPU with AdamW for all
    /// parameters. Several processes, Muon, averaged parameters and a teacher need the result of every step on the host.
    pub fn is_asynchronous(&self) -> bool {
        let alone = self.group.world() == 1 && self.ema.is_none() && self.teacher.is_none();
        !gd_kernels::on_cpu(&self.device) && alone && self.optimizer.is_asynchronous()
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
        match steps.last_mut() {
            Some(last) if due && last.step == self.step && self.group.leads() => {
                last.record(self.evaluate()?)
            }
            _ => {}
        }
        Ok(())
    }

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
