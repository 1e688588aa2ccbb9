//! The one error type of this crate. Every text names the file or the value at fault, in one line.

use std::path::{Path, PathBuf};

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why something in this crate could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing at this path.
    #[error("{path}: no such {what}", path = .path.display())]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The operating system refused to read.
    #[error("{path}: cannot read: {source}", path = .path.display())]
    Unreadable {
        /// What was to be read.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system refused to write.
    #[error("{path}: cannot write: {source}", path = .path.display())]
    Unwritable {
        /// What was to be written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file or folder without the content it should have.
    #[error("{path}: {reason}", path = .path.display())]
    Empty {
        /// The file or folder.
        path: PathBuf,
        /// What is missing in it.
        reason: &'static str,
    },
    /// A text file that is not UTF-8.
    #[error("{path}: invalid UTF-8 at byte {offset}", path = .path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// Where the first invalid sequence starts.
        offset: usize,
    },
    /// A line of a text file that cannot be used.
    #[error("{path}:{line}: {reason}", path = .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A text too short for the window that is to be cut from it.
    #[error("{what} has {found} tokens, but one window needs {needed} (context {context} + 1)", context = .needed - 1)]
    TooShort {
        /// Which text.
        what: &'static str,
        /// Its length in tokens.
        found: usize,
        /// The least length, which is the context plus one.
        needed: usize,
    },
    /// A file that ends before its header says it should.
    #[error("{path}: truncated: {needed} bytes are announced, {found} are there", path = .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The announced size.
        needed: u64,
        /// The real size.
        found: u64,
    },
    /// A file of another kind, or with a broken header.
    #[error("{path}: not a valid {kind} file: {reason}", path = .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it should be.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Tensors that should be in a file or folder and are not.
    #[error("{path}: {count} tensors are missing: {list}", path = .path.display(), count = .names.len(), list = shorten(.names))]
    MissingTensors {
        /// The file or folder.
        path: PathBuf,
        /// The names.
        names: Vec<String>,
    },
    /// An index that points outside its own folder.
    #[error("{path}: shard name {name:?} is not a plain file name", path = .path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name it gives.
        name: String,
    },
    /// A folder that may not be replaced, because it holds something else.
    #[error("{path}: exists and is not a checkpoint folder, so it is left alone", path = .path.display())]
    Occupied {
        /// The folder or file.
        path: PathBuf,
    },
    /// A file that is not what it was when it was written.
    #[error("{path}: damaged: {reason}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// A value outside its range; the text names it.
    #[error("{0}")]
    Invalid(String),
    /// candle reported an error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<gd_kernels::Error> for Error {
    fn from(e: gd_kernels::Error) -> Self {
        Self::Candle(e.into())
    }
}

impl Error {
    /// A read error at `path`, told apart by whether the path exists.
    pub(crate) fn read(path: &Path, what: &'static str, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound {
            Self::Missing { path: path.into(), what }
        } else {
            Self::Unreadable { path: path.into(), source }
        }
    }

    /// A write error at `path`.
    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Unwritable { path: path.into(), source }
    }
}

/// The first few names, so that the message stays one line.
fn shorten(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let mut list = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        list.push_str(", …");
    }
    list
}
