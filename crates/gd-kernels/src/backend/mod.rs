//! Code that operators share: element types, parallel loops, kernel launches. Private to this crate.

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
pub(crate) mod span;
pub(crate) mod support;

use self::cpu::isa::Isa;

/// Which backend an operator uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The fastest one for the device of the tensors and this machine.
    #[default]
    Auto,
    /// Exactly this instruction set on the CPU, or an error.
    Force(Isa),
}
