//! The log of a run: `train.jsonl`, and files for TensorBoard that are made from it.
//!
//! A line of `train.jsonl` is one JSON object: a step ([`Line`]), or an event ([`Event`]), which has the key `event`.
//! Both have the keys `step` and `time` (seconds since 1970). Lines are in the order of their steps and are written
//! without buffering.

mod jsonl;
mod meter;
mod tensorboard;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value};

pub use jsonl::{Jsonl, read};
pub use meter::{Line, Meter};
pub use tensorboard::TensorBoard;

use crate::error::{Error, Result};
use crate::train::step::Step;

/// The file of the log in the folder of a run.
pub const FILE: &str = "train.jsonl";
/// The folder of the files for TensorBoard in the folder of a run.
pub const TENSORBOARD: &str = "tb";

/// An event of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// The run was started or resumed.
    Start {
        /// The version of the program.
        version: &'static str,
        /// The name of the device, such as `cuda:0`.
        device: String,
        /// The precision, as in a configuration.
        precision: &'static str,
        /// The number of CPU threads.
        threads: usize,
        /// The number of parameters.
        parameters: usize,
        /// The seed of the parameters and of the order of the data.
        seed: u64,
        /// The rate of a matrix product in FLOP/s, the denominator of `mfu`.
        peak_flops: f64,
        /// Floating-point operations per training token.
        flops_per_token: f64,
    },
    /// A checkpoint was saved and verified.
    Checkpoint {
        /// The name of its folder.
        path: String,
    },
    /// The run was resumed from an older checkpoint, because the newest one could not be used.
    Fallback {
        /// Why the newest checkpoint could not be used.
        reason: String,
    },
    /// An update was skipped, by the guard or because no token was predicted.
    Skip {
        /// Why.
        reason: String,
    },
    /// Text that the model generated.
    Sample {
        /// The prompt.
        prompt: String,
        /// The continuation.
        text: String,
    },
    /// The end of the run, with the evaluation on the whole validation text if there is one.
    End {
        /// The loss in nats per token.
        #[serde(skip_serializing_if = "Option::is_none")]
        loss: Option<f64>,
        /// Bits per byte.
        #[serde(skip_serializing_if = "Option::is_none")]
        bits_per_byte: Option<f64>,
        /// The number of predicted tokens.
        #[serde(skip_serializing_if = "Option::is_none")]
        tokens: Option<usize>,
    },
}

/// The log of a run, open for writing. A log that cannot be written does not end the run: the first error is a warning, and
/// [`Logger::failure`] returns it.
#[derive(Debug)]
pub struct Logger {
    jsonl: Option<Jsonl>,
    tensorboard: Option<TensorBoard>,
    meter: Meter,
    failure: Option<String>,
}

impl Logger {
    /// Opens the log in the existing folder `run`: that of a new run, or of one that is resumed from the checkpoint of step
    /// `resumed`. Lines of later steps are removed; step 0 and a new run remove all lines. The files for TensorBoard are
    /// written again from the remaining lines. If the log lacks the event of the checkpoint, because the program was stopped
    /// before it wrote the line or because the line was removed, it is added.
    pub fn open(run: &Path, resumed: Option<u64>, meter: Meter) -> Self {
        let mut log = Self { jsonl: None, tensorboard: None, meter, failure: None };
        let opened = Jsonl::open(&run.join(FILE), resumed.unwrap_or(0));
        log.jsonl = log.watched(opened);
        let created = TensorBoard::create(&run.join(TENSORBOARD), now());
        log.tensorboard = log.watched(created);
        let lines = match &log.jsonl {
            Some(_) => read(&run.join(FILE)),
            None => Ok(Vec::new()),
        };
        let lines = log.watched(lines).unwrap_or_default();
        lines.iter().for_each(|line| log.scalars(line));
        let is_of = |step: u64| {
            move |line: &Map<String, Value>| {
                line.get("event") == Some(&"checkpoint".into()) && line.get("step") == Some(&step.into())
            }
        };
        if let Some(step) = resumed.filter(|&step| !lines.iter().any(is_of(step))) {
            log.checkpoint(step);
        }
        log
    }

