//! Problem -> plan -> launch: one table says which backend runs what.

use candle_core::{DType, Device};

use crate::backend::Backend;
use crate::backend::cpu::isa::Isa;
use crate::backend::dispatch::on_gpu;
use crate::backend::support::{SUPPORT, device_name, require_device, support_table};
use crate::error::{Error, Result};
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// How the CPU walks queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// Blocks of queries against panels of packed keys.
    Panels,
    /// A few queries against many keys, as in decoding: the keys are read once, where they lie, and
    /// split over threads.
    Few,
}

/// Most queries of a head, and fewest keys, of [`Walk::Decode`]: beyond, packing the keys pays.
const FEW: (usize, usize) = (8, 64);

/// How a problem is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScanPlan {
    /// On the CPU.
    Cpu(CpuScanPlan),
    /// On a GPU of the kind that the support table names so.
    #[cfg(feature = "gpu")]
    Gpu(&'static str, crate::ops::scan::gpu::launch::ScanPlan),
}

/// How a problem is launched on the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuScanPlan {
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

impl std::fmt::Display for ScanPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ScanPlan::Cpu(plan) => plan.fmt(f),
            #[cfg(feature = "gpu")]
            ScanPlan::Gpu(name, plan) => write!(f, "{name}/{plan}"),
        }
    }
}

impl std::fmt::Display for CpuScanPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let CpuScanPlan { isa, walk, block_rows, panel_keys, accumulator, precision } = self;
        let accumulator = accumulator.as_str();
        match walk {
            Walk::Blocks => {
                write!(f, "cpu/{isa:?}: {block_rows} query rows x {panel_keys} keys, {accumulator}")?;
            }
            Walk::Decode => write!(f, "cpu/{isa:?}: few queries, {accumulator}")?,
        }
        match precision {
            Precision::Native => Ok(()),
            Precision::Certified => write!(f, " certified by 8-bit integers"),
        }
    }
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

impl ScanPlan {
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
        CpuScanPlan::new(problem, backend).map(Self::Cpu)
    }

    #[cfg(feature = "gpu")]
    fn gpu_plan<G: crate::backend::gpu::tensors::TensorGpu>(
        problem: &Problem,
        extras: Extras,
        device: &Device,
        backend: Backend,
    ) -> Result<crate::ops::scan::gpu::launch::ScanPlan> {
        if let Backend::Force(isa) = backend {
            return Err(Error::Unsupported(format!(
                "{isa:?}, an instruction set of CPUs, for tensors on {}",
                device_name(device)
            )));
        }
        let arch = G::of(device)?.arch();
        let plan = crate::ops::scan::gpu::launch::ScanPlan::new(problem, extras.protected, extras.prior, &arch)?;
        Ok(if extras.mappable { plan.on_hopper(problem, &arch) } else { plan })
    }

    /// The plan for the CPU, if it is one.
    pub fn cpu(&self) -> Option<&CpuScanPlan> {
        match self {
            Self::Cpu(plan) => Some(plan),
            #[cfg(feature = "gpu")]
            Self::Gpu(..) => None,
        }
    }

    /// The plan for a GPU, whichever it is.
    #[cfg(feature = "gpu")]
    pub(crate) fn gpu(&self) -> Result<&crate::ops::scan::gpu::launch::ScanPlan> {
        match self {
            Self::Cpu(plan) => {
                Err(Error::Invalid(format!("{plan}: the plan of a CPU, for tensors on a GPU")))
            }
            Self::Gpu(_, plan) => Ok(plan),
        }
    }
}

impl CpuScanPlan {
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
        let accumulator = crate::backend::cpu::element::acc_dtype(problem.dtype);
        let panel_keys = 2 * isa.lanes(accumulator.size_in_bytes());
        // Bounds of quick scores are kept in f32, and hold for scores of f32 alone.
        let few = problem.queries <= FEW.0 && problem.keys >= FEW.1 && accumulator == DType::F32;
        let walk = if few { Walk::Decode } else { Walk::Blocks };
        Ok(Self { isa, walk, block_rows: 64, panel_keys, accumulator, precision: problem.precision })
    }
}
