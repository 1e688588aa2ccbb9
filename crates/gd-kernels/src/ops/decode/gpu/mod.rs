//! `decode` on a GPU: plan and launches over buffers.

pub mod launch;
