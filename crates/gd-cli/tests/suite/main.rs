//! The program `gd`, called as a user calls it, and what it shares with the library, in one test program.
//!
//! `cargo test -p gd-cli --test suite trace::` runs the tests of one module.

mod bad_input;
mod beacon_report;
mod bench;
mod chat;
mod cli;
mod completions;
mod config;
mod continuations;
mod convert;
mod crash_states;
mod data;
mod documents;
mod finetune;
mod generate;
mod guides;
mod hub;
mod landscape;
mod log;
mod lora;
mod map;
mod mechanisms;
mod model_files;
mod op;
mod program;
mod reading;
mod resume;
mod serve;
mod system_calls;
mod task;
mod trace;
mod train_errors;
mod uptrain;
mod watchers;
