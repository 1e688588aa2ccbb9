//! The library gd-model, in one test program. What counts memory or needs several processes has a program of its own.
//!
//! `cargo test -p gd-model --test suite checkpoint::` runs the tests of one module.

mod checkpoint;
mod config;
mod data;
mod durable;
mod gguf;
mod gradients;
mod guard;
mod llama;
mod loss;
mod optimizer;
mod packing;
mod prepared;
mod recomputation;
mod smollm2;
mod tokenizer;
