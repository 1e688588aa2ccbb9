//! A training run in a folder, which can be stopped anywhere and goes on to the same bits.
//!
//! | in the folder | content |
//! |---|---|
//! | `recipe.json` | the resolved configuration, written at the start |
//! | `train.jsonl`, `tb/` | the log ([`crate::train::log`]), cut back to the step that a run is resumed from |
//! | `checkpoint-STEP/` | model, recipe, training state, manifest ([`crate::io::checkpoint::Store`]); the first at step 0 |
//! | `config.json`, `model.safetensors`, … | the model at the end of the run, with a manifest of its own |
//!
//! Learning rate, schedules and the order of the data are functions of the seed and the step, and a checkpoint
//! is written between two steps, when no micro-batch is pending: all else that counts is in
//! [`Trainer::state`].

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::Device;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::{Precision, Recipe};
use crate::error::{Error, Result};
use crate::eval::Evaluation;
use crate::infer::generate::sample;
use crate::io::checkpoint::{self, Disk, Filling, Found, Store, System, load_json, load_tensors, write_file};
use crate::io::tokenizer::Tokenizer;
use crate::model::pretrained::{generation, python};
use crate::train::log::{Event, Logger, Meter};
use crate::train::parallel::Group;
use crate::train::state::State;
use crate::train::{Step, Trainer};

/// The resolved configuration in the folder of a run.
pub const RECIPE: &str = "recipe.json";
/// The tensors of the training state in a checkpoint.
pub const STATE: &str = "state.safetensors";
/// The rest of the training state in a checkpoint.
pub const RECORD: &str = "trainer_state.json";

/// The form of [`RECORD`].
const VERSION: u32 = 1;

/// What a run is started with besides its recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct About {
    /// What the model is called.
    pub name: String,
    /// Files and folders of text; none for the shipped text.
    pub data: Vec<PathBuf>,
    /// The seed of the parameters and of the order of the data.
    pub seed: u64,
}

/// The least loss of all looks at the validation text so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps done at that look.
    pub step: u64,
    /// Nats per token.
    pub valid_loss: f64,
}

/// The content of [`RECORD`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    about: About,
    /// Hash of the token streams.
    data_hash: String,
    /// Hash of the recipe.
    recipe_hash: String,
    /// Hash of the weights of the model that this one learns from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    original_hash: Option<String>,
    best: Option<Best>,
    /// The values of [`Trainer::state`].
    trainer: Value,
}

/// A run found in its folder, to be resumed. While this or the [`Run`] made from it lives, no other run writes
/// to the folder.
pub struct Saved {
    /// The recipe: that of the folder, which [`Run::resume`] compares with that of the checkpoint.
    pub recipe: Recipe,
    /// What the run was started with.
    pub about: About,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    folder: PathBuf,
    found: Found,
    record: Record,
    /// Only the process that writes has one.
    lock: Option<File>,
}

impl Saved {
    /// Finds the newest checkpoint in `folder` that is whole.
    ///
    /// # Errors
    /// No run is there, another process trains there, or no checkpoint is whole.
    pub fn open(folder: &Path, group: &Group) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::Missing { path: folder.into(), what: "folder of a run" });
        }
        let lock = if group.leads() { Some(lock(folder)?) } else { None };
        let found = Store::new(folder, System).newest()?;
        let found = found.ok_or(Error::Empty { path: folder.into(), reason: "there is no checkpoint" })?;
        let read = |name: &str| load_json(&found.folder.join(name));
        let record: Record = parse(&found.folder.join(RECORD), read(RECORD)?)?;
        if record.version != VERSION {
            return Err(Error::Foreign {
                path: found.folder.join(RECORD),
                kind: "training state",
                reason: format!("version {}, but {VERSION} is known", record.version),
            });
        }
        let recipe = folder.join(RECIPE);
        let recipe = if recipe.exists() { recipe } else { found.folder.join(RECIPE) };
        Ok(Self {
            recipe: parse(&recipe, load_json(&recipe)?)?,
            about: record.about.clone(),
            tokenizer: Tokenizer::load(&found.folder.join(checkpoint::TOKENIZER))?,
            folder: folder.into(),
            found,
            record,
            lock,
        })
    }

    /// Newer checkpoints, and why they cannot be used.
    pub fn damaged(&self) -> &[(u64, String)] {
        &self.found.damaged
    }
}

/// A run in its folder. In a group of processes every one has it, and the one that leads writes.
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
    _lock: Option<File>,
}

