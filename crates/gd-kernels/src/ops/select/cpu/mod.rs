//! Loops of `select` on the CPU.

pub(crate) mod choose;
mod inverse;
pub(crate) mod rows;
