//! Training: the trainer, its optimizers and schedules, runs in a folder and their log.

pub mod dry_run;
pub mod ema;
pub mod guard;
mod in_flight;
pub mod log;
pub mod memory;
pub mod optimizer;
pub mod parallel;
pub mod run;
pub mod schedule;
pub mod state;
pub mod teacher;
mod trainer;

pub use trainer::{Gradients, Step, Trainer};
