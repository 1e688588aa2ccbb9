//! The attention layers of gd-layer, in one program.
//!
//! `cargo test -p gd-layer --test suite layer::` runs the tests of one module.

mod decoding;
mod layer;
mod layers;
mod mechanisms;
mod packed;
mod rms_norm;
mod rotary;
mod swiglu;
