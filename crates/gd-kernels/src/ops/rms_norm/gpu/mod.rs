//! `rms_norm` on a GPU: launches over buffers, and the same over tensors.

pub mod launch;
pub(crate) mod tensors;
