//! The operators, a folder each.

pub mod adamw;
#[cfg(test)]
pub(crate) mod agreement;
pub(crate) mod causal_conv;
pub mod cross_entropy;
pub(crate) mod decode;
pub(crate) mod embedding;
pub(crate) mod feed_forward;
pub(crate) mod gated_sum;
pub(crate) mod heads;
pub(crate) mod linear;
pub(crate) mod masked_softmax;
pub(crate) mod newton_schulz;
pub(crate) mod quantized_linear;
pub(crate) mod rms_norm;
pub(crate) mod rotary;
pub(crate) mod running_average;
pub(crate) mod scan;
pub(crate) mod select;
pub(crate) mod softmax_attention;
pub(crate) mod swiglu;