    /// The first error, if the log is not complete.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Notes the first error.
    fn watched<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                if self.failure.is_none() {
                    tracing::warn!("{e}; the training goes on without a complete log");
                }
                self.failure.get_or_insert_with(|| e.to_string());
                None
            }
        }
    }

    /// Writes the event of a run that starts or resumes after `step` steps.
    pub fn start(&mut self, step: u64, parameters: usize, seed: u64) {
        let event = self.meter.start(parameters, seed);
        self.event(step, &event);
    }

    /// Writes the event of the checkpoint of a step.
    pub fn checkpoint(&mut self, step: u64) {
        self.event(step, &Event::Checkpoint { path: format!("checkpoint-{step}") });
    }

    /// Writes the line of a step, and an event if its update was skipped. The numbers of the line are also written for
    /// TensorBoard, see [`scalars`].
    pub fn step(&mut self, step: &Step) {
        let line = object(&self.meter.line(step));
        if let Some(line) = self.watched(line) {
            self.line(&line);
        }
        if let Some(reason) = &step.skip {
            self.event(step.step, &Event::Skip { reason: reason.clone() });
        }
    }

    fn line(&mut self, line: &Map<String, Value>) {
        if let Some(jsonl) = &mut self.jsonl {
            let written = jsonl.append(line);
            self.watched(written);
        }
        self.scalars(line);
    }

    /// Writes the numbers of a line for TensorBoard. After an error nothing more is written there.
    fn scalars(&mut self, line: &Map<String, Value>) {
        let Some(mut tensorboard) = self.tensorboard.take() else { return };
        let written = tensorboard.line(line);
        self.tensorboard = self.watched(written).map(|()| tensorboard);
    }

    /// Writes an event that happened after `step` steps.
    pub fn event(&mut self, step: u64, event: &Event) {
        let Some(mut line) = self.watched(object(event)) else { return };
        line.insert("step".into(), step.into());
        if let Some(jsonl) = &mut self.jsonl {
            let written = jsonl.append(&line);
            self.watched(written);
        }
    }

    /// Waits until the log is on the disk.
    pub fn sync(&mut self) {
        if let Some(jsonl) = &mut self.jsonl {
            let synced = jsonl.sync();
            self.watched(synced);
        }
    }
}

/// A line with the current time.
fn object(line: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(line) {
        Ok(Value::Object(mut object)) => {
            object.insert("time".into(), now().into());
            Ok(object)
        }
        other => Err(Error::Invalid(format!("a line of the log is not a JSON object: {other:?}"))),
    }
}

/// The numbers of a line by name, except its step and time. The name of a nested number joins its keys with `/`.
pub fn scalars(line: &Map<String, Value>) -> Vec<(String, f64)> {
    fn visit(prefix: &str, map: &Map<String, Value>, scalars: &mut Vec<(String, f64)>) {
        for (key, value) in map {
            match value {
                Value::Object(inner) => visit(&format!("{prefix}{key}/"), inner, scalars),
                Value::Number(x) => scalars.extend(x.as_f64().map(|x| (format!("{prefix}{key}"), x))),
                _ => {}
            }
        }
    }
    let mut scalars = Vec::new();
    visit("", line, &mut scalars);
    scalars.retain(|(name, _)| name != "step" && name != "time");
    scalars
}

/// The current time in seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_number_of_a_line_is_a_scalar() {
        let line = json!({
            "step": 3, "time": 1.0, "loss": 2.5, "mfu": null, "selection": { "margin": 0.5 }, "note": "x"
        });
        let scalars = scalars(line.as_object().unwrap());
        assert_eq!(scalars, [("loss".to_owned(), 2.5), ("selection/margin".to_owned(), 0.5)]);
    }

    #[test]
    fn a_reopened_log_is_continued_after_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let sample = Event::Sample { prompt: "a".into(), text: "b".into() };
        let mut log = Logger::open(dir.path(), None, Meter::default());
        for step in 1..=3 {
            log.line(&object(&json!({ "step": step, "loss": 0.5 })).unwrap());
            log.event(step, &sample);
        }
        let mut log = Logger::open(dir.path(), Some(2), Meter::default());
        log.line(&object(&json!({ "step": 3, "loss": 0.25 })).unwrap());
        log.sync();
        assert_eq!(log.failure(), None);
        let lines = read(&dir.path().join(FILE)).unwrap();
        let steps: Vec<_> =
            lines.iter().map(|l| (l["step"].as_u64().unwrap(), l.contains_key("event"))).collect();
        // The event of the checkpoint is added.
        assert_eq!(steps, [(1, false), (1, true), (2, false), (2, true), (2, true), (3, false)]);
        assert_eq!(lines[4]["path"], json!("checkpoint-2"));
        assert_eq!((&lines[1]["event"], &lines[1]["text"]), (&json!("sample"), &json!("b")));
        assert!(lines.iter().all(|l| l["time"].as_f64().unwrap() > 1e9));
        // One file, with a record for its version and one per step.
        let files: Vec<_> = std::fs::read_dir(dir.path().join(TENSORBOARD)).unwrap().collect();
        assert_eq!(files.len(), 1);
        let bytes = std::fs::read(files[0].as_ref().unwrap().path()).unwrap();
        let (mut at, mut records) = (0, 0);
        while at < bytes.len() {
            at += 16 + u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            records += 1;
        }
        assert_eq!((at, records), (bytes.len(), 4));
    }
    #[test]
    fn a_log_that_cannot_be_opened_is_a_failure_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join(TENSORBOARD), "a file").unwrap();
        let mut log = Logger::open(dir.path(), None, Meter::default());
        log.start(0, 1, 2);
        log.sync();
        assert!(log.failure().is_some_and(|failure| failure.contains(FILE)), "{:?}", log.failure());
    }
}