impl Run {
    /// Starts a run in `folder` and saves its first checkpoint, so that it is known from the start that
    /// there can be more. A run or model that is in the folder is kept under another name.
    ///
    /// # Errors
    /// The folder holds something else, another process trains there, or it cannot be written.
    pub fn create(folder: &Path, trainer: Trainer, tokenizer: Tokenizer, about: About) -> Result<Self> {
        let record = Record {
            version: VERSION,
            about,
            data_hash: trainer.corpus().hash().to_hex().to_string(),
            recipe_hash: recipe_hash(trainer.recipe())?,
            original_hash: original_hash(&trainer),
            best: None,
            trainer: Value::Null,
        };
        let store = Store::new(folder, System);
        let (mut held, mut log) = (None, None);
        if trainer.group().leads() {
            make_room(folder)?;
            held = Some(lock(folder)?);
            store.clean()?;
            write_file(&folder.join(RECIPE), &pretty(trainer.recipe())?)?;
            log = Some(open_log(folder, 0, &trainer, &record.about)?);
        }
        let folder = folder.to_path_buf();
        let mut run = Self { trainer, tokenizer, record, folder, store, log, saved: None, _lock: held };
        run.save()?;
        Ok(run)
    }

    /// Goes on with a run; `trainer` was made from its recipe, its data and its seed. Its number of steps
    /// may differ from the saved one where every step so far would have been the same.
    ///
    /// # Errors
    /// Data or recipe are not those of the run; names both hashes. Or the folder cannot be written.
    pub fn resume(saved: Saved, mut trainer: Trainer, device: &Device) -> Result<Self> {
        let Saved { folder, found, mut record, tokenizer, lock, .. } = saved;
        let data = trainer.corpus().hash().to_hex().to_string();
        if data != record.data_hash {
            return Err(changed(&folder, "data", &record.data_hash, &data));
        }
        let original = original_hash(&trainer);
        if original != record.original_hash {
            let [old, new] = [&record.original_hash, &original].map(|hash| hash.as_deref().unwrap_or("none"));
            return Err(changed(&folder, "model that this one learns from", old, new));
        }
        let trained: Recipe = parse(&found.folder.join(RECIPE), load_json(&found.folder.join(RECIPE))?)?;
        check_recipe(&folder, &trained, trainer.recipe(), found.step)?;
        let tensors = load_tensors(&found.folder.join(STATE), device)?;
        let values = record.trainer.take();
        trainer.restore(&load_tensors(&found.folder, device)?, State { tensors, values })?;
        trainer.require_equal()?;
        record.recipe_hash = recipe_hash(trainer.recipe())?;
        let store = Store::new(&folder, System);
        let mut log = None;
        if trainer.group().leads() {
            store.clean()?;
            let log = log.insert(open_log(&folder, found.step, &trainer, &record.about)?);
            for (step, reason) in found.damaged {
                let aside = store.set_aside(step)?;
                tracing::warn!("{reason}; kept as {}, resumed from step {}", aside.display(), found.step);
                log.event(found.step, &Event::Fallback { reason })?;
            }
            write_file(&folder.join(RECIPE), &pretty(trainer.recipe())?)?;
        }
        Ok(Self { trainer, tokenizer, record, folder, store, log, saved: Some(found.step), _lock: lock })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the run was started with.
    pub fn about(&self) -> &About {
        &self.record.about
    }

    /// The least validation loss so far, and when it was.
    pub fn best(&self) -> Option<Best> {
        self.record.best
    }

    /// The log, for the process that leads.
    pub fn log(&mut self) -> Option<&mut Logger> {
        self.log.as_mut()
    }

    /// Trains to the end of the run, for at most `limit` steps, or until `stop` is set, and saves
    /// checkpoints on the way: every `save_every` steps, with every best look at the validation text, and
    /// wherever it ends. Says whether the run has come to its end. `watch` sees every step, and the samples.
    ///
    /// # Errors
    /// As [`Trainer::advance`], or the file that cannot be written.
    pub fn train(
        &mut self,
        limit: Option<u64>,
        stop: &AtomicBool,
        mut watch: impl FnMut(&Step, Option<String>) -> Result<()>,
    ) -> Result<bool> {
        let end = limit.map_or(u64::MAX, |n| self.trainer.step().saturating_add(n));
        let end = end.min(self.trainer.steps());
        let every = self.trainer.recipe().train.save_every();
        while self.trainer.step() < end {
            let steps = self.trainer.proceed()?;
            let best = self.tell(steps, &mut watch)?;
            // Only the process that leads looks at the validation text, and a signal may reach only one.
            let due = best || self.trainer.step().is_multiple_of(every);
            let [stop, save] = self.trainer.group().any([stop.load(Ordering::Relaxed), due]);
            if save {
                self.save()?;
            }
            if stop {
                break;
            }
        }
        let steps = self.trainer.settle()?;
        self.tell(steps, &mut watch)?;
        self.save()?;
        Ok(self.trainer.step() == self.trainer.steps())
    }

    /// Logs the figures of these steps and shows them; says whether one of them has the best validation loss.
    fn tell(
        &mut self,
        steps: Vec<Step>,
        watch: &mut impl FnMut(&Step, Option<String>) -> Result<()>,
    ) -> Result<bool> {
        let mut best = false;
        for step in steps {
            if let Some(log) = &mut self.log {
                log.step(&step)?;
            }
            watch(&step, self.sample(step.step)?)?;
            best |= self.note(&step);
        }
        Ok(best)
    }

    /// Every `sample_every` steps a look at what the model writes, prompt and continuation, which is logged.
    fn sample(&mut self, step: u64) -> Result<Option<String>> {
        let train = &self.trainer.recipe().train;
        let (Some(log), true) = (&mut self.log, train.sample_every.is_some_and(|n| step.is_multiple_of(n)))
        else {
            return Ok(None);
        };
        let (prompt, device) = (train.sample_prompt.clone(), self.trainer.device());
        let text = sample(&self.trainer.model, &self.tokenizer, &prompt, self.record.about.seed, device)?;
        let whole = format!("{prompt}{text}");
        log.event(step, &Event::Sample { prompt, text })?;
        Ok(Some(whole))
    }

    /// Keeps the best look at the validation text; says whether it was this one.
    fn note(&mut self, step: &Step) -> bool {
        let Some(valid_loss) = step.valid_loss else { return false };
        let best = self.record.best.is_none_or(|best| valid_loss < best.valid_loss);
        if best {
            self.record.best = Some(Best { step: step.step, valid_loss });
        }
        best
    }

    /// Saves a checkpoint, unless there is one of this step. What this returns is on the disk and has been
    /// read back. All processes of a group take part.
    ///
    /// # Errors
    /// Names the file and the reason; older checkpoints are as they were.
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
        // A checkpoint never knows more steps than the log.
        log.sync()?;
        let State { tensors, values } = self.trainer.state()?;
        let record = Record { trainer: values, ..self.record.clone() };
        let (trainer, tokenizer) = (&self.trainer, &self.tokenizer);
        let best = self.record.best.map(|best| best.step);
        let path = self.store.save(step, trainer.recipe().train.keep, best, |folder| {
            write_model(folder, trainer, tokenizer)?;
            folder.json(RECIPE, trainer.recipe())?;
            folder.tensors(STATE, &tensors)?;
            folder.json(RECORD, &record)
        })?;
        self.saved = Some(step);
        tracing::info!("saved {}", path.display());
        log.event(step, &Event::Checkpoint { path: format!("checkpoint-{step}") })?;
        Ok(path)
    }

