//! Code that operators share on the CPU.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod awake;
pub(crate) mod cache_line;
pub(crate) mod element;
pub(crate) mod isa;
pub(crate) mod lanes;
pub(crate) mod matrix;
pub(crate) mod parallel;
pub(crate) mod prefetch;
pub(crate) mod product;
pub(crate) mod quantize;
pub(crate) mod stored;
pub(crate) mod view;
