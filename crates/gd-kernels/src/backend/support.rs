//! The support table: which device runs which dtypes, head dimensions and candidate counts.

use candle_core::{DType, Device};

#[cfg(feature = "emulate")]
use crate::backend::dispatch::emulated;
use crate::error::{Error, Result};

/// One line of the support table.
pub(crate) struct Support {
    pub(crate) device: &'static str,
    pub(crate) dtypes: &'static [DType],
    pub(crate) certified: &'static [DType],
    pub(crate) head_dim: std::ops::RangeInclusive<usize>,
    /// head_dim is a multiple of this.
    pub(crate) step: usize,
    pub(crate) candidates: &'static [usize],
}

/// The greatest head_dim.
pub(crate) const MAX_HEAD_DIM: usize = 1024;

/// Candidates that a scan may keep for a query.
pub const CANDIDATES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Everything that runs. Documentation, errors and `gd doctor` print this table.
pub(crate) const SUPPORT: &[Support] = &[
    Support {
        device: "cpu",
        dtypes: &[DType::F32, DType::F16, DType::BF16, DType::F64],
        certified: &[DType::F32, DType::F16, DType::BF16],
        head_dim: 1..=MAX_HEAD_DIM,
        step: 1,
        candidates: &CANDIDATES,
    },
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    Support {
        device: "cuda",
        dtypes: &[DType::F32, DType::F16, DType::BF16],
        certified: &[DType::F32, DType::F16, DType::BF16],
        head_dim: 8..=256,
        step: 8,
        candidates: &CANDIDATES,
    },
    #[cfg(any(feature = "metal", feature = "emulate"))]
    Support {
        device: "metal",
        dtypes: &[DType::F32, DType::F16, DType::BF16],
        certified: &[],
        head_dim: 8..=256,
        step: 8,
        candidates: &[1, 2, 4, 8, 16, 32],
    },
];

/// The support table as text, one line a backend.
pub fn support_table() -> String {
    let line = |s: &Support| {
        let list = |types: &[DType]| match types {
            [] => "none".to_owned(),
            types => types.iter().map(|d| d.as_str()).collect::<Vec<_>>().join(", "),
        };
        let (lo, hi) = (s.head_dim.start(), s.head_dim.end());
        let steps = if s.step > 1 { format!(" in steps of {}", s.step) } else { String::new() };
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

/// The name of a tensor's device as the table spells it.
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

/// Refuses tensors on devices for which this build has no kernels.
pub(crate) fn require_device(op: &str, device: &Device) -> Result<()> {
    let name = device_name(device);
    if SUPPORT.iter().any(|s| s.device == name) {
        return Ok(());
    }
    Err(Error::Unsupported(format!("{op} on device {name}; supported: {}", support_table())))
}
