//! The program `gd`, built on [`gd_model`].
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod commands;
pub mod history;
pub mod plot;
pub mod report;
pub mod table;
pub mod viewer;