    /// Puts the model into the folder itself, with its card. For the process that leads.
    ///
    /// # Errors
    /// Names the file and the reason; the checkpoints are as they were.
    pub fn finish(&mut self, card: &str, result: &Evaluation) -> Result<()> {
        let (trainer, tokenizer) = (&self.trainer, &self.tokenizer);
        self.store.install(|folder| {
            write_model(folder, trainer, tokenizer)?;
            match trainer.ema() {
                Some(ema) => folder.tensors(checkpoint::EMA_WEIGHTS, &ema.params().tensors()),
                None => Ok(()),
            }
        })?;
        write_file(&self.folder.join(checkpoint::CARD), card.as_bytes())?;
        let Some(log) = &mut self.log else { return Ok(()) };
        let Evaluation { loss, bits_per_byte, tokens, .. } = *result;
        log.event(trainer.step(), &Event::End { loss, bits_per_byte, tokens })?;
        log.sync()
    }
}

/// Writes the files of the model into the folder of a checkpoint, with those that go with its original.
fn write_model(folder: &mut Filling, trainer: &Trainer, tokenizer: &Tokenizer) -> Result<()> {
    let config = trainer.model.config();
    folder.json(checkpoint::CONFIG, &config.to_json()?)?;
    match trainer.original() {
        Some(original) => {
            folder.json(checkpoint::GENERATION, &original.generation)?;
            original.files.iter().try_for_each(|(name, content)| folder.file(name, content))?;
        }
        None => folder.json(checkpoint::GENERATION, &generation())?,
    }
    folder.file(checkpoint::TOKENIZER, tokenizer.to_json()?.as_bytes())?;
    for (name, text) in python(config) {
        folder.file(name, text.as_bytes())?;
    }
    folder.tensors(checkpoint::WEIGHTS, &trainer.params.tensors())
}

