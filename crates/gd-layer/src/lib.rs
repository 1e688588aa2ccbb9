//! candle modules for selection attention.
#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod adapter_dropout;
mod attention;
mod beacon;
mod cache;
mod config;
mod derived;
mod gd_attention;
mod heads;
mod linear;
mod mechanism_attention;
pub mod mechanisms;
mod norm;
mod probe;
mod query_blocks;
mod rope;
mod softmax_attention;
mod stats;
mod threshold;

pub use adapter_dropout::AdapterDropout;
pub use attention::{Attention, Pass};
pub use beacon::Beacon;
pub use cache::LayerCache;
pub use config::{AttentionConfig, BeaconConfig, GdConfig};
pub use gd_attention::{GdAttention, norm_prior};
pub use linear::{Linear, linear};
pub use mechanism_attention::MechanismAttention;
pub use norm::RmsNorm;
pub use probe::{BlendView, CandidateView, Probe, SelectionView};
pub use rope::{RopeScaling, Rotary};
pub use softmax_attention::SoftmaxAttention;
pub use stats::SelectionStats;
