//! Selection-attention operators for candle.
//!
//! Shapes everywhere: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; query head `h` reads
//! key-value head `h / (Hq / Hk)`.

pub mod adamw;
mod average;
mod conv;
mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod element;
mod embedding;
mod error;
pub mod fused;
pub mod gpu;
mod growing;
mod kept;
mod key_bias;
mod mask;
#[cfg(feature = "metal")]
pub mod metal;
pub mod on_device;
mod options;
mod paged;
mod plan;
mod quantized;
pub mod reference;
mod rescored;
mod scan;
mod select;

pub use average::{AverageState, running_average};
pub use conv::{causal_conv, packed_causal_conv};
pub use embedding::embedding;
pub use error::{Error, Result};
pub use gpu::on_cpu;
pub use growing::{Growing, Place};
pub use kept::KeptKeys;
pub use key_bias::KeyBias;
pub use mask::Mask;
pub use options::{Barrier, CoherenceMode, Estimator, Gate, Precision, Score, TieBreak};
pub use paged::{PagedCache, scan_select_paged};
pub use plan::{Backend, CANDIDATES, CpuPlan, Isa, Plan, Problem, Walk, support_table};
pub use quantized::QuantizedKeys;
pub use rescored::Rescored;
pub use scan::{Candidates, Scan, plan, scan, scan_all};
pub use select::{Round, Select, Selected, scan_select, select};
