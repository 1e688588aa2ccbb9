//! `scan`: the keys of lowest selection energy for every query, without an N x M matrix.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod options;
pub(crate) mod overflow;
pub(crate) mod plan;
pub(crate) mod problem;
pub(crate) mod rescored;

use candle_core::Tensor;

use crate::backend::dispatch::{on_cpu, on_gpu};
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};
use crate::ops::scan::options::Scan;
use crate::ops::scan::plan::{ArgumentProperties, CpuScanPlan, ScanPlan};
use crate::ops::scan::problem::Problem;
use crate::ops::scan::rescored::Rescored;
use crate::options::Precision;

/// The candidate keys of every query.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Key indices `[B, Hq, N, K]`, i32; -1 in unused slots.
    pub index: Tensor,
    /// Selection energies `[B, Hq, N, K]`, f32 (f64 for f64 tensors); +inf in unused slots. An energy of finite numbers
    /// that exceeds the range of the dtype is its greatest number, with the sign of the energy
    /// ([`Candidates::overflowed`]).
    pub energy: Tensor,
    /// 1 where a candidate is protected, u8 `[B, Hq, N, K]`; absent without protected keys.
    pub protected: Option<Tensor>,
    /// The share of the visible pairs that was scored in full precision.
    pub rescored: Rescored,
}

impl Candidates {
    /// The number of candidates whose energy exceeds the range of its dtype. They are the right candidates, and their stored
    /// energies are equal. They are sorted, and one of them is selected, by what the energies are in f64 (on Metal by
    /// differences in f32). The checked mode of a scan refuses them. On a GPU this waits for the device.
    ///
    /// # Errors
    /// An earlier launch that failed, or a failed copy to the host.
    pub fn overflowed(&self) -> Result<usize> {
        overflow::count(&self.energy)
    }
}

/// The K keys of lowest selection energy for every query, and its protected keys, sorted by (energy, index).
///
/// q is `[B, Hq, N, D]` and k `[B, Hk, M, D]`, of one dtype and device, Hq a multiple of Hk. On the CPU, k may be in f16 or
/// bf16 where q is in f32; the result is that for k widened to f32, to the bit. The energy of key j for
/// query i is `beta |q_i - k_j|^2 - b_j`, or `-beta <q_i, k_j> - b_j` for [`Score::Dot`](crate::Score::Dot), with the
/// prior b. The result has no gradient; gradients start at [`select`](crate::select).
///
/// Keys are ranked by scores that expand the energy. Where their rounding errors could decide, because queries and keys
/// have a large common offset or their squares overflow, the row is ranked again by differences: on the CPU and on CUDA
/// in f64, on Metal in f32. The rule depends on the query and its visible keys alone.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{Mask, Scan, scan};
///
/// # fn main() -> gd_kernels::Result<()> {
/// let device = Device::Cpu;
/// let (q, k) = (Tensor::randn(0f32, 1.0, (1, 4, 3, 16), &device)?, Tensor::randn(0f32, 1.0, (1, 2, 10, 16), &device)?);
/// let beta = Tensor::full(0.5f32, 4, &device)?;
/// let mask = Mask::causal(7);
/// let candidates = scan(&q, &k, &Scan::new(&beta, &mask, 2))?;
/// assert_eq!(candidates.index.dims(), [1, 4, 3, 2]);
/// assert_eq!(candidates.index.dtype(), DType::I32);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Invalid`] names the shapes, values or devices that do not fit, [`Error::Unsupported`] the value that no
/// backend of this build supports. In checked mode, an energy that overflows, and dot products that may.
pub fn scan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let _span = operator_span("scan", Pass::Forward);
    let problem = Problem::new(q, k, scan)?;
    let plan = plan_of(&problem, q, k, scan)?;
    run(&problem, plan, q, k, scan)
}

/// Runs a planned scan and, in checked mode, checks its energies.
fn run(problem: &Problem, plan: ScanPlan, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let candidates = run_unchecked(problem, plan, q, k, scan)?;
    if scan.checked {
        overflow::refuse(&candidates.energy, &candidates.index)?;
    }
    Ok(candidates)
}

fn run_unchecked(
    problem: &Problem,
    plan: ScanPlan,
    q: &Tensor,
    k: &Tensor,
    scan: &Scan,
) -> Result<Candidates> {
    on_gpu!(q.device(), G => gpu::tensors::scan::<G>(problem, plan.gpu()?, q, k, scan));
    match plan {
        ScanPlan::Cpu(plan) => cpu::scan(problem, &plan, q, k, scan),
        #[cfg(feature = "gpu")]
        ScanPlan::Gpu(..) => {
            Err(Error::Invalid(format!("{plan}: a plan for a GPU, with tensors on the CPU")))
        }
    }
}

/// Every visible key as a candidate, K = M: the O(N M) reference behind
/// [`Estimator::Dense`](crate::Estimator::Dense). `scan.candidates` is not used.
///
/// # Errors
/// As [`scan`]; tensors on a GPU.
pub fn scan_all(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let _span = operator_span("scan", Pass::Forward);
    let mut problem = Problem::new(q, k, scan)?;
    (problem.candidates, problem.precision) = (problem.keys, Precision::Native);
    if !on_cpu(q.device()) {
        return Err(Error::Unsupported(format!(
            "every key as a candidate on {:?}: the `dense` estimator runs on the CPU",
            q.device().location()
        )));
    }
    let plan = CpuScanPlan::new(&problem, scan.backend)?;
    run(&problem, ScanPlan::Cpu(plan), q, k, scan)
}

/// The plan that [`scan`] runs for these arguments.
///
/// # Errors
/// As [`scan`].
pub fn plan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<ScanPlan> {
    plan_of(&Problem::new(q, k, scan)?, q, k, scan)
}

/// The plan of a validated problem.
#[cfg_attr(not(feature = "gpu"), allow(unused_variables))]
pub(crate) fn plan_of(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<ScanPlan> {
    #[cfg(feature = "gpu")]
    let tma_loadable = [q, k].into_iter().all(crate::backend::gpu::tensor_map::loadable);
    #[cfg(not(feature = "gpu"))]
    let tma_loadable = false;
    let properties = ArgumentProperties {
        protected: scan.protected.map_or(0, |p| p.dims().last().copied().unwrap_or(0)),
        prior: scan.prior.is_some(),
        tma_loadable,
    };
    ScanPlan::new(problem, properties, q.device(), scan.backend)
}
