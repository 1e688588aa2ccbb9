//! Tasks that need attention, made on the fly from a seed: a model is trained on small sizes and tested far outside them.
//!
//! A [`Task`] generates [`Examples`]: inputs, and the answer that the model has to give at some of the positions. Loss and
//! accuracy are those of the answers alone. [`run()`] trains a model on a task and tests it. A further task is a module
//! with an implementation of [`Task`], and a line in [`TASKS`].

mod composition;
mod copying;
mod flip_flop;
mod induction;
mod max_retrieval;
mod model;
mod mqar;
mod needle;
mod preset;
mod run;

use candle_core::{Device, Tensor};
use gd_kernels::cross_entropy::IGNORE;
use rand_chacha::ChaCha8Rng;

pub use self::composition::Composition;
pub use self::copying::Copying;
pub use self::flip_flop::FlipFlop;
pub use self::induction::InductionHeads;
pub use self::max_retrieval::MaxRetrieval;
pub use self::model::ENCODER_DECODERS;
pub use self::mqar::Mqar;
pub use self::needle::Needle;
pub use self::preset::Preset;
pub use self::run::{Contender, Progress, TaskRun, TestResult, run};
use crate::config::nearest;
use crate::error::{Error, Result};

/// A task.
pub trait Task: Sync {
    /// The name on the command line.
    fn name(&self) -> &'static str;

    /// The definition in one line, with its source.
    fn about(&self) -> &'static str;

    /// The model and the training that a CPU completes in minutes.
    fn preset(&self) -> Preset;

    /// The mechanisms that the task compares unless others are named; none for selection and its controls.
    fn mechanisms(&self) -> Option<&'static [&'static str]> {
        None
    }

    /// Whether an example is a string, and then one that is written from it: what an encoder-decoder can do.
    fn writes_a_string(&self) -> bool {
        false
    }

    /// The number of features of an item, for a task whose inputs are not tokens.
    fn features(&self) -> Option<usize> {
        None
    }

    /// A batch of training examples with about `tokens` positions in total.
    fn train(&self, tokens: usize, rng: &mut ChaCha8Rng) -> Examples;

    /// The tests, in the order of the figure.
    fn tests(&self) -> Vec<Test>;

    /// A batch of `rows` examples of a test.
    fn test(&self, test: &Test, rows: usize, rng: &mut ChaCha8Rng) -> Examples;
}

/// A test of a task: examples of one size.
#[derive(Debug, Clone, PartialEq)]
pub struct Test {
    /// The name, such as `256 pairs`.
    pub name: String,
    /// The size on the axis of the figure.
    pub size: f64,
    /// Positions of an example.
    pub length: usize,
    /// The number of examples.
    pub examples: usize,
}

impl Test {
    /// Tests with the names `SIZE UNIT`, and at least `examples` examples each.
    fn of_sizes(
        sizes: &[usize],
        unit: &str,
        length: impl Fn(usize) -> usize,
        examples: impl Fn(usize) -> usize,
    ) -> Vec<Self> {
        let test = |&n: &usize| Self {
            name: format!("{n} {unit}"),
            size: n as f64,
            length: length(n),
            examples: examples(n).max(1),
        };
        sizes.iter().map(test).collect()
    }
}

/// What a model reads.
#[derive(Debug, Clone, PartialEq)]
pub enum Inputs {
    /// Tokens `[B, N]`.
    Tokens(Vec<u32>),
    /// Features of items `[B, N, F]`.
    Features(Vec<f32>),
}

/// A batch of examples of one length.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// B.
    pub rows: usize,
    /// N.
    pub length: usize,
    /// What the model reads.
    pub inputs: Inputs,
    /// The answer after each position `[B, N]`; [`IGNORE`] where none is asked for.
    pub answers: Vec<u32>,
}

impl Examples {
    /// At least one and else `rows` examples, whose tokens and answers `example` makes, all of one length.
    fn of_tokens(rows: usize, mut example: impl FnMut() -> (Vec<u32>, Vec<u32>)) -> Self {
        let (tokens, answers): (Vec<_>, Vec<_>) = (0..rows.max(1)).map(|_| example()).unzip();
        let (rows, length) = (tokens.len(), tokens.first().map_or(0, Vec::len));
        Self { rows, length, inputs: Inputs::Tokens(tokens.concat()), answers: answers.concat() }
    }

    /// The inputs `[B, N]` (u32) or `[B, N, F]` (f32) on a device.
    fn inputs(&self, device: &Device) -> Result<Tensor> {
        let (b, n) = (self.rows, self.length);
        Ok(match &self.inputs {
            Inputs::Tokens(ids) => Tensor::from_slice(ids, (b, n), device)?,
            Inputs::Features(x) => Tensor::from_slice(x, (b, n, x.len() / (b * n)), device)?,
        })
    }
}

/// No answers for `n` positions.
fn no_answers(n: usize) -> Vec<u32> {
    vec![IGNORE; n]
}

/// All tasks.
pub const TASKS: &[&dyn Task] = &[
    &Mqar::SMALL,
    &Mqar::ZOOLOGY,
    &MaxRetrieval,
    &FlipFlop,
    &Copying::COPY,
    &Copying::REVERSE,
    &Copying::SORT,
    &Copying::SELECTIVE,
    &InductionHeads,
    &Needle,
    &Composition,
];

/// The task of this name.
///
/// # Errors
/// [`Error::UnknownName`] with the names of all tasks.
pub fn named(name: &str) -> Result<&'static dyn Task> {
    let names: Vec<&str> = TASKS.iter().map(|task| task.name()).collect();
    TASKS.iter().copied().find(|task| task.name() == name).ok_or_else(|| Error::UnknownName {
        what: "task",
        name: name.into(),
        allowed: names.iter().map(|&name| name.to_owned()).collect(),
        suggestion: nearest(name, &names),
    })
}
