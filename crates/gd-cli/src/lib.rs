//! The program `gd`: argument parsing, progress, tables, plots and HTML pages for the library [`gd_model`].
//!
//! [`commands`] parse their arguments, call `gd-model` or `gd-kernels`, and print the result. [`render`] turns results
//! into tables, plots and pages. This library exists for the program and its tests; its API may change in every
//! release.
//!
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod color;
pub mod commands;
pub mod context;
pub mod data_source;
pub mod generation;
pub mod history;
pub mod progress;
pub mod render;
pub mod saved_runs;
pub mod subprocess;
pub mod terminal;
pub mod training;
