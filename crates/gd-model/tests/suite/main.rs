//! Tests of gd-model in one program. Tests that count memory or need several processes have programs of their own.
//!
//! `cargo test -p gd-model --test suite checkpoint::` runs the tests of one module.

mod chat_template;
mod checkpoint;
mod config;
mod config_ranges;
mod data;
mod documents;
mod durable;
mod engine;
mod evaluation;
mod gguf;
mod gradients;
mod guard;
mod llama;
mod lora;
mod loss;
mod max_margin;
mod mechanism_map;
mod optimizer;
mod packing;
mod prepared;
mod pretrained;
mod recomputation;
mod selective_prediction;
mod smollm2;
mod stream;
mod tasks;
mod tokenizer;
