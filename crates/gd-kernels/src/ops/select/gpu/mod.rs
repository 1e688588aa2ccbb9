//! `select` on a GPU: launches over buffers, and the same over tensors.

pub mod inverse;
pub mod launch;
mod steps;
pub(crate) mod tensors;
