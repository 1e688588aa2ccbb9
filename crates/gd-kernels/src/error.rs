//! The error type of this crate.

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The error of an operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Arguments that contradict each other or are outside the domain of the operator. The text names the values.
    #[error("{0}")]
    Invalid(String),
    /// Valid arguments for which no backend has an implementation. The text names the value and what is supported.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// An error of the device: no free memory, or a launch or copy that failed.
    #[error("{0}")]
    Device(String),
    /// An error of candle.
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
