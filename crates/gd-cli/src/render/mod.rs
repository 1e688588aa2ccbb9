//! Output of the program: tables, plots, reports and the trace viewer.

pub(crate) mod html;
pub mod numbers;
pub mod plot;
pub mod quantity;
pub mod report;
pub mod run_curves;
pub mod table;
pub mod viewer;
