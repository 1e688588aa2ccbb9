//! The training loop.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::Mask;
use gd_layer::Pass;
use serde::{Deserialize, Serialize};

use super::in_flight::Launched;
use crate::config::{Precision, Recipe};
use crate::data::{Batch, Batches, Corpus, places};
use crate::error::{Error, Result};
use crate::eval::{Evaluation, HeadStats, Picks, evaluate, observe};
use crate::model::Transformer;
use crate::model::params::Params;
use crate::model::pretrained::Parts;
use crate::model::swap::forget_scores;
use crate::train::ema::Ema;
use crate::train::guard::Guard;
use crate::train::optimizer::{Optimizer, accumulate, clip_scale, global_norm, not_finite};
use crate::train::parallel::Group;
use crate::train::state::{State, Stateful};
use crate::train::teacher::Original;

/// Validation windows of a look during training; the whole text is measured at the end.
const GLANCE: usize = 32;

/// What happened in a step.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Training loss of the step, nats per token; while layers are aligned, their relative squared error.
    pub loss: f64,
    /// Whether layers were aligned with those of the original, in a run that learns from one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aligned: Option<bool>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Updates that the guard has skipped so far.
    pub skipped: u64,
    /// Why it skipped this one; an event of its own in the log.
    #[serde(skip)]
    pub skip: Option<String>,
    /// Share of the hard forward pass.
    pub hardness: f64,
    /// Candidates per query, if the run changes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidates: Option<usize>,
    /// Training tokens seen.
    pub tokens: u64,
    /// Training tokens per second in this step, a look at the validation text left out.
    pub tokens_per_second: f64,
    /// Seconds to the end of the run at this rate; not logged.
    #[serde(skip)]
    pub seconds_left: f64,
    /// Loss on the first windows of the validation text, every `eval_every` steps and at the end.
    pub valid_loss: Option<f64>,
    /// The same with the averaged parameters, if the run keeps them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_loss_ema: Option<f64>,
    /// What the heads did on them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadStats>,
    /// Share of the selections on the first of these windows that have changed since the last look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub churn: Option<f64>,
}

/// What the micro-batches of a step add up to. Loss and gradient of the step are these sums divided by
/// the weight, so that every predicted token counts the same, wherever it lies.
pub struct Gradients {
    /// Sum over micro-batches of the mean loss, times the micro-batch's weight.
    pub loss: f64,
    /// Sum of the weights: of each micro-batch the share of tokens that are to be predicted.
    pub weight: f64,
    /// The gradients of `loss`.
    pub store: GradStore,
}

impl Gradients {
    /// Adds those of another micro-batch.
    ///
    /// # Errors
    /// Gradients of other shapes.
    pub fn add(&mut self, vars: &[(String, Var)], more: &Self) -> Result<()> {
        self.loss += more.loss;
        self.weight += more.weight;
        accumulate(vars, &mut self.store, &more.store)
    }

    /// Mean loss, nats per predicted token.
    ///
    /// # Errors
    /// No token was to be predicted.
    pub fn loss(&self) -> Result<f64> {
        match self.weight > 0.0 {
            true => Ok(self.loss / self.weight),
            false => Err(Error::Invalid("a step without a token to predict".into())),
        }
    }

    /// Norm of the gradient of the mean loss; not finite if the gradient is not.
    ///
    /// # Errors
    /// A gradient of a dtype that has no norm.
    pub fn norm(&self, vars: &[(String, Var)]) -> Result<f64> {
        Ok(global_norm(vars, &self.store)? / self.weight)
    }
}

/// How far a run has come. The schedules and the order of the data follow from the step; between two steps
/// no micro-batch is pending.
#[derive(Serialize, Deserialize)]
struct Progress {
    step: u64,
    /// Seconds spent on those steps.
    seconds: f64,
}

/// A look at the validation text.
pub(super) struct Look {
    pub(super) seen: Evaluation,
    /// Loss with the averaged parameters.
    pub(super) averaged: Option<f64>,
    pub(super) churn: Option<f64>,
}

/// A model in training.
pub struct Trainer {
    pub(super) recipe: Recipe,
    /// The model.
    pub model: Transformer,
    /// The same over the same parameters, without gradients.
    pub(super) frozen: Transformer,
    /// Its parameters.
    pub params: Params,
    pub(super) optimizer: Optimizer,
    pub(super) ema: Option<Ema>,
    pub(super) guard: Guard,
    pub(super) picks: Picks,
    pub(super) original: Option<Original>,
    pub(super) batches: Batches,
    pub(super) corpus: Corpus,
    pub(super) device: Device,
    pub(super) group: Group,
    /// Launched and not told.
    pub(super) launched: VecDeque<Launched>,
    pub(super) step: u64,
    pub(super) seconds: f64,
    /// When the last figures were read, or the first step after them began.
    pub(super) clock: Instant,
}

