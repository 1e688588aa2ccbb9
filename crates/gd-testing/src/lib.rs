//! Shared by the tests of all crates: counts of the cases that ran, generated problems with error bounds, a runner for
//! suites of problems, and an emulated GPU that executes the real CUDA and Metal kernels on the host.
//!
//! The folder `suites` beside the sources holds the operator tests that every GPU backend runs: the program
//! `tests/emulated` of this crate includes them for the emulator, and `tests/device` of gd-kernels for a real GPU.

mod cases;
#[cfg(feature = "emulator")]
mod emulator;
pub mod problems;
mod properties;
pub mod suite;
pub mod tensors;

pub use self::cases::{case_count, log_cases};
#[cfg(feature = "emulator")]
pub use self::emulator::{Buffer, Emulator, Layouts, layouts, registered};
pub use self::properties::properties;
