//! `decode` on a GPU: plan and launches over buffers, and the same over tensors.

pub mod launch;
pub(crate) mod tensors;
