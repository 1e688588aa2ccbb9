//! Training and test of a model on a task.

use std::time::Instant;

use candle_core::{DType, Device};
use gd_layer::Pass;
use gd_layer::mechanisms::AttentionMechanism;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::model::{TaskModel, mask, task_model, test};
use super::{ENCODER_DECODERS, Task, Test};
use crate::config::Recipe;
use crate::error::{Error, Result};
use crate::model::params::Params;
use crate::train::optimizer::{Optimizer, clip_scale, global_norm};

/// Positions of a batch in a test, at most, unless one example is longer.
const TEST_TOKENS: usize = 4096;

/// One trained and tested model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskRun {
    /// The name of the task.
    pub task: String,
    /// The mechanism's name.
    pub mechanism: String,
    /// The seed of the initialization and of the examples.
    pub seed: u64,
    /// The number of parameters.
    pub parameters: usize,
    /// The number of optimizer steps.
    pub steps: u64,
    /// Seconds of training and tests.
    pub seconds: f64,
    /// The mean training loss of the last tenth of the steps, in nats per answer.
    pub train_loss: f64,
    /// The tests, in their order.
    pub tests: Vec<TestResult>,
}

/// The answers of a model in one test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// The name of the test.
    pub name: String,
    /// Its size.
    pub size: f64,
    /// The share of correct answers.
    pub accuracy: f64,
    /// Wrong answers.
    pub errors: usize,
    /// All answers.
    pub answers: usize,
    /// The mean loss of the answers in nats.
    pub loss: f64,
    /// The share of correct answers without what the heads read.
    pub accuracy_without_reads: f64,
    /// The mean energy gate of the heads that select; 1 without one, none without heads that select.
    pub gate: Option<f64>,
}

/// What is trained on a task.
#[derive(Debug, Clone, Copy)]
pub struct Contender<'a> {
    /// The mechanism's name. One of [`ENCODER_DECODERS`](super::ENCODER_DECODERS) stands for an encoder-decoder with this
    /// attention, any other one for the decoder of the recipe.
    pub name: &'a str,
    /// The model and its training. An encoder-decoder has its width and vocabulary.
    pub recipe: &'a Recipe,
}

impl Contender<'_> {
    /// The attention between encoder and decoder; none for a decoder.
    pub(super) fn encoder_attention(&self) -> Result<Option<AttentionMechanism>> {
        if !ENCODER_DECODERS.contains(&self.name) {
            return Ok(None);
        }
        let unknown = || Error::Invalid(format!("{}: no such mechanism", self.name));
        AttentionMechanism::named(self.name).map(Some).ok_or_else(unknown)
    }
}

/// What a run reports.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// A training step is done: its number from 1, and its loss.
    Step(u64, f64),
    /// A test is done.
    Test(&'a TestResult),
}

/// A generator of examples from a seed and a purpose.
fn generator(seed: u64, purpose: &str) -> ChaCha8Rng {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// Trains a model on a task and tests it in every test of at most `longest` positions. A training batch has
/// `train.batch * train.context` positions, about. The examples depend on task and seed, not on the model; those of the
/// tests are the same for every seed.
///
/// # Errors
/// A recipe that contradicts itself, a loss that is not finite, an error of the device or of `watch`.
pub fn run(
    task: &dyn Task,
    contender: Contender,
    seed: u64,
    longest: usize,
    device: &Device,
    mut watch: impl FnMut(Progress) -> Result<()>,
) -> Result<TaskRun> {
    let started = Instant::now();
    let params = Params::new(seed, DType::F32, device);
    let recipe = contender.recipe;
    let model = task_model(task, &contender, params.builder())?;
    let train_loss = train(task, recipe, seed, (&*model, &params), &mut watch)?;
    let frozen = task_model(task, &contender, params.frozen())?;
    let mut tests = Vec::new();
    for test in task.tests().iter().filter(|test| test.length <= longest) {
        let result = examine(task, test, &*frozen)?;
        watch(Progress::Test(&result))?;
        tests.push(result);
    }
    Ok(TaskRun {
        task: task.name().into(),
        mechanism: contender.name.into(),
        seed,
        parameters: params.count(),
        steps: recipe.train.steps,
        seconds: started.elapsed().as_secs_f64(),
        train_loss,
        tests,
    })
}

/// Trains the model; returns the mean loss of the last tenth of the steps.
fn train(
    task: &dyn Task,
    recipe: &Recipe,
    seed: u64,
    (model, params): (&dyn TaskModel, &Params),
    watch: &mut impl FnMut(Progress) -> Result<()>,
) -> Result<f64> {
    let (train, vars, mask) = (&recipe.train, params.vars(), mask());
    let mut optimizer = Optimizer::new(vars.clone(), train.adamw, train.muon)?;
    let mut rng = generator(seed, &format!("training of {}", task.name()));
    let (mut sum, mut count) = (0.0, 0u64);
    for step in 0..train.steps {
        let examples = task.train(train.batch * train.context, &mut rng);
        if step == 0 && train.select.calibrate_thresholds {
            model.calibrate(&examples, params)?;
        }
        let pass = train.select.pass(&mask, step as f64 / train.steps.max(1) as f64);
        let loss = model.loss(&examples, &pass)?;
        let store = loss.backward()?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            return Err(Error::NotFinite { what: "the loss", value, token: step as usize });
        }
        let scale = clip_scale(global_norm(&vars, &store)?, train.clip)?;
        optimizer.step(&store, train.lr.lr(step, train.steps), scale)?;
        if step >= train.steps - train.steps.div_ceil(10) {
            (sum, count) = (sum + value, count + 1);
        }
        watch(Progress::Step(step + 1, value))?;
    }
    Ok(sum / count.max(1) as f64)
}

/// Tests a model.
fn examine(task: &dyn Task, of: &Test, model: &dyn TaskModel) -> Result<TestResult> {
    let mut rng = generator(0, &format!("test {} of {}", of.name, task.name()));
    let (rows, mask) = ((TEST_TOKENS / of.length).max(1), mask());
    let (mut loss, mut correct, mut answers, mut without) = (0.0, 0, 0, 0);
    let mut left = of.examples;
    while left > 0 {
        let examples = task.test(of, rows.min(left), &mut rng);
        left -= examples.rows.min(left);
        let (sum, right, all) = test(model, &examples, &Pass::new(&mask))?;
        (loss, correct, answers) = (loss + sum, correct + right, answers + all);
        without += test(model, &examples, &Pass { cut_reads: true, ..Pass::new(&mask) })?.1;
    }
    let share = |n: usize| n as f64 / answers.max(1) as f64;
    Ok(TestResult {
        name: of.name.clone(),
        size: of.size,
        accuracy: share(correct),
        errors: answers - correct,
        answers,
        loss: loss / answers.max(1) as f64,
        accuracy_without_reads: share(without),
        gate: model.gate(&task.test(of, 1, &mut generator(1, "the gate")))?,
    })
}
