//! candle Modules for selection attention.
#![forbid(unsafe_code)]

mod norm;
#[cfg(test)]
mod oracle;
mod rope;
mod swiglu;

pub use norm::{RmsNorm, rms_norm};
pub use rope::Rotary;
pub use swiglu::swiglu;
