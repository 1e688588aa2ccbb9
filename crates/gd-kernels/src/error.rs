//! The one error type of this crate.

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operator refused to run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The arguments contradict each other or leave the operator's domain; the text names them.
    #[error("{0}")]
    Invalid(String),
    /// The arguments are sound, but no backend covers them; the text names what is supported.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// A device refused what it was asked for: no memory left, a launch or a copy that failed.
    #[error("{0}")]
    Device(String),
    /// candle reported an error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            e => candle_core::Error::wrap(e),
        }
    }
}
