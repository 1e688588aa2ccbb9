//! The error type of this crate.
//!
//! Every message fits on one line and names the file, setting or value that caused it. Errors that a program may want
//! to handle have a variant with the values as fields; [`Error::Invalid`] holds the message of all others.

use std::fmt;
use std::path::{Path, PathBuf};

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The reason why an operation of this crate failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at a path.
    #[error("{path}: no such {what}", path = .path.display())]
    Missing {
        /// The path.
        path: PathBuf,
        /// What was expected there, such as `tokenizer file`.
        what: &'static str,
    },
    /// A folder lacks a file that a model needs.
    #[error("{path}: no such file: {reason}", path = .path.display())]
    NoModel {
        /// The path of the file.
        path: PathBuf,
        /// What the folder holds, and what to do.
        reason: String,
    },
    /// The operating system refused to read.
    #[error("{path}: cannot read: {source}", path = .path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// The reason that the system gives.
        source: std::io::Error,
    },
    /// The operating system refused to write.
    #[error("{path}: cannot write: {source}", path = .path.display())]
    Unwritable {
        /// The file or folder.
        path: PathBuf,
        /// The reason that the system gives.
        source: std::io::Error,
    },
    /// A file or folder lacks the content that it should have.
    #[error("{path}: {reason}", path = .path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// What is missing.
        reason: &'static str,
    },
    /// A text file is not UTF-8.
    #[error("{path}: invalid UTF-8 at byte {offset}", path = .path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The offset of the first invalid sequence, in bytes.
        offset: usize,
    },
    /// A line of a text file cannot be used.
    #[error("{path}:{line}: {reason}", path = .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The number of the line, from 1.
        line: usize,
        /// What is wrong with the line.
        reason: String,
    },
    /// Several lines of the text files cannot be used.
    #[error("{first} (the first of {count} bad lines)")]
    Lines {
        /// The error of the first of them.
        first: Box<Error>,
        /// The number of all of them.
        count: usize,
    },
    /// A text is shorter than one window of the training or evaluation.
    #[error("{what} has {tokens} tokens, but one window needs {needed} (context {context} + 1){advice}", context = .needed - 1)]
    TooShort {
        /// Which text.
        what: &'static str,
        /// Its length in tokens.
        tokens: usize,
        /// The minimal length in tokens, which is the context plus one.
        needed: usize,
        /// What to change, with the punctuation before it; may be empty.
        advice: &'static str,
    },
    /// A file ends before the size that its header announces.
    #[error("{path}: truncated: {needed} bytes are announced, {actual} are there", path = .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The announced size in bytes.
        needed: u64,
        /// The actual size in bytes.
        actual: u64,
    },
    /// A file has another format than expected, or a damaged header.
    #[error("{path}: not a valid {kind} file: {reason}", path = .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The expected format.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A file or folder lacks tensors.
    #[error("{path}: {count} tensors are missing: {list}", path = .path.display(), count = .names.len(), list = shorten(.names))]
    MissingTensors {
        /// The file or folder.
        path: PathBuf,
        /// The names of the missing tensors.
        names: Vec<String>,
    },
    /// A tensor has another shape or dtype than the parameter it belongs to.
    #[error("tensor {name:?} is {actual} in the checkpoint, {expected} in the model")]
    TensorMismatch {
        /// The name of the tensor.
        name: String,
        /// The dtype and shape that the model needs.
        expected: String,
        /// The dtype and shape of the tensor.
        actual: String,
    },
    /// The index of a checkpoint or of prepared data names a file outside its own folder.
    #[error("{path}: shard name {name:?} is not a plain file name", path = .path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name in the index.
        name: String,
    },
    /// A folder that is not a checkpoint is in the way. It is left as it is.
    #[error("{path}: exists and is not a checkpoint folder, so it is left alone", path = .path.display())]
    Occupied {
        /// The folder or file.
        path: PathBuf,
    },
    /// A file has changed since it was written.
    #[error("{path}: damaged: {reason}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The evidence.
        reason: String,
    },
    /// A configuration has keys or values that cannot be used.
    #[error("{source_name}: {list}", list = join(.problems))]
    Config {
        /// The preset, file or block of the configuration.
        source_name: String,
        /// Every problem of the configuration.
        problems: Vec<ConfigProblem>,
    },
    /// The value of a setting is outside its range.
    #[error("{name} must be {allowed}, not {value}")]
    OutOfRange {
        /// The setting, by its path in a configuration where it has one.
        name: String,
        /// The value.
        value: String,
        /// The allowed values, such as `in [0, 1)` or `at least 1`.
        allowed: String,
    },
    /// A name is not one of those that are defined.
    #[error("unknown {what} {name:?} ({}{})", .allowed.join(", "), suggested(.suggestion.as_deref()))]
    UnknownName {
        /// What the name should stand for, such as `mechanism`.
        what: &'static str,
        /// The name.
        name: String,
        /// The names that are defined.
        allowed: Vec<String>,
        /// The defined name that is most similar, if one is similar enough to be meant.
        suggestion: Option<String>,
    },
    /// A prompt does not fit into the context of the model.
    #[error("the prompt has {tokens} tokens; the context of {limit} allows 1 to {limit}")]
    PromptLength {
        /// Tokens of the prompt.
        tokens: usize,
        /// The context of the model in tokens.
        limit: usize,
    },
    /// The text has a token that the model lacks.
    #[error("token {token} of the text is not in the vocabulary of {vocab_size} tokens of the model")]
    UnknownToken {
        /// The id of the token.
        token: u32,
        /// The size of the vocabulary of the model.
        vocab_size: usize,
    },
    /// Another process trains in the folder of a run.
    #[error("{path}: another process is training there", path = .path.display())]
    RunLocked {
        /// The folder.
        path: PathBuf,
    },
    /// A run cannot be resumed, because something that its result depends on has changed.
    #[error("{path}: the {what} changed since the run was saved: its hash was {stored} and is {actual}", path = .path.display())]
    RunChanged {
        /// The folder of the run.
        path: PathBuf,
        /// What changed.
        what: RunInput,
        /// The first digits of its hash in the checkpoint.
        stored: String,
        /// The first digits of its hash now.
        actual: String,
    },
    /// A model could not be fetched by its name.
    #[error(
        "{name}: no such file or folder, and no model of the Hugging Face Hub could be fetched by this name: {reason}"
    )]
    Hub {
        /// The name of the model.
        name: String,
        /// What prevented it.
        reason: String,
    },
    /// An adapter was trained on another model than the one that it is to be added to.
    #[error("{path}: the adapter was trained on another model than {base}: the hash of its weights was {expected} and is {actual}",
        path = .path.display(), base = .base.display())]
    WrongBase {
        /// The folder of the adapter.
        path: PathBuf,
        /// The model.
        base: PathBuf,
        /// The first digits of the hash of the weights that the adapter was trained on.
        expected: String,
        /// The first digits of that of the weights of the model.
        actual: String,
    },
    /// A run cannot be resumed with another number of steps, because a step that it has done would have been another
    /// one, or because it has done more steps than that.
    #[error("{path}: a run of {from} steps that has done {done} cannot be resumed as one of {to}{why}", path = .path.display(),
        why = differing_step(*.differs, *.done, *.to))]
    RunLength {
        /// The folder of the run.
        path: PathBuf,
        /// The number of steps that the run was started or last resumed with.
        from: u64,
        /// The number of steps asked for.
        to: u64,
        /// The steps done.
        done: u64,
        /// The first step, from 1, that would have been different.
        differs: Option<u64>,
    },
    /// The training diverged: the guard would skip too many updates in a row, or the parameters are such that the model
    /// cannot be computed.
    #[error("step {step}: {reason}; the training diverged{values}: try a lower train.lr.peak, a longer train.lr.warmup \
             or a smaller train.clip{newest}",
        values = values(*.loss, *.lr),
        newest = .checkpoint.as_ref().map_or(String::new(), |path| format!("; the newest checkpoint is {}", path.display())))]
    Diverged {
        /// The last step, from 1.
        step: u64,
        /// Its loss in nats per token, if it is available.
        loss: Option<f64>,
        /// Its learning rate, if it is available.
        lr: Option<f64>,
        /// What happened.
        reason: String,
        /// The newest checkpoint of the run, which is from before.
        checkpoint: Option<PathBuf>,
    },
    /// A computed value is not finite.
    #[error("{what} of token {token} is {value}")]
    NotFinite {
        /// The quantity, such as `the loss`.
        what: &'static str,
        /// The value.
        value: f64,
        /// The position of the token in the text, from 0.
        token: usize,
    },
    /// The processes of a training hold different data.
    #[error("{what}: different on rank 0 and on rank {}", .ranks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))]
    RanksDiffer {
        /// What differs.
        what: String,
        /// The ranks that differ from rank 0.
        ranks: Vec<usize>,
    },
    /// No layer of a model reads single positions, so that there is nothing to trace.
    #[error(
        "the model has no layer that selects one position: {reason}; a blend of many has no source to trace"
    )]
    NothingSelects {
        /// What its layers do.
        reason: String,
    },
    /// A trace was recorded with another model.
    #[error("the trace is of another model: the {part} differ")]
    TraceModel {
        /// The part of the model whose hash differs: `weights`, `config` or `tokenizer`.
        part: &'static str,
    },
    /// A device cannot be used.
    #[error("device {device}: {reason}")]
    Device {
        /// The device, as `--device` spells it.
        device: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Arguments that contradict each other or the data; the message names them.
    #[error("{0}")]
    Invalid(String),
    /// candle reported an error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// An input of a run that must not change between a checkpoint and the steps after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunInput {
    /// The token streams of training and validation.
    Data,
    /// The recipe, except for settings that do not change the result.
    Configuration,
    /// The weights of the teacher that the model learns from.
    Teacher,
    /// The weights of the model that the adapter belongs to.
    Base,
}

