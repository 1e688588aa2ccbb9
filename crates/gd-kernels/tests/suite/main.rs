//! The operators of gd-kernels on the CPU, in one program.
//!
//! `cargo test -p gd-kernels --test suite select::` runs the tests of one module.

mod beacon;
mod causal_conv;
mod certified;
mod estimators;
mod half_cache;
mod ill_conditioned;
mod iris;
mod key_cache;
mod naive;
mod paged;
mod quantized_linear;
mod reference;
mod refusals;
mod running_average;
mod scan;
mod select;
mod select_rules;
mod softmax_attention;
mod theory;
