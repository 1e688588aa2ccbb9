//! Analyses of models and of selection: comparison of mechanisms, their map by selectivity and consistency control,
//! gradient checks, energy landscapes, directions of greatest margin, and the effect of the barrier.

pub mod beacon_report;
pub mod compare;
pub mod gradient_check;
pub mod landscape;
pub mod max_margin;
pub mod mechanism_map;
pub mod variants;