impl fmt::Display for RunInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Configuration => "configuration",
            Self::Teacher => "model that this one learns from",
            Self::Base => "model that the adapter belongs to",
        })
    }
}

/// One problem of a configuration. Keys are dotted paths, such as `train.lr.peak`.
#[derive(Debug)]
pub enum ConfigProblem {
    /// A key that the configuration does not have.
    UnknownKey {
        /// The key.
        key: String,
        /// The names of the keys in its place.
        allowed: Vec<String>,
        /// The key that is most similar, if one is similar enough to be meant.
        suggestion: Option<String>,
    },
    /// A key that has no default is absent.
    MissingKey {
        /// The key.
        key: String,
    },
    /// A word that is not one of the values of its key.
    UnknownValue {
        /// The key.
        key: String,
        /// The word.
        value: String,
        /// The values of the key.
        allowed: Vec<String>,
        /// The value that is most similar, if one is similar enough to be meant.
        suggestion: Option<String>,
    },
    /// A value of another type than its key has.
    WrongType {
        /// The key; empty for the configuration as a whole.
        key: String,
        /// The type that was found and the one that is expected.
        reason: String,
    },
    /// A value outside its range, or values that contradict each other.
    Check(Box<Error>),
    /// A feature of a foreign model that this crate does not compute.
    Unsupported(String),
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownKey { key, suggestion: Some(near), .. } => {
                write!(f, "unknown key {key}; did you mean {near}?")
            }
            Self::UnknownKey { key, allowed, .. } => {
                write!(f, "unknown key {key} (known here: {})", allowed.join(", "))
            }
            Self::MissingKey { key } => write!(f, "{key} is missing"),
            Self::UnknownValue { key, value, suggestion: Some(near), .. } => {
                write!(f, "{key} {value:?} is unknown; did you mean {near:?}?")
            }
            Self::UnknownValue { key, value, allowed, .. } => {
                write!(f, "{key} {value:?} is unknown (known: {})", allowed.join(", "))
            }
            Self::WrongType { key, reason } if key.is_empty() => f.write_str(reason),
            Self::WrongType { key, reason } => write!(f, "{key}: {reason}"),
            Self::Check(error) => error.fmt(f),
            Self::Unsupported(text) => f.write_str(text),
        }
    }
}