impl Trainer {
    /// A new model, initialised from `seed`, which also orders the data.
    ///
    /// # Errors
    /// A text too short for one window, or a config that does not fit.
    pub fn new(recipe: Recipe, corpus: Corpus, seed: u64, device: &Device) -> Result<Self> {
        if recipe.train.uptrain.is_some() {
            return Err(Error::Invalid(
                "train.uptrain: a run that learns from a model starts from it".into(),
            ));
        }
        let params = Params::new(seed, recipe.train.precision(device).dtype(), device);
        Self::start(recipe, corpus, seed, params, device)
    }

    /// The model `original` with another attention, that of the recipe, which learns from it as
    /// `train.uptrain` says. What the original does not have is initialised from `seed`.
    ///
    /// # Errors
    /// As [`Trainer::new`] and [`Original::new`].
    pub fn uptrain(
        recipe: Recipe,
        corpus: Corpus,
        seed: u64,
        original: Parts,
        device: &Device,
    ) -> Result<Self> {
        let mut tensors = original.tensors.clone();
        let dtype = recipe.train.precision(device).dtype();
        let original = Original::new(original, &recipe.model, dtype, device)?;
        forget_scores(&mut tensors, original.changed());
        let params = Params::stored(tensors, Some(seed), dtype, device);
        let mut trainer = Self::start(recipe, corpus, seed, params, device)?;
        trainer.original = Some(original);
        Ok(trainer)
    }

