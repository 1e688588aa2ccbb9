//! A Preserve-then-Select language model.
#![forbid(unsafe_code)]

pub mod loss;
