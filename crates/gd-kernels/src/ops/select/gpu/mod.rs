//! `select` on a GPU: the steps over tensors, the launches over buffers, and the inverse index.

pub mod inverse_index;
pub mod launch;
pub(super) mod steps;
