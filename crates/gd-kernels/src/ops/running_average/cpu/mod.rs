//! `running_average` on the CPU.

pub(crate) mod blocks;
pub(crate) mod weights;
