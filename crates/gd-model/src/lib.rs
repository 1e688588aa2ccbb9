//! A Preserve-then-Select language model.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod data;
pub mod error;
pub mod optimizer;
pub mod sampler;
pub mod schedule;
pub mod stop;
pub mod tokenizer;

pub use error::{Error, Result};
