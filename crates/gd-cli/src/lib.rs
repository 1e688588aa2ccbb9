//! The program `gd`: commands, progress, tables, figures and pages around the library [`gd_model`].
#![forbid(unsafe_code)]

pub mod commands;
pub mod history;
pub mod plot;
pub mod report;
pub mod table;
pub mod viewer;
