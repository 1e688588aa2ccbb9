//! A training run in a folder, which can be stopped at any time and is resumed to the same bits.
//!
//! | in the folder | content |
//! |---|---|
//! | `recipe.json` | the resolved configuration, written at the start |
//! | `train.jsonl`, `tb/` | the log ([`crate::train::log`]); a resumed run continues it after the step of its checkpoint |
//! | `checkpoint-STEP/` | model, recipe, training state and manifest ([`crate::io::checkpoint::Store`]); the first at step 0 |
//! | `config.json`, `model.safetensors`, … | the model at the end of the run, with a manifest of its own |
//!
//! The learning rate, the schedules and the order of the data are functions of the seed and the step. A checkpoint is
//! written between two steps. So the state of a run is that of [`Trainer::state`].

mod folder;
mod inputs;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::folder::check_folder;

use self::folder::{lock, prepare_folder};
use self::inputs::{base_hash, check_recipe, parse, pretty, recipe_hash, require_same, teacher_hash};
use super::log::{Event, Logger, Meter};
use super::parallel::Group;
use super::state::State;
use super::step::Step;
use super::trainer::{Inherited, Trainer};
use crate::config::{ModelConfig, Recipe};
use crate::error::{Error, Result, RunInput};
use crate::eval::Evaluation;
use crate::infer::generate::{check_prompt, sample};
use crate::io::checkpoint::{self, FolderWriter, Store, StoredCheckpoint, System, load_json, load_tensors};
use crate::io::files::write_file;
use crate::io::tokenizer::Tokenizer;
use crate::model::adapter;
use crate::model::pretrained::{copied_files, generation_defaults, python_files};

/// The file of a run or checkpoint with the resolved configuration.
pub const RECIPE: &str = "recipe.json";
/// The file of a checkpoint with the tensors of the training state.
pub const STATE: &str = "state.safetensors";
/// The file of a checkpoint with the rest of the training state.
pub const RECORD: &str = "trainer_state.json";

/// The version of the format of [`RECORD`].
const VERSION: u32 = 1;

/// The inputs of a run besides its recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// The name of the model.
    pub name: String,
    /// Text files and folders, or a folder of prepared data; empty for the sample text.
    pub data: Vec<PathBuf>,
    /// The model that the training started with, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<PathBuf>,
    /// The seed of the parameters and of the order of the data.
    pub seed: u64,
}

/// The evaluation with the lowest validation loss so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowestLoss {
    /// The number of steps before the evaluation.
    pub step: u64,
    /// The validation loss in nats per token.
    pub valid_loss: f64,
}

/// The content of [`RECORD`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    about: About,
    /// The hash of the token streams.
    data_hash: String,
    /// The hash of the recipe.
    recipe_hash: String,
    /// The hash of the weights of the teacher, if there is one.
    #[serde(default, rename = "original_hash", skip_serializing_if = "Option::is_none")]
    teacher_hash: Option<String>,
    /// The hash of the weights of the model whose adapter is trained, if the run trains one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_hash: Option<String>,
    #[serde(rename = "best")]
    lowest_loss: Option<LowestLoss>,
    /// The values of [`Trainer::state`].
    trainer: Value,
}

/// A run to be resumed. While this value or the [`Run`] made from it lives, no other process trains in the folder.
pub struct Saved {
    /// The recipe in the folder, which the caller may change; [`Run::resume`] compares it with that of the checkpoint.
    pub recipe: Recipe,
    /// The inputs that the run was started with.
    pub about: About,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    folder: PathBuf,
    checkpoint: StoredCheckpoint,
    record: Record,
    /// Held by rank 0 alone.
    lock: Option<File>,
}

