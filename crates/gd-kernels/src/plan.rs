//! Problem -> plan -> launch: one table says which backend runs what.

use candle_core::{DType, Device};

use crate::error::{Error, Result};
use crate::gpu::on_gpu;
use crate::options::{Precision, Score, TieBreak};

/// Instruction sets of the CPU backend. Every one gives the same bits: each score is one chain of
/// fused multiply-adds over the head dimension, whatever the register width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// No vector instructions assumed.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 (F, BW, CD, DQ, VL).
    Avx512,
    /// The same with dot products of 8-bit integers (VNNI).
    Avx512Vnni,
    /// The same with tile products of 8-bit integers (AMX), on Linux.
    Avx512Amx,
    /// AArch64.
    Neon,
}

impl Isa {
    /// The instruction sets of this machine, best first; `Portable` is always the last.
    pub fn available() -> Vec<Isa> {
        [Isa::Avx512Amx, Isa::Avx512Vnni, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable]
            .into_iter()
            .filter(|i| i.arch().is_some())
            .collect()
    }

    /// The dispatcher, if this machine has the instruction set.
    pub(crate) fn arch(self) -> Option<pulp::Arch> {
        match self {
            Isa::Portable => Some(pulp::Arch::Scalar),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => pulp::x86::V3::try_new().map(pulp::Arch::V3),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni if !std::arch::is_x86_feature_detected!("avx512vnni") => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx if !crate::cpu::amx::available() => None,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pulp::aarch64::Neon::try_new().map(pulp::Arch::Neon),
            #[allow(unreachable_patterns)]
            _ => None,
        }
    }

    /// Lanes of a register for elements of `bytes` bytes.
    pub(crate) fn lanes(self, bytes: usize) -> usize {
        match self {
            Isa::Portable => 1,
            Isa::Neon => 16 / bytes,
            Isa::Avx2 => 32 / bytes,
            Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Amx => 64 / bytes,
        }
    }
}

/// Which backend an operator uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The best one for the tensors' device and this machine.
    #[default]
    Auto,
    /// Exactly this instruction set on the CPU, or an error.
    Force(Isa),
}

/// A validated scan: q `[batch, q_heads, queries, head_dim]`, k `[batch, kv_heads, keys, head_dim]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// B.
    pub batch: usize,
    /// Hq, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// N.
    pub queries: usize,
    /// M.
    pub keys: usize,
    /// D.
    pub head_dim: usize,
    /// Candidates kept per query, protected ones not counted.
    pub candidates: usize,
    /// Element type of q and k.
    pub dtype: DType,
    /// How keys are scored.
    pub score: Score,
    /// Which of equals wins.
    pub tie: TieBreak,
    /// How candidates are found.
    pub precision: Precision,
}

impl Problem {
    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

/// How the CPU walks queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// Blocks of queries against panels of packed keys.
    Panels,
    /// A few queries against many keys, as in decoding: the keys are read once, where they lie, and
    /// split over threads.
    Few,
}

/// Most queries of a head, and fewest keys, of [`Walk::Few`]: beyond, packing the keys pays.
const FEW: (usize, usize) = (8, 64);

/// How a problem is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// On the CPU.
    Cpu(CpuPlan),
    /// On a GPU of the kind that the support table names so.
    #[cfg(feature = "gpu")]
    Gpu(&'static str, crate::gpu::scan::Plan),
}

/// How a problem is launched on the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuPlan {
    /// The instruction set.
    pub isa: Isa,
    /// The order of the walk.
    pub walk: Walk,
    /// Query rows a task holds.
    pub block_rows: usize,
    /// Keys a packed panel holds.
    pub panel_keys: usize,
    /// What scores and energies are computed in.
    pub accumulator: DType,
    /// What finds the candidates.
    pub precision: Precision,
}

impl std::fmt::Display for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Plan::Cpu(plan) => plan.fmt(f),
            #[cfg(feature = "gpu")]
            Plan::Gpu(name, plan) => write!(f, "{name}/{plan}"),
        }
    }
}

impl std::fmt::Display for CpuPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CpuPlan { isa, walk, block_rows, panel_keys, accumulator, precision } = self;
        let accumulator = accumulator.as_str();
        match walk {
            Walk::Panels => {
                write!(f, "cpu/{isa:?}: {block_rows} query rows x {panel_keys} keys, {accumulator}")?;
            }
            Walk::Few => write!(f, "cpu/{isa:?}: few queries, {accumulator}")?,
        }
        match precision {
            Precision::Native => Ok(()),
            Precision::Certified => write!(f, " certified by 8-bit integers"),
        }
    }
}

/// One line of the support table.
struct Support {
    device: &'static str,
    dtypes: &'static [DType],
    certified: &'static [DType],
    head_dim: std::ops::RangeInclusive<usize>,
    /// head_dim is a multiple of this.
    step: usize,
    candidates: &'static [usize],
}

