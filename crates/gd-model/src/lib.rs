//! A Preserve-then-Select language model.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod data;
pub mod error;
pub mod tokenizer;

pub use error::{Error, Result};