impl Saved {
    /// Opens the newest valid checkpoint in `folder`.
    ///
    /// # Errors
    /// - [`Error::Missing`] or [`Error::Empty`] if there is no run.
    /// - [`Error::RunLocked`] if another process trains there.
    /// - [`Error::Damaged`] if no checkpoint is valid.
    pub fn open(folder: &Path, group: &Group) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::Missing { path: folder.into(), what: "folder of a run" });
        }
        let store = Store::new(folder, System);
        let empty = || Error::Empty { path: folder.into(), reason: "there is no checkpoint" };
        if store.steps()?.is_empty() {
            // Before the lock, whose file would be new in a folder that holds no run.
            return Err(empty());
        }
        let lock = if group.leads() { Some(lock(folder)?) } else { None };
        let checkpoint = store.newest()?.ok_or_else(empty)?;
        let path = checkpoint.folder.join(RECORD);
        let record: Record = parse(&path, load_json(&path)?)?;
        if record.version != VERSION {
            return Err(Error::Foreign {
                path,
                kind: "training state",
                reason: format!("version {}; this program reads {VERSION}", record.version),
            });
        }
        Ok(Self {
            recipe: recipe(folder, &checkpoint.folder, group.leads())?,
            about: record.about.clone(),
            tokenizer: Tokenizer::load(&checkpoint.folder.join(checkpoint::TOKENIZER))?,
            folder: folder.into(),
            checkpoint,
            record,
            lock,
        })
    }

    /// What the model of the run has taken over from the one that its training started with.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub fn inherited(&self) -> Result<Inherited> {
        let folder = &self.checkpoint.folder;
        let generation = load_json(&folder.join(checkpoint::GENERATION))?;
        Ok(Inherited { generation, files: copied_files(folder)? })
    }

    /// The configuration of the model in the checkpoint. Unlike that of the recipe, it tells whether the model is one of
    /// another family.
    ///
    /// # Errors
    /// Names the file and every key or value that does not fit.
    pub fn model(&self) -> Result<ModelConfig> {
        let path = self.checkpoint.folder.join(checkpoint::CONFIG);
        let named = |problems| Error::Config { source_name: path.display().to_string(), problems };
        ModelConfig::from_json(load_json(&path)?).map_err(named)
    }

    /// The steps of newer checkpoints, and why they cannot be used.
    pub fn damaged(&self) -> &[(u64, String)] {
        &self.checkpoint.damaged
    }
}

/// A run in its folder. Every process of a group has one, and rank 0 writes.
pub struct Run {
    /// The model in training.
    pub trainer: Trainer,
    tokenizer: Tokenizer,
    record: Record,
    folder: PathBuf,
    store: Store,
    log: Option<Logger>,
    /// The step of the last checkpoint.
    saved: Option<u64>,
    /// Whether loss and gradient of the last step were finite. Otherwise the parameters are suspect.
    is_finite: bool,
    _lock: Option<File>,
}

impl Run {
    /// Starts a run in `folder` and writes its first checkpoint. A run or model in the folder is renamed.
    ///
    /// # Errors
    /// - [`Error::Occupied`] if the folder holds something else.
    /// - [`Error::RunLocked`] if another process trains there.
    /// - An error that names the file that cannot be written.
    pub fn create(folder: &Path, trainer: Trainer, tokenizer: Tokenizer, about: About) -> Result<Self> {
        check_sample_prompt(&trainer, &tokenizer)?;
        let record = Record {
            version: VERSION,
            about,
            data_hash: trainer.corpus().hash().to_hex().to_string(),
            recipe_hash: recipe_hash(trainer.recipe())?,
            teacher_hash: teacher_hash(&trainer),
            base_hash: base_hash(&trainer),
            lowest_loss: None,
            trainer: Value::Null,
        };
        let store = Store::new(folder, System);
        let (mut held, mut log) = (None, None);
        if trainer.group().leads() {
            prepare_folder(folder)?;
            held = Some(lock(folder)?);
            store.clean()?;
            write_file(&folder.join(RECIPE), &pretty(trainer.recipe())?)?;
            log = Some(open_log(folder, None, &trainer, &record.about)?);
        }
        let folder = folder.to_path_buf();
        let mut run = Self {
            trainer,
            tokenizer,
            record,
            folder,
            store,
            log,
            saved: None,
            is_finite: true,
            _lock: held,
        };
        run.save()?;
        Ok(run)
    }

