//! candle modules for selection attention.
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod attention;
mod beacon;
mod cache;
mod config;
mod gd_attention;
mod heads;
mod kept;
mod linear;
mod mask;
mod norm;
#[cfg(test)]
mod oracle;
mod probe;
mod rope;
mod softmax;
mod softmax_attention;
mod swiglu;

pub use attention::{Attention, Pass, Record};
pub use beacon::Beacon;
pub use cache::LayerCache;
pub use config::{AttentionConfig, BeaconConfig, GdConfig};
pub use gd_attention::{GdAttention, norm_prior};
pub use linear::{Linear, linear};
pub use norm::{RmsNorm, rms_norm};
pub use probe::{Found, Probe, Reading};
pub use rope::{RopeScaling, Rotary};
pub use softmax_attention::SoftmaxAttention;
pub use swiglu::swiglu;
