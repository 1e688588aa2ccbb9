//! `scan`: the candidate keys of every query, without an N x M matrix.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod plan;
pub(crate) mod problem;
pub(crate) mod rescored;

use candle_core::Tensor;

use crate::backend::Backend;
use crate::backend::check::{head_values, positive};
use crate::backend::cpu::element::{Element, Real, acc_dtype};
use crate::backend::cpu::view::with_view;
use crate::backend::dispatch::{on_cpu, on_gpu};
use crate::backend::graph::with_contiguous_rows;
use crate::by_float;
use crate::cache::int8_keys::Int8Keys;
use crate::cache::key_bias::KeyBias;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::ops::scan::plan::{CpuScanPlan, Extras, ScanPlan};
use crate::ops::scan::problem::{Problem, prior_dims, problem, protected_dims};
use crate::ops::scan::rescored::Rescored;
use crate::options::{Precision, Score, TieBreak};

/// The candidate set of every query.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// Keys `[B, Hq, N, K]`, i32; -1 where a query has fewer candidates.
    pub index: Tensor,
    /// Selection energies `[B, Hq, N, K]`, f32 (f64 for f64 tensors); +inf where `index` is -1.
    pub energy: Tensor,
    /// 1 where a candidate is protected, u8 `[B, Hq, N, K]`; absent if nothing is.
    pub protected: Option<Tensor>,
    /// The share of pairs that was scored in full precision.
    pub rescored: Rescored,
}

/// What to scan for. `Scan::new` gives the defaults; set the other fields as needed.
#[derive(Debug, Clone)]
pub struct Scan<'a> {
    /// Inverse bandwidth per query head `[Hq]`, finite and > 0.
    pub beta: &'a Tensor,
    /// Key prior b `[B|1, Hq|Hk, M]`; a prior of -inf bans a key.
    pub prior: Option<&'a Tensor>,
    /// Which keys each query sees.
    pub mask: &'a Mask,
    /// Lowest energies to keep, one of [`CANDIDATES`](crate::CANDIDATES). May exceed the number of keys.
    pub candidates: usize,
    /// How keys are scored.
    pub score: Score,
    /// Which of equals comes first.
    pub tie: TieBreak,
    /// Keys that stay candidates whatever their energy, as long as they are visible: i32
    /// `[B|1, Hq|Hk|1, N|1, P]`, negative where unused. Adds P slots.
    pub protected: Option<&'a Tensor>,
    /// Refuse NaN and infinities in the rows that take part. Unchecked, a key with no finite
    /// energy is never a candidate. On a GPU the values of beta, prior and protected keys are looked
    /// at in the checked mode alone, since that waits for the device.
    pub checked: bool,
    /// How candidates are found.
    pub precision: Precision,
    /// k as integers, if the caller keeps them; a certified scan quantises k itself otherwise. Of a cache in pages,
    /// those of the pages.
    pub quantized: Option<&'a Int8Keys>,
    /// The norms of k, if the caller keeps them; for [`scan_select`](crate::scan_select) of a few queries on a GPU.
    pub key_bias: Option<&'a KeyBias>,
    /// Where to run.
    pub backend: Backend,
}

impl<'a> Scan<'a> {
    /// A scan by energy, first of equals, unchecked, on the best backend.
    pub fn new(beta: &'a Tensor, mask: &'a Mask, candidates: usize) -> Self {
        Self {
            beta,
            prior: None,
            mask,
            candidates,
            score: Score::default(),
            tie: TieBreak::default(),
            protected: None,
            checked: false,
            precision: Precision::default(),
            quantized: None,
            key_bias: None,
            backend: Backend::default(),
        }
    }
}

/// The K keys of least selection energy for every query, and the protected ones, sorted by
/// (energy, index).
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, of one dtype and device, Hq a multiple of Hk. Not
/// differentiable: gradients start at [`crate::ops::select`].
///
/// # Errors
/// Names the shapes, values or devices that do not fit.
pub fn scan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let (problem, plan) = planned(q, k, scan)?;
    on_gpu!(q.device(), G => crate::ops::scan::gpu::tensors::scan::<G>(&problem, plan.gpu()?, q, k, scan));
    match plan {
        ScanPlan::Cpu(plan) => launch(&problem, &plan, q, k, scan),
        #[cfg(feature = "gpu")]
        ScanPlan::Gpu(..) => Err(Error::Invalid(format!("{plan}: the plan of a GPU, for tensors on the CPU"))),
    }
}

/// Every visible key as a candidate, K = M: the O(N * M) reference behind `Estimator::Dense`.
/// `scan.candidates` is not used.
///
/// # Errors
/// As [`scan`].
pub fn scan_all(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let mut problem = problem(q, k, scan)?;
    (problem.candidates, problem.precision) = (problem.keys, Precision::Native);
    if !on_cpu(q.device()) {
        return Err(Error::Unsupported(format!(
            "every key as a candidate on {:?}: the `dense` estimator runs on the CPU",
            q.device().location()
        )));
    }
    let plan = CpuScanPlan::new(&problem, scan.backend)?;
    launch(&problem, &plan, q, k, scan)
}