    fn start(mut recipe: Recipe, corpus: Corpus, seed: u64, params: Params, device: &Device) -> Result<Self> {
        corpus.check(recipe.train.context)?;
        // What follows from the device is told, so that the run goes on with it on another one.
        let precision = recipe.train.precision(device);
        let usual = device.is_cpu() && precision == Precision::F32;
        recipe.train.precision = (!usual).then_some(precision);
        if precision == Precision::Bf16 {
            // The saved weights are the model's, not their masters.
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
            picks: Picks::default(),
            original: None,
            batches,
            corpus,
            device: device.clone(),
            group: Group::single(),
            launched: VecDeque::new(),
            step: 0,
            seconds: 0.0,
            clock: Instant::now(),
        })
    }

    /// Every part that changes from step to step, besides the parameters and the step itself, by the name
    /// under which a checkpoint holds it.
    fn parts(&mut self) -> Vec<(&'static str, &mut dyn Stateful)> {
        let mut parts: Vec<(&'static str, &mut dyn Stateful)> =
            vec![("optimizer", &mut self.optimizer), ("guard", &mut self.guard), ("picks", &mut self.picks)];
        parts.extend(self.ema.as_mut().map(|ema| ("ema", ema as &mut dyn Stateful)));
        parts
    }

    /// With the parameters, all that an exact continuation needs.
    ///
    /// # Errors
    /// Whatever a part reports; a step whose figures have not been told (see [`Trainer::settle`]).
    pub fn state(&mut self) -> Result<State> {
        if let Some(Launched { step, .. }) = self.launched.front() {
            return Err(Error::Invalid(format!("the outcome of step {} is not known yet", step.step)));
        }
        let mut state = State::of(&Progress { step: self.step, seconds: self.seconds })?;
        for (name, part) in self.parts() {
            state.insert(name, part.save()?);
        }
        Ok(state)
    }

    /// Goes on from the parameters and the state of a trainer with the same recipe, text and seed.
    ///
    /// # Errors
    /// Names the tensor or part that is missing or does not fit.
    pub fn restore(&mut self, tensors: &BTreeMap<String, Tensor>, mut state: State) -> Result<()> {
        let progress: Progress = state.read()?;
        for (name, part) in self.parts() {
            part.restore(state.remove(name)?)?;
        }
        self.params.set(tensors)?;
        (self.step, self.seconds) = (progress.step, progress.seconds);
        Ok(())
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Shares the batches with the other processes of `group`, all of which take part.
    ///
    /// # Errors
    /// A batch of fewer rows than processes, or processes that differ in configuration, text or parameters.
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

    /// Fails unless all processes hold the same parameters. All take part: before every save.
    ///
    /// # Errors
    /// Names the processes that differ.
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

    /// The text.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.recipe.train.steps
    }

    /// Training tokens per second since the start, looks at the validation text left out.
    pub fn tokens_per_second(&self) -> f64 {
        let train = &self.recipe.train;
        (self.step * (train.batch * train.context * train.accumulation) as u64) as f64 / self.seconds
    }

    /// Trains to the end of the run; `watch` sees every step.
    ///
    /// # Errors
    /// As [`Trainer::advance`], or what `watch` returns.
    pub fn run(&mut self, mut watch: impl FnMut(&Step) -> Result<()>) -> Result<()> {
        while self.step < self.recipe.train.steps {
            self.proceed()?.iter().try_for_each(&mut watch)?;
        }
        self.settle()?.iter().try_for_each(watch)
    }

    /// One step, and its figures.
    ///
    /// # Errors
    /// Too many updates in a row were skipped by the guard.
    pub fn advance(&mut self) -> Result<Step> {
        self.launch()?;
        let step = self.known(0)?.pop();
        step.ok_or_else(|| Error::Invalid("a step without figures".into()))
    }

    /// One step, whose figures may be known later.
    pub(super) fn launch(&mut self) -> Result<()> {
        if self.launched.is_empty() {
            self.clock = Instant::now();
        }
        if self.step > 0 && self.recipe.train.aligns(self.step - 1) != self.recipe.train.aligns(self.step) {
            self.guard.forget();
        }
        let (mut gradients, losses) = self.gradients()?;
        let lr = self.recipe.train.lr.lr(self.step, self.recipe.train.steps);
        let mask = Mask::causal(0);
        let Pass { hardness, candidates, .. } = self.pass(&mask);
        let train = &self.recipe.train;
        let mut step = Step {
            step: self.step + 1,
            total: train.steps,
            loss: f64::NAN,
            aligned: self.original.is_some().then(|| train.aligns(self.step)),
            grad_norm: f64::NAN,
            lr,
            skipped: 0,
            skip: None,
            hardness,
            candidates,
            tokens: (self.step + 1) * (train.batch * train.context * train.accumulation) as u64,
            tokens_per_second: f64::NAN,
            seconds_left: f64::NAN,
            valid_loss: None,
            valid_loss_ema: None,
            heads: None,
            churn: None,
        };
        let awaited = match self.runs_ahead() {
            true => Some(self.update_ahead(&gradients, &losses, lr)?),
            false => {
                gradients.loss = losses.to_vec1::<f32>()?.into_iter().map(f64::from).sum();
                // Metal reports commands that failed before the last ones only when it is waited for as a whole.
                self.device.synchronize()?;
                self.group.all_reduce(&self.params.vars(), &mut gradients)?;
                (step.loss, step.grad_norm) = (gradients.loss()?, gradients.norm(&self.params.vars())?);
                step.skip = self.skip(&gradients, step.loss, step.grad_norm)?;
                if step.skip.is_none() {
                    self.update(&gradients, step.grad_norm, lr)?;
                }
                None
            }
        };
        self.step += 1;
        self.launched.push_back(Launched { step, awaited });
        Ok(())
    }

    /// The sums over the micro-batches of this step but that of the losses, which are still where they were
    /// computed: f32 [micro-batches].
    fn gradients(&self) -> Result<(Gradients, Tensor)> {
        let train = &self.recipe.train;
        let vars = self.params.vars();
        let (mut sums, mut losses) = (None::<Gradients>, Vec::new());
        for micro in 0..train.accumulation as u64 {
            let at = self.step * train.accumulation as u64 + micro;
            let places = places(at, train.batch, self.group.rank(), self.group.world());
            let Batch { inputs, targets, mask, predicted } =
                self.batches.batch(places, train.context, &self.device)?;
            let pass = self.pass(&mask);
            // Of the whole micro-batch, of which this is a part if there are other processes. 1 where every
            // token is predicted: the weight then changes no bit.
            let weight = predicted as f64 / (train.batch * train.context) as f64;
            let (loss, store) = self.objective((&inputs, &targets), &pass, &vars, weight)?;
            losses.push(loss.detach().to_dtype(DType::F32)?);
            let one = Gradients { loss: 0.0, weight, store };
            match &mut sums {
                None => sums = Some(one),
                Some(sums) => sums.add(&vars, &one)?,
            }
        }
        let sums = sums.ok_or_else(|| Error::Invalid("train.accumulation is 0".into()))?;
        Ok((sums, Tensor::stack(&losses, 0)?))
    }

    /// The loss of a micro-batch times its weight, and the gradients of that.
    fn objective(
        &self,
        (ids, targets): (&Tensor, &Tensor),
        pass: &Pass,
        vars: &[(String, Var)],
        weight: f64,
    ) -> Result<(Tensor, GradStore)> {
        let uptrain = self.original.as_ref().zip(self.recipe.train.uptrain.as_ref());
        if let (Some((original, _)), true) = (uptrain, self.recipe.train.aligns(self.step)) {
            let (other, layers) = (original.model(), original.changed());
            return Ok(self.model.aligned(other, vars, layers, ids, pass, weight)?);
        }
        let head = |hidden: &Tensor| match uptrain {
            Some((original, how)) => {
                original.loss(&self.model, hidden, (ids, targets), pass, how.kl)? * weight
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

    /// Why this step's update is to be skipped, if it is.
    fn skip(&mut self, gradients: &Gradients, loss: f64, grad_norm: f64) -> Result<Option<String>> {
        let judged = self.guard.judge(loss, grad_norm);
        let vars = self.params.vars();
        let first = || Ok(not_finite(&vars, &gradients.store)?.map(str::to_owned));
        self.skipped(self.step + 1, judged, first)
    }

    /// What the guard says of a step, with the `first` parameter whose gradient is not finite.
    pub(super) fn skipped(
        &self,
        step: u64,
        judged: Result<Option<String>>,
        first: impl FnOnce() -> Result<Option<String>>,
    ) -> Result<Option<String>> {
        let judged = judged.map_err(|e| Error::Invalid(format!("step {step}: {e}")))?;
        let Some(reason) = judged else { return Ok(None) };
        let reason = match first()? {
            Some(name) => format!("{reason} (first in {name})"),
            None => reason,
        };
        if self.group.leads() {
            tracing::warn!("step {step}: update skipped: {reason}");
        }
        Ok(Some(reason))
    }

    /// Moves the parameters.
    fn update(&mut self, gradients: &Gradients, grad_norm: f64, lr: f64) -> Result<()> {
        let scale = clip_scale(grad_norm, self.recipe.train.clip)? / gradients.weight;
        self.optimizer.step(&gradients.store, lr, scale)?;
        self.ema.as_mut().map_or(Ok(()), |ema| ema.update(&self.params.vars()))
    }

    /// How the layers select at this step.
    fn pass<'a>(&self, mask: &'a Mask) -> Pass<'a> {
        let train = &self.recipe.train;
        train.select.pass(mask, self.step as f64 / train.steps.max(1) as f64)
    }

    /// The first windows of the validation text, and the churn of selections on the first batch of them.
    pub(super) fn look(&mut self) -> Result<Look> {
        let train = &self.recipe.train;
        let tokens = self.corpus.valid.head(GLANCE * train.context + 1);
        let mut picks = None;
        let size = (train.context, train.batch);
        let seen = observe(&self.frozen, &tokens, tokens.len(), size, &self.device, |records| {
            picks.get_or_insert_with(|| records.iter().flat_map(|r| r.picks.iter().copied()).collect());
        })?;
        let averaged = self.ema.as_ref().map(|ema| {
            evaluate(ema.model(), &tokens, tokens.len(), train.context, train.batch, &self.device)
        });
        let averaged = averaged.transpose()?.map(|seen| seen.loss);
        Ok(Look { seen, averaged, churn: self.picks.churn(picks.unwrap_or_default()) })
    }

    /// The model that this one learns from, if it does.
    pub fn original(&self) -> Option<&Original> {
        self.original.as_ref()
    }

    /// The averaged parameters, if the run keeps them.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// The whole validation text.
    ///
    /// # Errors
    /// Whatever the forward pass reports.
    pub fn validate(&self) -> Result<Evaluation> {
        self.measure(&self.frozen)
    }

    /// The same with the averaged parameters, if the run keeps them.
    ///
    /// # Errors
    /// Whatever the forward pass reports.
    pub fn validate_ema(&self) -> Result<Option<Evaluation>> {
        self.ema.as_ref().map(|ema| self.measure(ema.model())).transpose()
    }

    fn measure(&self, model: &Transformer) -> Result<Evaluation> {
        let train = &self.recipe.train;
        evaluate(model, &self.corpus.valid, self.corpus.valid_bytes, train.context, train.batch, &self.device)
    }
}