fn open_log(folder: &Path, step: u64, trainer: &Trainer, about: &About) -> Result<Logger> {
    let meter = Meter::new(trainer.recipe(), trainer.device(), trainer.group().world())?;
    let mut log = Logger::open(folder, step, meter)?;
    log.start(step, trainer.params.count(), about.seed)?;
    Ok(log)
}

/// Makes `folder` exist without a run in it.
fn make_room(folder: &Path) -> Result<()> {
    let unwritable = |e| Error::write(folder, e);
    if folder.symlink_metadata().is_err() {
        return fs::create_dir_all(folder).map_err(unwritable);
    }
    let kept = folder.is_dir() && {
        let model = folder.join(checkpoint::CONFIG).exists();
        model || !Store::new(folder, System).steps()?.is_empty()
    };
    if !kept {
        // Nothing, or a run that ended before it had anything to keep.
        let ours = |name: &String| {
            name.starts_with('.')
                || [RECIPE, crate::train::log::FILE, crate::train::log::TENSORBOARD].contains(&name.as_str())
        };
        let begun = folder.join(RECIPE).exists() && System.list(folder).is_ok_and(|all| all.iter().all(ours));
        return if begun { Ok(()) } else { checkpoint::check_replaceable(folder) };
    }
    // Not from under a process that trains there.
    let _lock = lock(folder)?;
    let name = |n: u32| {
        let mut name = folder.as_os_str().to_os_string();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let free = (1..).map(name).find(|path| path.symlink_metadata().is_err());
    let aside = free.ok_or_else(|| Error::Occupied { path: folder.into() })?;
    fs::rename(folder, &aside).map_err(|e| Error::write(&aside, e))?;
    tracing::warn!("{}: what was there is kept as {}", folder.display(), aside.display());
    fs::create_dir(folder).map_err(unwritable)
}

/// Makes this process the only one that writes to a run; it ends with the process, however that ends.
fn lock(folder: &Path) -> Result<File> {
    let file = File::open(folder).map_err(|e| Error::read(folder, "folder", e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::Invalid(format!("{}: another process is training there", folder.display())))
        }
        Err(TryLockError::Error(e)) => Err(Error::write(folder, e)),
    }
}

/// Fails unless a run of the recipe `trained` can go on with `now` after `step` steps.
fn check_recipe(folder: &Path, trained: &Recipe, now: &Recipe, step: u64) -> Result<()> {
    let mut as_long = now.clone();
    as_long.train.steps = trained.train.steps;
    let (old, new) = (recipe_hash(trained)?, recipe_hash(&as_long)?);
    if old != new {
        return Err(changed(folder, "configuration", &old, &new));
    }
    let (from, to) = (trained.train.steps, now.train.steps);
    if to < step {
        let text = format!("{}: the run has done {step} steps already, more than {to}", folder.display());
        return Err(Error::Invalid(text));
    }
    let differs = |s: &u64| trained.train.scheduled(*s) != now.train.scheduled(*s);
    match (0..step).find(differs) {
        Some(at) if from != to => Err(Error::Invalid(format!(
            "{}: a run of {from} steps cannot go on as one of {to}: step {} would have been another one",
            folder.display(),
            at + 1
        ))),
        _ => Ok(()),
    }
}

fn changed(folder: &Path, what: &str, old: &str, new: &str) -> Error {
    let short = |hash: &str| hash.chars().take(16).collect::<String>();
    Error::Invalid(format!(
        "{}: the {what} changed since the run was saved: its hash was {} and is {}",
        folder.display(),
        short(old),
        short(new)
    ))
}

fn original_hash(trainer: &Trainer) -> Option<String> {
    trainer.original().map(|original| original.hash().to_hex().to_string())
}

/// Hash of everything in a recipe that the result depends on.
fn recipe_hash(recipe: &Recipe) -> Result<String> {
    let mut recipe = recipe.clone();
    (recipe.train.save_every, recipe.train.keep, recipe.train.sample_every) = (None, 0, None);
    recipe.train.sample_prompt.clear();
    recipe.train.precision = recipe.train.precision.filter(|p| *p != Precision::F32);
    // What counts are its weights, which have a hash of their own.
    if let Some(uptrain) = &mut recipe.train.uptrain {
        uptrain.original.clear();
    }
    Ok(blake3::hash(&pretty(&recipe)?).to_hex().to_string())
}

fn pretty(recipe: &Recipe) -> Result<Vec<u8>> {
    let json = serde_json::to_value(recipe)
        .map_err(|e| Error::Invalid(format!("the recipe does not fit JSON: {e}")))?;
    Ok(format!("{json:#}\n").into_bytes())
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, json: Value) -> Result<T> {
    serde_json::from_value(json).map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))
}