/// The plan that [`scan`] would run.
///
/// # Errors
/// As [`scan`].
pub fn plan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<ScanPlan> {
    planned(q, k, scan).map(|(_, plan)| plan)
}

/// The validated problem and its plan.
pub(crate) fn planned(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<(Problem, ScanPlan)> {
    let problem = problem(q, k, scan)?;
    let plan = plan_of(&problem, q, k, scan)?;
    Ok((problem, plan))
}

/// The plan of a validated problem.
pub(crate) fn plan_of(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<ScanPlan> {
    let protected = scan.protected.map_or(0, |p| p.dims().last().copied().unwrap_or(0));
    #[cfg(feature = "gpu")]
    let mappable = [q, k].into_iter().all(crate::backend::gpu::tensor_map::takes);
    #[cfg(not(feature = "gpu"))]
    let mappable = false;
    let extras = Extras { protected, prior: scan.prior.is_some(), mappable };
    ScanPlan::new(problem, extras, q.device(), scan.backend)
}

fn launch(problem: &Problem, plan: &CpuScanPlan, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let (q, k) = (with_contiguous_rows(q)?, with_contiguous_rows(k)?);
    let protected = scan.protected.map(|p| protected_keys(p, problem)).transpose()?;
    let quantized = match (scan.quantized, problem.precision) {
        (Some(keys), Precision::Certified) => Some(keys.filter(problem)?),
        _ => None,
    };
    let (b, h, n) = (problem.batch, problem.q_heads, problem.queries);
    by_float!("scan", problem.dtype, T => {
        let beta = head_values::<<T as Element>::Acc>("beta", scan.beta, h)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(p, problem)).transpose()?;
        with_view::<T, _>(&q, |qv| with_view::<T, _>(&k, |kv| {
            let inputs = cpu::Inputs {
                q: qv, k: kv, beta: &beta, prior: prior.as_ref(), protected: protected.as_ref(), mask: scan.mask,
                quantized,
            };
            if scan.checked {
                cpu::check::finite(problem, &inputs)?;
            }
            let out = cpu::run(problem, plan, &inputs);
            let shape = (b, h, n, out.slots);
            let flags = scan.protected.map(|_| Tensor::from_vec(out.protected, shape, q.device())).transpose()?;
            Ok(Candidates {
                index: Tensor::from_vec(out.index, shape, q.device())?,
                energy: Tensor::from_vec(out.energy, shape, q.device())?,
                protected: flags,
                rescored: Rescored::known(out.rescored),
            })
        }))
    })
}

fn prior_values<A: Real>(prior: &Tensor, problem: &Problem) -> Result<cpu::Prior<A>> {
    let dims = prior_dims(prior, problem)?;
    let data: Vec<A> = prior.detach().to_dtype(acc_dtype(problem.dtype))?.flatten_all()?.to_vec1()?;
    // -inf bans a key; NaN and +inf have no meaning.
    if let Some(at) = data.iter().position(|x| x.is_nan() || *x == A::infinity()) {
        return Err(Error::Invalid(format!("prior value {at} (flat) is {}", data[at])));
    }
    Ok(cpu::Prior { data, dims })
}

fn protected_keys(t: &Tensor, problem: &Problem) -> Result<cpu::Protected> {
    let dims = protected_dims(t, problem)?;
    let data: Vec<i32> = t.flatten_all()?.to_vec1()?;
    match data.iter().find(|&&j| j >= problem.keys as i32) {
        Some(j) => Err(Error::Invalid(format!("protected key {j} is beyond the {} keys", problem.keys))),
        None => Ok(cpu::Protected { data, dims }),
    }
}

/// The checked mode of a device: everything is copied to the host and checked as there.
#[cfg(feature = "gpu")]
pub(crate) fn check_values(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<()> {
    let host = |t: &Tensor| t.detach().to_device(&candle_core::Device::Cpu);
    let (q, k) = (host(q)?, host(k)?);
    let (q, k) = (with_contiguous_rows(&q)?, with_contiguous_rows(&k)?);
    if let Some(protected) = scan.protected {
        protected_keys(&host(protected)?, problem)?;
    }
    by_float!("scan", problem.dtype, T => {
        type A = <T as Element>::Acc;
        let beta = head_values::<A>("beta", &host(scan.beta)?, problem.q_heads)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(&host(p)?, problem)).transpose()?;
        with_view::<T, _>(&q, |qv| with_view::<T, _>(&k, |kv| {
            let inputs = cpu::Inputs {
                q: qv, k: kv, beta: &beta, prior: prior.as_ref(), protected: None, mask: scan.mask, quantized: None,
            };
            cpu::check::finite(problem, &inputs)
        }))
    })
}
