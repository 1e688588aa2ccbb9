//! Tests of gd-model in one program. Tests that count memory or need several processes have programs of their own.
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
mod pretrained;
mod recomputation;
mod smollm2;
mod tokenizer;
