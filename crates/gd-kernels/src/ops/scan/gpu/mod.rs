//! `scan` on a GPU: plans and launches over buffers, and the same over tensors.

pub mod certified;
pub(crate) mod launch;
pub(crate) mod tensors;
