//! A Preserve-then-Select language model.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod commands;
pub mod data;
pub mod device;
pub mod error;
pub mod tensor_file;
pub mod tokenizer;

pub use error::{Error, Result};
