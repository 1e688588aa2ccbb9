//! A Preserve-then-Select language model.
#![deny(unsafe_code)]

pub mod beacon_report;
pub mod chat;
pub mod checkpoint;
pub mod commands;
pub mod compare;
pub mod config;
pub mod curve;
pub mod data;
pub mod device;
pub mod dry_run;
pub mod ema;
pub mod error;
pub mod evaluate;
pub mod flops;
pub mod generate;
pub mod gguf;
pub mod gradients;
pub mod guard;
pub mod history;
pub mod landscape;
pub mod log;
pub mod loss;
pub mod memory;
pub mod model_file;
pub mod optimizer;
pub mod parallel;
pub mod params;
pub mod plot;
pub mod report;
pub mod run;
pub mod sampler;
pub mod schedule;
pub mod shapes;
pub mod state;
pub mod stop;
pub mod swap;
pub mod tensor_file;
pub mod tokenizer;
pub mod trace;
pub mod trainer;
pub mod transformer;
pub mod uptrain;
pub mod variants;
pub mod viewer;

pub use error::{Error, Result};
