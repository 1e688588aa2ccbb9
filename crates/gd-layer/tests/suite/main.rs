//! The attention layers of gd-layer, in one program.
//!
//! `cargo test -p gd-layer --test suite layer::` runs the tests of one module.

mod blocked_attention;
mod decoding;
mod experts;
mod half_cache;
mod induction_heads;
mod layer;
mod layers;
mod mechanisms;
mod monotonic;
mod packed;
mod quantized;
mod rms_norm;
mod rotary;
mod selecting_heads;
mod swiglu;
mod threshold_by_length;
