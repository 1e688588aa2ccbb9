//! Maps a validated scan to a launch: instruction set or kernel, tiles and precision.

use candle_core::{DType, Device};

use crate::backend::Backend;
use crate::backend::cpu::element::acc_dtype;
use crate::backend::cpu::isa::Isa;
use crate::backend::dispatch::on_gpu;
use crate::backend::support::{device_name, supported, unsupported};
use crate::error::{Error, Result};
#[cfg(feature = "gpu")]
use crate::ops::scan::gpu::launch::GpuScanPlan;
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// In which order the CPU visits queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// Blocks of queries against panels of packed keys.
    Blocks,
    /// Up to 8 queries against many keys, as in decoding: the keys are read once, in place, and split over threads.
    Decode,
}

/// Most queries of [`Walk::Decode`]; with more, packing the keys is faster.
const MAX_DECODE_QUERIES: usize = 8;

/// Fewest keys of [`Walk::Decode`].
const MIN_DECODE_KEYS: usize = 64;

/// Query rows of a block on the CPU.
const BLOCK_ROWS: usize = 64;

/// Vector registers that a panel of keys fills on the CPU.
const PANEL_REGISTERS: usize = 2;

/// How a scan is launched. `Display` prints it on one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScanPlan {
    /// On the CPU.
    Cpu(CpuScanPlan),
    /// On a GPU, with the name of the device kind in the support table.
    #[cfg(feature = "gpu")]
    Gpu(&'static str, GpuScanPlan),
}

/// How a scan is launched on the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuScanPlan {
    /// The instruction set.
    pub isa: Isa,
    /// The order in which queries and keys are visited.
    pub walk: Walk,
    /// Query rows of a task.
    pub block_rows: usize,
    /// Keys of a packed panel.
    pub panel_keys: usize,
    /// Dtype in which scores and energies are computed.
    pub accumulator: DType,
    /// How the candidates are found.
    pub precision: Precision,
}

impl std::fmt::Display for ScanPlan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu(plan) => plan.fmt(f),
            #[cfg(feature = "gpu")]
            Self::Gpu(name, plan) => write!(f, "{name}/{plan}"),
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

/// Properties of the arguments of a scan that are not part of its [`Problem`] but affect the plan.
#[derive(Debug, Clone, Copy, Default)]
#[cfg_attr(not(feature = "gpu"), allow(dead_code))]
pub(crate) struct ArgumentProperties {
    /// Protected keys per row.
    pub(crate) protected: usize,
    /// Whether there is a key prior.
    pub(crate) prior: bool,
    /// Whether the TMA unit of a Hopper GPU can load q and k.
    pub(crate) tma_loadable: bool,
}

impl ScanPlan {
    /// Maps a problem to a launch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that no backend supports, and the supported values.
    #[cfg_attr(not(feature = "gpu"), allow(unused_variables))]
    pub(crate) fn new(
        problem: &Problem,
        properties: ArgumentProperties,
        device: &Device,
        backend: Backend,
    ) -> Result<Self> {
        let name = device_name(device);
        let support = supported("scan", device)?;
        if !support.dtypes.contains(&problem.dtype) {
            return unsupported(format!("dtype {} on {name}", problem.dtype.as_str()));
        }
        if problem.precision == Precision::Certified && !support.certified.contains(&problem.dtype) {
            return unsupported(format!("dtype {} at certified precision on {name}", problem.dtype.as_str()));
        }
        if !support.has_head_dim(problem.head_dim) {
            return unsupported(format!("head_dim {} on {name}", problem.head_dim));
        }
        if !support.candidates.contains(&problem.candidates) {
            return unsupported(format!("{} candidates on {name}", problem.candidates));
        }
        on_gpu!(device, G => Ok(Self::Gpu(name, Self::gpu_plan::<G>(problem, properties, device, backend)?)));
        CpuScanPlan::new(problem, backend).map(Self::Cpu)
    }

    #[cfg(feature = "gpu")]
    fn gpu_plan<G: crate::backend::gpu::tensors::TensorGpu>(
        problem: &Problem,
        properties: ArgumentProperties,
        device: &Device,
        backend: Backend,
    ) -> Result<GpuScanPlan> {
        if let Backend::Force(isa) = backend {
            return Err(Error::Unsupported(format!(
                "{isa:?}, an instruction set of CPUs, for tensors on {}",
                device_name(device)
            )));
        }
        let arch = G::of(device)?.arch();
        let plan = GpuScanPlan::new(problem, properties.protected, properties.prior, &arch)?;
        Ok(if properties.tma_loadable { plan.on_hopper(problem, &arch) } else { plan })
    }

    /// The plan for the CPU; none for a GPU.
    pub fn cpu(&self) -> Option<&CpuScanPlan> {
        match self {
            Self::Cpu(plan) => Some(plan),
            #[cfg(feature = "gpu")]
            Self::Gpu(..) => None,
        }
    }

    /// The plan for a GPU.
    #[cfg(feature = "gpu")]
    pub(crate) fn gpu(&self) -> Result<&GpuScanPlan> {
        match self {
            Self::Cpu(plan) => {
                Err(Error::Invalid(format!("{plan}: a plan for the CPU, with tensors on a GPU")))
            }
            Self::Gpu(_, plan) => Ok(plan),
        }
    }
}

impl CpuScanPlan {
    /// The plan for any number of candidates: the `dense` estimator takes every key.
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
        let accumulator = acc_dtype(problem.dtype);
        let panel_keys = PANEL_REGISTERS * isa.lanes(accumulator.size_in_bytes());
        // The decode walk bounds scores in f32, which does not hold for scores in f64.
        let decode = problem.queries <= MAX_DECODE_QUERIES
            && problem.keys >= MIN_DECODE_KEYS
            && accumulator == DType::F32;
        let walk = if decode { Walk::Decode } else { Walk::Blocks };
        Ok(Self { isa, walk, block_rows: BLOCK_ROWS, panel_keys, accumulator, precision: problem.precision })
    }
}
