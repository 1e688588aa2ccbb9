//! What a run leaves behind while it trains: `train.jsonl`, the truth, and TensorBoard's scalar
//! files made from it.
//!
//! A line of `train.jsonl` is one JSON object: a step, or an event, which has the key
//! `event` ([`Event`]). Both have `step` and `time` (seconds since 1970). Lines are written at once
//! and stand in the order of their steps.

mod jsonl;
mod tensorboard;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

pub use jsonl::{Jsonl, read};
pub use tensorboard::TensorBoard;

use crate::error::{Error, Result};

/// The log in the folder of a run.
pub const FILE: &str = "train.jsonl";
/// The folder of TensorBoard's files in the folder of a run.
pub const TENSORBOARD: &str = "tb";

/// Something that happened besides the steps.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The run began, or went on.
    Start {
        /// Version of the program.
        version: &'static str,
        /// The device, in words.
        device: String,
        /// Threads of the CPU.
        threads: usize,
        /// Parameters of the model.
        parameters: usize,
        /// The seed.
        seed: u64,
        /// Rate of the matrix product to which `mfu` relates, FLOP/s; null if unknown.
        peak_flops: Option<f64>,
        /// Floating-point operations a training token costs.
        flops_per_token: f64,
    },
    /// A checkpoint was saved and read back.
    Checkpoint {
        /// Its folder.
        path: String,
    },
    /// The newest checkpoint could not be used, so an older one was taken.
    Fallback {
        /// What was wrong with the newer one.
        reason: String,
    },
    /// An update was left out.
    Skip {
        /// Why.
        reason: String,
    },
    /// Text that the model generated.
    Sample {
        /// What it continued.
        prompt: String,
        /// The continuation.
        text: String,
    },
    /// The run is complete: the measures of the whole validation text.
    End {
        /// Loss, nats per token.
        loss: f64,
        /// Bits per byte.
        bits_per_byte: f64,
        /// Predicted tokens.
        tokens: usize,
    },
}

/// The log of a run, open for writing.
#[derive(Debug)]
pub struct Logger {
    jsonl: Jsonl,
    tensorboard: TensorBoard,
}

impl Logger {
    /// Opens the log in the folder `run`, which exists, and cuts it back to what was written up to
    /// the end of `step`; 0 starts it anew. TensorBoard's files are made again from what is left.
    ///
    /// # Errors
    /// Names the file that cannot be read or written.
    pub fn open(run: &Path, step: u64) -> Result<Self> {
        let jsonl = Jsonl::open(&run.join(FILE), step)?;
        let mut tensorboard = TensorBoard::create(&run.join(TENSORBOARD), now())?;
        for line in read(&run.join(FILE))? {
            tensorboard.line(&line)?;
        }
        Ok(Self { jsonl, tensorboard })
    }

    /// Writes the line of a step: the fields of `line`, among them `step`, and the time. Its numbers
    /// become scalars of TensorBoard, nested ones with a `/` in their name.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn step(&mut self, line: &impl Serialize) -> Result<()> {
        let line = object(line)?;
        self.jsonl.append(&line)?;
        self.tensorboard.line(&line)
    }

    /// Writes an event that happened after `step` steps.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn event(&mut self, step: u64, event: &Event) -> Result<()> {
        let mut line = object(event)?;
        line.insert("step".into(), step.into());
        self.jsonl.append(&line)
    }

    /// Makes sure that what was written stays, whatever happens to the machine.
    ///
    /// # Errors
    /// Names the file.
    pub fn sync(&mut self) -> Result<()> {
        self.jsonl.sync()
    }
}

/// A line with the time of now.
fn object(line: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(line) {
        Ok(Value::Object(mut object)) => {
            object.insert("time".into(), now().into());
            Ok(object)
        }
        other => Err(Error::Invalid(format!("a line of the log is no JSON object: {other:?}"))),
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
