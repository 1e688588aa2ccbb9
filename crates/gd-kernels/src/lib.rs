//! Selection-attention operators for candle.
//!
//! Shapes everywhere: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; query head `h` reads
//! key-value head `h / (Hq / Hk)`.

mod error;
mod mask;
mod options;
pub mod reference;

pub use error::{Error, Result};
pub use mask::Mask;
pub use options::{Barrier, CoherenceMode, Estimator, Gate, Score, TieBreak};
