//! Analyses of models and of selection: comparison of mechanisms, gradient checks, energy landscapes, and the effect of
//! the barrier.

pub mod beacon_report;
pub mod compare;
pub mod gradient_check;
pub mod landscape;
pub mod variants;
