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

mod evaluation;
mod in_flight;
mod training_loop;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use gd_layer::{AdapterDropout, Pass};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::in_flight::InFlight;
use super::calibrate::calibrate_thresholds;
use super::churn::Churn;
use super::ema::Ema;
use super::guard::Guard;
use super::optimizer::Optimizer;
use super::parallel::Group;
use super::state::{State, Stateful};
use super::teacher::Teacher;
use crate::config::{Precision, Recipe, device};
use crate::data::{Batches, Corpus, places};
use crate::error::{Error, Result};
use crate::model::params::Params;
use crate::model::pretrained::Parts;
use crate::model::swap::remove_scores;
use crate::model::{Transformer, adapter};

/// What a model takes over from the one that its training starts with, besides the parameters.
#[derive(Debug, Clone)]
pub struct Inherited {
    /// The sampling defaults: the content of `generation_config.json`.
    pub generation: Value,
    /// Further files by name, such as the chat template.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// The frozen model under the adapter of a run.
struct Base {
    params: Params,
    /// The hash of its weights.
    hash: blake3::Hash,
}

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
    /// The parameters that are trained: those of the model, or those of its adapter.
    pub params: Params,
    base: Option<Base>,
    /// Dropout of the inputs of the adapter, if it has some.
    dropout: Option<Arc<AdapterDropout>>,
    optimizer: Optimizer,
    ema: Option<Ema>,
    guard: Guard,
    churn: Churn,
    teacher: Option<Teacher>,
    inherited: Option<Inherited>,
    batches: Batches,
    corpus: Corpus,
    device: Device,
    group: Group,
    /// Submitted steps whose reports have not been returned, oldest first.
    in_flight: VecDeque<InFlight>,
    step: u64,
    /// Whether an update has begun and not ended. After an error in it, the state is that of no step.
    is_updating: bool,
    /// The loss of the last step with a token to predict; `None` before the first one since the start.
    last_loss: Option<f64>,
    seconds: f64,
    /// The time of the last report, or of the submission of the first step after it.
    clock: Instant,
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
        if recipe.train.lora.is_some() {
            return Err(Error::Invalid("train.lora: the run needs a model; use Trainer::finetune".into()));
        }
        let params = Params::new(seed, recipe.train.precision(device).dtype(), device);
        Self::start(recipe, corpus, seed, (None, params), device)
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
        let mut trainer = Self::start(recipe, corpus, seed, (None, params), device)?;
        trainer.teacher = Some(teacher);
        Ok(trainer)
    }

    /// The model `source`, trained on. Its configuration is that of `recipe`. With `train.lora` its weights are frozen, and an
    /// adapter is trained, which is initialized from `seed`.
    ///
    /// # Errors
    /// As [`Trainer::new`]; a model that lacks a tensor, or has one of another shape.
    pub fn finetune(
        recipe: Recipe,
        corpus: Corpus,
        seed: u64,
        source: Parts,
        device: &Device,
    ) -> Result<Self> {
        source.require_complete()?;
        let dtype = recipe.train.precision(device).dtype();
        let hash = recipe.train.lora.is_some().then(|| adapter::hash(&source));
        let inherited = Inherited { generation: source.generation, files: source.files };
        let params = Params::stored(source.tensors, None, dtype, device);
        let params = match hash {
            Some(hash) => (Some(Base { params, hash }), Params::new(seed, dtype, device)),
            None => (None, params),
        };
        let mut trainer = Self::start(recipe, corpus, seed, params, device)?;
        trainer.inherited = Some(inherited);
        Ok(trainer)
    }

    /// Sets what the model takes over from the one that its training started with, before a run is resumed.
    pub fn inherit(&mut self, inherited: Inherited) {
        self.inherited = Some(inherited);
    }

    /// What the model takes over from its teacher, or from the model that its training started with.
    pub fn inherited(&self) -> Option<&Inherited> {
        self.teacher.as_ref().map(Teacher::inherited).or(self.inherited.as_ref())
    }

    /// A trainer of `params`, which are those of the model, or of an adapter of the model `base`.
    fn start(
        mut recipe: Recipe,
        corpus: Corpus,
        seed: u64,
        (base, params): (Option<Base>, Params),
        device: &Device,
    ) -> Result<Self> {
        corpus.check(recipe.train.context)?;
        // A precision that the device decided is written into the recipe, so that a resumed run has it on any device.
        let precision = recipe.train.precision(device);
        let usual = device.is_cpu() && precision == Precision::F32;
        recipe.train.precision = (!usual).then_some(precision);
        if precision == Precision::Bf16Mixed && !device.is_cpu() {
            return Err(Error::Invalid(format!(
                "train.precision: bf16_mixed is for the CPU, and the device is {}; use bf16 or auto",
                device::name(device)
            )));
        }
        if precision == Precision::Bf16 {
            // The saved weights are those of the model, not the master weights.
            recipe.model.dtype = "bfloat16".into();
        }
        let dropout = recipe.train.lora.as_ref().map(|lora| lora.dropout).filter(|dropout| *dropout > 0.0);
        let dropout = dropout.map(|dropout| Arc::new(AdapterDropout::new(dropout)));
        let build = |builder: &dyn Fn(&Params) -> VarBuilder<'static>| match (&base, &recipe.train.lora) {
            (Some(base), Some(lora)) => {
                let mut model = Transformer::new(&recipe.model, base.params.frozen())?;
                let targets = adapter::targets(lora, &recipe.model)?.into_keys().collect();
                model.adapt(&targets, lora.r, lora.scale(), &builder(&params))?;
                dropout.iter().for_each(|dropout| model.set_adapter_dropout(dropout, seed));
                Ok::<_, Error>(model)
            }
            _ => Transformer::new(&recipe.model, builder(&params)),
        };
        let model = build(&Params::builder)?;
        let frozen = build(&Params::frozen)?;
        let optimizer = Optimizer::new(params.vars(), recipe.train.adamw, recipe.train.muon)?;
        let ema = |config| Ema::new(config, model.config(), &params, device);
        let ema = recipe.train.ema.map(ema).transpose()?;
        let guard = Guard::new(recipe.train.guard)?;
        let batches = Batches::new(corpus.train.clone(), seed);
        if recipe.train.select.calibrate_thresholds {
            let first = batches.batch(places(0, recipe.train.batch, 0, 1), recipe.train.context, device)?;
            let forward = |pass: &Pass| Ok(model.hidden(&first.inputs, pass, None).map(drop)?);
            calibrate_thresholds(&model, &params, forward, &first.mask)?;
        }
        Ok(Self {
            recipe,
            frozen,
            model,
            params,
            base,
            dropout,
            optimizer,
            ema,
            guard,
            churn: Churn::default(),
            teacher: None,
            inherited: None,
            batches,
            corpus,
            device: device.clone(),
            group: Group::single(),
            in_flight: VecDeque::new(),
            step: 0,
            is_updating: false,
            last_loss: None,
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
    /// A step in flight (see [`Trainer::drain`]), an update that failed, or a state that cannot be copied.
    pub fn state(&mut self) -> Result<State> {
        if self.is_updating {
            return Err(Error::Invalid(format!("the update of step {} failed in between", self.step + 1)));
        }
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

    /// The number of updates that have been skipped.
    pub fn skipped_updates(&self) -> u64 {
        self.guard.skipped()
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

    /// The hash of the weights of the model whose adapter is trained, if the run trains one.
    pub fn base_hash(&self) -> Option<blake3::Hash> {
        self.base.as_ref().map(|base| base.hash)
    }

    /// The number of parameters of the model, with those of its adapter.
    pub fn parameter_count(&self) -> usize {
        self.params.count() + self.base.as_ref().map_or(0, |base| base.params.count())
    }

    /// The averaged parameters, if the run has them.
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }
}
