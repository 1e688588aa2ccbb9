//! A language model with selection attention, as a library.
#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod analysis;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod infer;
pub mod io;
pub mod model;
pub mod trace;
pub mod train;

pub use error::{Error, Result};
