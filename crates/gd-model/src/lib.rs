//! A Preserve-then-Select language model.
#![forbid(unsafe_code)]

pub mod commands;
pub mod device;
pub mod tensor_file;