/// The greatest head_dim.
pub(crate) const MAX_HEAD_DIM: usize = 1024;

/// Candidates that a scan may keep for a query.
pub const CANDIDATES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];

/// Everything that runs. Documentation, errors and `gd doctor` print this table.
const SUPPORT: &[Support] = &[
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
        // In decoding alone, which has a plan of its own.
        certified: &[],
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
fn device_name(device: &Device) -> &'static str {
    #[cfg(feature = "emulate")]
    if let Some(arch) = crate::gpu::emulated() {
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

/// What a scan has besides its [`Problem`] that a plan depends on.
#[derive(Debug, Clone, Copy, Default)]
#[cfg_attr(not(feature = "gpu"), allow(dead_code))]
pub(crate) struct Extras {
    /// Protected keys of a row.
    pub(crate) protected: usize,
    /// Whether there is a key prior.
    pub(crate) prior: bool,
    /// Whether the copy engine of a GPU takes q and k as they lie.
    pub(crate) mappable: bool,
}

impl Plan {
    /// Maps a problem to a launch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that no backend covers, and what is covered.
    #[cfg_attr(not(feature = "gpu"), allow(unused_variables))]
    pub(crate) fn new(problem: &Problem, extras: Extras, device: &Device, backend: Backend) -> Result<Self> {
        require_device("scan", device)?;
        let refuse =
            |what: String| Err(Error::Unsupported(format!("{what}; supported: {}", support_table())));
        let name = device_name(device);
        let Some(s) = SUPPORT.iter().find(|s| s.device == name) else { unreachable!("checked above") };
        if !s.dtypes.contains(&problem.dtype) {
            return refuse(format!("dtype {} on {name}", problem.dtype.as_str()));
        }
        if problem.precision == Precision::Certified && !s.certified.contains(&problem.dtype) {
            return refuse(format!("dtype {} at certified precision on {name}", problem.dtype.as_str()));
        }
        if !s.head_dim.contains(&problem.head_dim) || !problem.head_dim.is_multiple_of(s.step) {
            return refuse(format!("head_dim {} on {name}", problem.head_dim));
        }
        if !s.candidates.contains(&problem.candidates) {
            return refuse(format!("{} candidates on {name}", problem.candidates));
        }
        on_gpu!(device, G => Ok(Self::Gpu(name, Self::gpu_plan::<G>(problem, extras, device, backend)?)));
        CpuPlan::new(problem, backend).map(Self::Cpu)
    }

    #[cfg(feature = "gpu")]
    fn gpu_plan<G: crate::gpu::tensors::TensorGpu>(
        problem: &Problem,
        extras: Extras,
        device: &Device,
        backend: Backend,
    ) -> Result<crate::gpu::scan::Plan> {
        if let Backend::Force(isa) = backend {
            return Err(Error::Unsupported(format!(
                "{isa:?}, an instruction set of CPUs, for tensors on {}",
                device_name(device)
            )));
        }
        let arch = G::of(device)?.arch();
        let plan = crate::gpu::scan::Plan::new(problem, extras.protected, extras.prior, &arch)?;
        Ok(if extras.mappable { plan.on_hopper(problem, &arch) } else { plan })
    }

    /// The plan for the CPU, if it is one.
    pub fn cpu(&self) -> Option<&CpuPlan> {
        match self {
            Self::Cpu(plan) => Some(plan),
            #[cfg(feature = "gpu")]
            Self::Gpu(..) => None,
        }
    }

    /// The plan for a GPU, whichever it is.
    #[cfg(feature = "gpu")]
    pub(crate) fn gpu(&self) -> Result<&crate::gpu::scan::Plan> {
        match self {
            Self::Cpu(plan) => {
                Err(Error::Invalid(format!("{plan}: the plan of a CPU, for tensors on a GPU")))
            }
            Self::Gpu(_, plan) => Ok(plan),
        }
    }
}

impl CpuPlan {
    /// The plan of any number of candidates: the `dense` reference keeps every key.
    pub(crate) fn new(problem: &Problem, backend: Backend) -> Result<Self> {
        let isa = match backend {
            Backend::Auto => Isa::available()[0],
            Backend::Force(isa) if isa.arch().is_some() => isa,
            Backend::Force(isa) => {
                return Err(Error::Unsupported(format!(
                    "{isa:?} on this machine, which has {:?}",
                    Isa::available()
                )));
            }
        };
        let accumulator = crate::element::acc_dtype(problem.dtype);
        let panel_keys = 2 * isa.lanes(accumulator.size_in_bytes());
        // Bounds of quick scores are kept in f32, and hold for scores of f32 alone.
        let few = problem.queries <= FEW.0 && problem.keys >= FEW.1 && accumulator == DType::F32;
        let walk = if few { Walk::Few } else { Walk::Panels };
        Ok(Self { isa, walk, block_rows: 64, panel_keys, accumulator, precision: problem.precision })
    }
}