    /// Resumes a run. `trainer` is a new trainer with its recipe, data and seed. The number of steps may differ from
    /// the saved one if no step that was done would have been another one.
    ///
    /// # Errors
    /// - [`Error::RunChanged`] if data, recipe, teacher or base are not those of the run.
    /// - [`Error::RunLength`] if the number of steps cannot change so.
    /// - An error that names the file that cannot be read or written.
    pub fn resume(saved: Saved, mut trainer: Trainer, device: &Device) -> Result<Self> {
        let Saved { folder, checkpoint, mut record, tokenizer, lock, .. } = saved;
        let data = trainer.corpus().hash().to_hex().to_string();
        require_same(&folder, RunInput::Data, Some(&record.data_hash), Some(&data))?;
        let teacher = teacher_hash(&trainer);
        require_same(&folder, RunInput::Teacher, record.teacher_hash.as_deref(), teacher.as_deref())?;
        let base = base_hash(&trainer);
        require_same(&folder, RunInput::Base, record.base_hash.as_deref(), base.as_deref())?;
        let path = checkpoint.folder.join(RECIPE);
        let trained: Recipe = parse(&path, load_json(&path)?)?;
        check_recipe(&folder, &trained, trainer.recipe(), checkpoint.step)?;
        let tensors = load_tensors(&checkpoint.folder.join(STATE), device)?;
        let values = record.trainer.take();
        let params = match trainer.base_hash() {
            Some(_) => adapter::load_tensors(&checkpoint.folder, device)?,
            None => load_tensors(&checkpoint.folder, device)?,
        };
        trainer.restore(&params, State { tensors, values })?;
        trainer.require_equal()?;
        record.recipe_hash = recipe_hash(trainer.recipe())?;
        let store = Store::new(&folder, System);
        let mut log = None;
        if trainer.group().leads() {
            store.clean()?;
            let log = log.insert(open_log(&folder, Some(checkpoint.step), &trainer, &record.about)?);
            for (step, reason) in checkpoint.damaged {
                let aside = store.set_aside(step)?;
                tracing::warn!(
                    "{reason}; renamed to {}, resumed from step {}",
                    aside.display(),
                    checkpoint.step
                );
                log.event(checkpoint.step, &Event::Fallback { reason });
            }
            write_file(&folder.join(RECIPE), &pretty(trainer.recipe())?)?;
        }
        let saved = Some(checkpoint.step);
        Ok(Self { trainer, tokenizer, record, folder, store, log, saved, is_finite: true, _lock: lock })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The inputs that the run was started with.
    pub fn about(&self) -> &About {
        &self.record.about
    }

    /// The lowest validation loss so far.
    pub fn lowest_loss(&self) -> Option<LowestLoss> {
        self.record.lowest_loss
    }

    /// The log; `None` in processes other than rank 0.
    pub fn log(&mut self) -> Option<&mut Logger> {
        self.log.as_mut()
    }

    /// Trains to the end of the run, for at most `limit` steps, or until `stop` is set. Saves a checkpoint every
    /// `save_every` steps, after every evaluation with the lowest loss so far, at the end, and, in a single process, before it
    /// returns an error; not after a step whose loss or gradient is not finite. Calls `watch` with the report of every step and the text that the model generated after
    /// it, if it is one of `sample_every` steps. Returns whether the run has reached its end.
    ///
    /// # Errors
    /// As [`Trainer::next_steps`], the error of `watch`, or an error that names the file that cannot be written.
    /// [`Error::Diverged`] has the path of the newest checkpoint, which is from before.
    pub fn train(
        &mut self,
        limit: Option<u64>,
        stop: &AtomicBool,
        watch: impl FnMut(&Step, Option<String>) -> Result<()>,
    ) -> Result<bool> {
        self.train_until(limit, stop, watch).map_err(|e| match self.trainer.diagnosed(e) {
            Error::Diverged { step, loss, lr, reason, .. } => {
                let checkpoint = self.saved.map(|saved| self.store.path(saved));
                Error::Diverged { step, loss, lr, reason, checkpoint }
            }
            other => {
                self.save_last_step();
                other
            }
        })
    }

    /// Saves the last step before an error ends the run, if its state is whole and usable. Several processes would have to
    /// save together, which they cannot after an error of one of them.
    fn save_last_step(&mut self) {
        if self.trainer.group().world() > 1 || !self.is_finite || self.saved == Some(self.trainer.step()) {
            return;
        }
        match self.save_usable() {
            Ok(()) => tracing::warn!("saved step {} before the error", self.trainer.step()),
            Err(e) => tracing::warn!("step {} could not be saved: {e}", self.trainer.step()),
        }
    }

    /// As [`Run::train`], without the path of the newest checkpoint in errors.
    fn train_until(
        &mut self,
        limit: Option<u64>,
        stop: &AtomicBool,
        mut watch: impl FnMut(&Step, Option<String>) -> Result<()>,
    ) -> Result<bool> {
        let end = limit.map_or(u64::MAX, |n| self.trainer.step().saturating_add(n));
        let end = end.min(self.trainer.steps());
        let every = self.trainer.recipe().train.save_every();
        while self.trainer.step() < end {
            let steps = self.trainer.next_steps()?;
            let lowest = self.report(steps, &mut watch)?;
            // Rank 0 alone evaluates, and a signal may reach a single process.
            let due = lowest || self.trainer.step().is_multiple_of(every);
            let [stop, save] = self.trainer.group().any([stop.load(Ordering::Relaxed), due]);
            if save && self.is_finite {
                self.save_usable()?;
            }
            if stop {
                break;
            }
        }
        let steps = self.trainer.drain(0)?;
        self.report(steps, &mut watch)?;
        self.save_usable()?;
        Ok(self.trainer.step() == self.trainer.steps())
    }

    /// Saves a checkpoint. Parameters that cannot be computed with are an error instead, so that the older checkpoints
    /// stay.
    fn save_usable(&mut self) -> Result<()> {
        if self.saved != Some(self.trainer.step()) {
            self.trainer.require_usable()?;
        }
        self.save().map(|_| ())
    }

    /// Logs the steps and calls `watch`; returns whether one of them has the lowest validation loss so far.
    fn report(
        &mut self,
        steps: Vec<Step>,
        watch: &mut impl FnMut(&Step, Option<String>) -> Result<()>,
    ) -> Result<bool> {
        let mut lowest = false;
        for step in steps {
            if let Some(log) = &mut self.log {
                log.step(&step);
            }
            self.is_finite = step.is_empty || (step.loss.is_finite() && step.grad_norm.is_finite());
            watch(&step, self.sample(step.step)?)?;
            lowest |= self.update_lowest_loss(&step);
        }
        Ok(lowest)
    }

    /// Every `sample_every` steps a text that the model generates, which is logged. Returns prompt and continuation.
    fn sample(&mut self, step: u64) -> Result<Option<String>> {
        let train = &self.trainer.recipe().train;
        let (Some(log), true) = (&mut self.log, train.sample_every.is_some_and(|n| step.is_multiple_of(n)))
        else {
            return Ok(None);
        };
        let (prompt, device) = (train.sample_prompt.clone(), self.trainer.device());
        let text = sample(&self.trainer.model, &self.tokenizer, &prompt, self.record.about.seed, device)?;
        let whole = format!("{prompt}{text}");
        log.event(step, &Event::Sample { prompt, text });
        Ok(Some(whole))
    }

    /// Returns whether the validation loss of this step is the lowest so far.
    fn update_lowest_loss(&mut self, step: &Step) -> bool {
        let Some(valid_loss) = step.valid_loss else { return false };
        let lowest = self.record.lowest_loss.is_none_or(|lowest| valid_loss < lowest.valid_loss);
        if lowest {
            self.record.lowest_loss = Some(LowestLoss { step: step.step, valid_loss });
        }
        lowest
    }

    /// Saves a checkpoint, unless there is one of this step, and returns its path. When it returns, the checkpoint is on
    /// the disk and has been read back. All processes of a group call this.
    ///
    /// # Errors
    /// Names the file and the reason. Older checkpoints are unchanged then.
    pub fn save(&mut self) -> Result<PathBuf> {
        let step = self.trainer.step();
        if self.saved == Some(step) {
            return Ok(self.store.path(step));
        }
        self.trainer.require_equal()?;
        let Some(log) = &mut self.log else {
            self.saved = Some(step);
            return Ok(self.store.path(step));
        };
        // The log must not lack a step of a checkpoint.
        log.sync();
        let State { tensors, values } = self.trainer.state()?;
        let record = Record { trainer: values, ..self.record.clone() };
        let (trainer, tokenizer) = (&self.trainer, &self.tokenizer);
        let lowest = self.record.lowest_loss.map(|lowest| lowest.step);
        let path = self.store.save(step, trainer.recipe().train.keep, lowest, |folder| {
            write_model(folder, trainer, tokenizer)?;
            folder.json(RECIPE, trainer.recipe())?;
            folder.tensors(STATE, &tensors)?;
            folder.json(RECORD, &record)
        })?;
        self.saved = Some(step);
        tracing::info!("saved {}", path.display());
        log.checkpoint(step);
        Ok(path)
    }

    /// Writes the finished model and the model card `card` into the folder of the run, and its evaluation, if there is a
    /// validation text, into the log. Rank 0 calls this.
    ///
    /// # Errors
    /// Names the file and the reason. The checkpoints are unchanged then.
    pub fn finish(&mut self, card: &str, result: Option<&Evaluation>) -> Result<()> {
        let (trainer, tokenizer) = (&self.trainer, &self.tokenizer);
        self.store.install(trainer.step(), |folder| {
            write_model(folder, trainer, tokenizer)?;
            match trainer.ema() {
                Some(ema) => folder.tensors(checkpoint::EMA_WEIGHTS, &ema.params().tensors()),
                None => Ok(()),
            }
        })?;
        write_file(&self.folder.join(checkpoint::CARD), card.as_bytes())?;
        let Some(log) = &mut self.log else { return Ok(()) };
        let (loss, bits_per_byte) = (result.map(|r| r.loss), result.map(|r| r.bits_per_byte));
        log.event(trainer.step(), &Event::End { loss, bits_per_byte, tokens: result.map(|r| r.tokens) });
        log.sync();
        Ok(())
    }
}

/// Writes the files of the model, or of its adapter, into a checkpoint folder, with those that it inherits.
fn write_model(folder: &mut FolderWriter, trainer: &Trainer, tokenizer: &Tokenizer) -> Result<()> {
    let config = trainer.model.config();
    folder.json(checkpoint::CONFIG, &config.to_json()?)?;
    match trainer.inherited() {
        Some(inherited) => {
            folder.json(checkpoint::GENERATION, &inherited.generation)?;
            inherited.files.iter().try_for_each(|(name, content)| folder.file(name, content))?;
        }
        None => folder.json(checkpoint::GENERATION, &generation_defaults())?,
    }
    folder.file(checkpoint::TOKENIZER, tokenizer.to_json()?.as_bytes())?;
    if let (Some(lora), Some(base)) = (&trainer.recipe().train.lora, trainer.base_hash()) {
        return adapter::write(folder, lora, config, trainer.params.tensors(), base);
    }
    for (name, text) in python_files(config) {
        folder.file(name, text.as_bytes())?;
    }
    folder.tensors(checkpoint::WEIGHTS, &trainer.params.tensors())
}

fn open_log(folder: &Path, resumed: Option<u64>, trainer: &Trainer, about: &About) -> Result<Logger> {
    let meter = Meter::new(trainer.recipe(), trainer.device(), trainer.group().world())?;
    let mut log = Logger::open(folder, resumed, meter);
    log.start(resumed.unwrap_or(0), trainer.params.count(), about.seed);
    Ok(log)
}

/// The recipe of a saved run: that in its folder, which may be longer than that of the checkpoint. If it is damaged, it is
/// renamed, and the one of the checkpoint takes its place.
fn recipe(folder: &Path, checkpoint: &Path, leads: bool) -> Result<Recipe> {
    let (path, copy) = (folder.join(RECIPE), checkpoint.join(RECIPE));
    let read = |path: &Path| -> Result<Recipe> { parse(path, load_json(path)?) };
    match read(&path) {
        Err(Error::Missing { .. }) => read(&copy),
        Err(e) => {
            let recipe = read(&copy)?;
            tracing::warn!("{e}; the copy in {} is used", checkpoint.display());
            if leads {
                let aside = folder.join(format!("{RECIPE}.damaged"));
                std::fs::rename(&path, &aside).map_err(|e| Error::write(&aside, e))?;
                write_file(&path, &pretty(&recipe)?)?;
            }
            Ok(recipe)
        }
        recipe => recipe,
    }
}

/// Checks that the model can continue the prompt of the samples, which it does first after many steps or at the end.
fn check_sample_prompt(trainer: &Trainer, tokenizer: &Tokenizer) -> Result<()> {
    let prompt = tokenizer.encode(&trainer.recipe().train.sample_prompt)?;
    check_prompt(&trainer.model, &prompt)
        .map_err(|e| Error::Invalid(format!("train.sample_prompt, as {} tokens: {e}", prompt.len())))
}