impl From<Error> for ConfigProblem {
    fn from(error: Error) -> Self {
        Self::Check(Box::new(error))
    }
}

impl From<gd_kernels::Error> for Error {
    fn from(e: gd_kernels::Error) -> Self {
        Self::Candle(e.into())
    }
}

impl Error {
    /// The error of reading `path`: [`Error::Missing`] if there is nothing, else [`Error::Unreadable`].
    pub(crate) fn read(path: &Path, what: &'static str, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            Self::Missing { path: path.into(), what }
        } else {
            Self::Unreadable { path: path.into(), source }
        }
    }

    /// The error of writing `path`.
    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Unwritable { path: path.into(), source }
    }

    /// The error of a setting outside its range.
    pub(crate) fn out_of_range(name: &str, value: impl fmt::Display, allowed: impl fmt::Display) -> Self {
        Self::OutOfRange { name: name.into(), value: value.to_string(), allowed: allowed.to_string() }
    }
}

/// The first names of a list, so that the message stays on one line.
pub(crate) fn shorten(names: &[String]) -> String {
    const LISTED: usize = 4;
    let mut list = names.iter().take(LISTED).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > LISTED {
        list.push_str(", …");
    }
    list
}

fn join(problems: &[ConfigProblem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Why a run cannot be resumed with `to` steps, and what to do instead.
fn differing_step(differs: Option<u64>, done: u64, to: u64) -> String {
    match differs {
        Some(step) => format!(
            ": step {step} would have been another one, because its learning rate or selection depends on the number of \
             steps; start a new run with --steps {to}, or one with train.lr.shape=constant, which can be made longer"
        ),
        None => format!(": choose at least {done} steps"),
    }
}

/// The loss and the learning rate of a step, as far as they are available.
fn values(loss: Option<f64>, lr: Option<f64>) -> String {
    let values = [loss.map(|loss| format!("loss {loss:.4}")), lr.map(|lr| format!("learning rate {lr}"))];
    let values: Vec<_> = values.into_iter().flatten().collect();
    if values.is_empty() { String::new() } else { format!(" ({})", values.join(", ")) }
}

fn suggested(name: Option<&str>) -> String {
    name.map_or(String::new(), |name| format!("; did you mean {name}?"))
}
