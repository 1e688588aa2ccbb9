//! The support table: which device runs which dtypes, head dimensions and candidate counts.

use std::ops::RangeInclusive;

use candle_core::{DType, Device};

#[cfg(feature = "emulate")]
use crate::backend::dispatch::emulated;
use crate::error::{Error, Result};

/// One row of the support table.
pub(crate) struct Support {
    device: &'static str,
    pub(crate) dtypes: &'static [DType],
    /// Dtypes of scans at certified precision.
    pub(crate) certified: &'static [DType],
    head_dim: RangeInclusive<usize>,
    /// The head dimension is a multiple of this.
    head_dim_step: usize,
    /// Values of K.
    pub(crate) candidates: &'static [usize],
}

impl Support {
    /// Whether there are kernels for this head dimension.
    pub(crate) fn has_head_dim(&self, head_dim: usize) -> bool {
        self.head_dim.contains(&head_dim) && head_dim.is_multiple_of(self.head_dim_step)
    }
}

/// The greatest head dimension.
pub(crate) const MAX_HEAD_DIM: usize = 1024;

/// Numbers of candidates that a scan can return for each query.
pub const CANDIDATES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// What runs where. Errors and `gd doctor` print this table.
const SUPPORT: &[Support] = &[
    Support {
        device: "cpu",
        dtypes: &[DType::F32, DType::F16, DType::BF16, DType::F64],
        certified: &[DType::F32, DType::F16, DType::BF16],
        head_dim: 1..=MAX_HEAD_DIM,
        head_dim_step: 1,
        candidates: &CANDIDATES,
    },
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    Support {
        device: "cuda",
        dtypes: &[DType::F32, DType::F16, DType::BF16],
        certified: &[DType::F32, DType::F16, DType::BF16],
        head_dim: 8..=256,
        head_dim_step: 8,
        candidates: &CANDIDATES,
    },
    #[cfg(any(feature = "metal", feature = "emulate"))]
    Support {
        device: "metal",
        dtypes: &[DType::F32, DType::F16, DType::BF16],
        certified: &[],
        head_dim: 8..=256,
        head_dim_step: 8,
        candidates: &[1, 2, 4, 8, 16, 32],
    },
];

/// The support table as text, one line per backend.
pub fn support_table() -> String {
    let line = |s: &Support| {
        let list = |types: &[DType]| match types {
            [] => "none".to_owned(),
            types => types.iter().map(|d| d.as_str()).collect::<Vec<_>>().join(", "),
        };
        let (lo, hi) = (s.head_dim.start(), s.head_dim.end());
        let steps =
            if s.head_dim_step > 1 { format!(" in steps of {}", s.head_dim_step) } else { String::new() };
        format!(
            "{}: dtypes {} (certified {}); head_dim {lo}..={hi}{steps}; candidates {:?}",
            s.device,
            list(s.dtypes),
            list(s.certified),
            s.candidates
        )
    };
    SUPPORT.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The name of a device in the table.
pub(crate) fn device_name(device: &Device) -> &'static str {
    #[cfg(feature = "emulate")]
    if let Some(arch) = emulated() {
        return if arch.is_metal() { "metal" } else { "cuda" };
    }
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// The row of the table for a device; refuses a device without kernels in this build. `op` names the operator.
pub(crate) fn supported(op: &str, device: &Device) -> Result<&'static Support> {
    let name = device_name(device);
    match SUPPORT.iter().find(|s| s.device == name) {
        Some(support) => Ok(support),
        None => unsupported(format!("{op} on device {name}")),
    }
}

/// Refuses a device without kernels in this build.
pub(crate) fn require_device(op: &str, device: &Device) -> Result<()> {
    supported(op, device).map(drop)
}

/// The error for a value that the table does not cover.
pub(crate) fn unsupported<T>(what: String) -> Result<T> {
    Err(Error::Unsupported(format!("{what}; supported: {}", support_table())))
}
