//! What several operators share on a device: element types, loops, launches. Private to this crate.

pub(crate) mod check;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod dispatch;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod graph;
#[cfg(feature = "metal")]
pub(crate) mod metal;
pub(crate) mod support;

use self::cpu::isa::Isa;

/// Which backend an operator uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The best one for the tensors' device and this machine.
    #[default]
    Auto,
    /// Exactly this instruction set on the CPU, or an error.
    Force(Isa),
}
