//! `scan`: the candidate keys of every query, without an N x M matrix.

use candle_core::{DType, Tensor};

use crate::by_float;
use crate::cpu;
use crate::element::acc_dtype;
use crate::error::{Error, Result};
use crate::gpu::{on_cpu, on_gpu};
use crate::key_bias::KeyBias;
use crate::mask::Mask;
use crate::options::{Precision, Score, TieBreak};
use crate::plan::{Backend, CpuPlan, Extras, Plan, Problem};
use crate::quantized::QuantizedKeys;
use crate::rescored::Rescored;

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
    pub quantized: Option<&'a QuantizedKeys>,
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
/// differentiable: gradients start at [`crate::select`].
///
/// # Errors
/// Names the shapes, values or devices that do not fit.
pub fn scan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let (problem, plan) = planned(q, k, scan)?;
    on_gpu!(q.device(), G => crate::gpu::tensors::scan::scan::<G>(&problem, plan.gpu()?, q, k, scan));
    match plan {
        Plan::Cpu(plan) => launch(&problem, &plan, q, k, scan),
        #[cfg(feature = "gpu")]
        Plan::Gpu(..) => Err(Error::Invalid(format!("{plan}: the plan of a GPU, for tensors on the CPU"))),
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
    let plan = CpuPlan::new(&problem, scan.backend)?;
    launch(&problem, &plan, q, k, scan)
}

/// The plan that [`scan`] would run.
///
/// # Errors
/// As [`scan`].
pub fn plan(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Plan> {
    planned(q, k, scan).map(|(_, plan)| plan)
}

/// The validated problem and its plan.
pub(crate) fn planned(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<(Problem, Plan)> {
    let problem = problem(q, k, scan)?;
    let plan = plan_of(&problem, q, k, scan)?;
    Ok((problem, plan))
}

/// The plan of a validated problem.
pub(crate) fn plan_of(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Plan> {
    let protected = scan.protected.map_or(0, |p| p.dims().last().copied().unwrap_or(0));
    let mappable = [q, k].into_iter().all(crate::gpu::tensor_map::takes);
    let extras = Extras { protected, prior: scan.prior.is_some(), mappable };
    Plan::new(problem, extras, q.device(), scan.backend)
}

/// The validated problem.
pub(crate) fn problem(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Problem> {
    let (batch, q_heads, queries, head_dim) = dims4("q", q)?;
    let (kb, kv_heads, keys, kd) = dims4("k", k)?;
    if kb != batch || kd != head_dim {
        return Err(Error::Invalid(format!(
            "q {:?} and k {:?} differ in batch or head_dim",
            q.dims(),
            k.dims()
        )));
    }
    if q_heads % kv_heads != 0 {
        return Err(Error::Invalid(format!(
            "{q_heads} query heads are not a multiple of {kv_heads} key heads"
        )));
    }
    if q.dtype() != k.dtype() {
        return Err(Error::Invalid(format!("q is {:?}, k is {:?}", q.dtype(), k.dtype())));
    }
    if !q.device().same_device(k.device()) {
        return Err(Error::Invalid("q and k are on different devices".into()));
    }
    if keys > i32::MAX as usize {
        return Err(Error::Invalid(format!("{keys} keys do not fit an i32 index")));
    }
    scan.mask.validate(batch, keys)?;
    Ok(Problem {
        batch,
        q_heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        candidates: scan.candidates,
        dtype: q.dtype(),
        score: scan.score,
        tie: scan.tie,
        precision: scan.precision,
    })
}

fn launch(problem: &Problem, plan: &CpuPlan, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Candidates> {
    let (q, k) = (crate::fused::with_contiguous_rows(q)?, crate::fused::with_contiguous_rows(k)?);
    let protected = scan.protected.map(|p| protected_keys(p, problem)).transpose()?;
    let quantized = match (scan.quantized, problem.precision) {
        (Some(keys), Precision::Certified) => Some(keys.filter(problem)?),
        _ => None,
    };
    let (b, h, n) = (problem.batch, problem.q_heads, problem.queries);
    by_float!("scan", problem.dtype, T => {
        let beta = head_values::<<T as crate::element::Element>::Acc>("beta", scan.beta, h)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(p, problem)).transpose()?;
        cpu::view::with_view::<T, _>(&q, |qv| cpu::view::with_view::<T, _>(&k, |kv| {
            let inputs = cpu::scan::Inputs {
                q: qv, k: kv, beta: &beta, prior: prior.as_ref(), protected: protected.as_ref(), mask: scan.mask,
                quantized,
            };
            if scan.checked {
                cpu::check::finite(problem, &inputs)?;
            }
            let out = cpu::scan::run(problem, plan, &inputs);
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

/// The four dimensions of an operator's tensor, none of them 0.
pub(crate) fn dims4(name: &str, t: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *t.dims() {
        [b, h, n, d] if b * h * n * d > 0 => Ok((b, h, n, d)),
        [_, _, _, _] => Err(Error::Invalid(format!("{name} {:?} is empty", t.dims()))),
        _ => Err(Error::Invalid(format!("{name} {:?} is not of rank 4 [batch, heads, rows, dim]", t.dims()))),
    }
}

/// Refuses a per-head parameter that is not `[heads]`.
pub(crate) fn check_head(name: &str, t: &Tensor, heads: usize) -> Result<()> {
    match t.dims() == [heads] {
        true => Ok(()),
        false => {
            Err(Error::Invalid(format!("{name} {:?} is not [{heads}], one value per query head", t.dims())))
        }
    }
}

/// A per-head parameter `[heads]` as accumulators, without its gradient.
pub(crate) fn head_values<A: crate::element::Real>(name: &str, t: &Tensor, heads: usize) -> Result<Vec<A>> {
    check_head(name, t, heads)?;
    Ok(t.detach().to_dtype(A::DTYPE)?.to_vec1()?)
}

/// Refuses a per-head parameter that is not finite and positive.
pub(crate) fn positive<A: crate::element::Real>(name: &str, values: &[A]) -> Result<()> {
    match values.iter().position(|x| !(x.is_finite() && *x > A::zero())) {
        Some(h) => Err(Error::Invalid(format!("{name} of head {h} is {}, not finite and > 0", values[h]))),
        None => Ok(()),
    }
}

/// The shape of a key prior, checked against `[B|1, Hq|Hk, M]`.
pub(crate) fn prior_dims(prior: &Tensor, problem: &Problem) -> Result<[usize; 3]> {
    match *prior.dims() {
        [b, h, m]
            if (b == 1 || b == problem.batch)
                && (h == problem.q_heads || h == problem.kv_heads)
                && m == problem.keys =>
        {
            Ok([b, h, m])
        }
        _ => Err(Error::Invalid(format!(
            "prior {:?} is not [{} or 1, {} or {}, {}] (batch, heads, keys)",
            prior.dims(),
            problem.batch,
            problem.q_heads,
            problem.kv_heads,
            problem.keys
        ))),
    }
}

fn prior_values<A: crate::element::Real>(prior: &Tensor, problem: &Problem) -> Result<cpu::scan::Prior<A>> {
    let dims = prior_dims(prior, problem)?;
    let data: Vec<A> = prior.detach().to_dtype(acc_dtype(problem.dtype))?.flatten_all()?.to_vec1()?;
    // -inf bans a key; NaN and +inf have no meaning.
    if let Some(at) = data.iter().position(|x| x.is_nan() || *x == A::infinity()) {
        return Err(Error::Invalid(format!("prior value {at} (flat) is {}", data[at])));
    }
    Ok(cpu::scan::Prior { data, dims })
}

/// The shape of protected keys, checked against `[B|1, Hq|Hk|1, N|1, P]`.
pub(crate) fn protected_dims(t: &Tensor, problem: &Problem) -> Result<[usize; 4]> {
    let Problem { batch, q_heads, kv_heads, queries, .. } = *problem;
    let fits = |x: usize, sizes: &[usize]| x == 1 || sizes.contains(&x);
    if t.dtype() != DType::I32 {
        return Err(Error::Invalid(format!("protected holds {:?}, not i32 key indices", t.dtype())));
    }
    match *t.dims() {
        [b, h, n, p]
            if fits(b, &[batch]) && fits(h, &[q_heads, kv_heads]) && fits(n, &[queries]) && p > 0 =>
        {
            Ok([b, h, n, p])
        }
        _ => Err(Error::Invalid(format!(
            "protected {:?} is not [{batch} or 1, {q_heads}, {kv_heads} or 1, {queries} or 1, slots]",
            t.dims()
        ))),
    }
}

fn protected_keys(t: &Tensor, problem: &Problem) -> Result<cpu::scan::Protected> {
    let dims = protected_dims(t, problem)?;
    let data: Vec<i32> = t.flatten_all()?.to_vec1()?;
    match data.iter().find(|&&j| j >= problem.keys as i32) {
        Some(j) => Err(Error::Invalid(format!("protected key {j} is beyond the {} keys", problem.keys))),
        None => Ok(cpu::scan::Protected { data, dims }),
    }
}

/// The checked mode of a device: everything is copied to the host and checked as there.
#[cfg(feature = "gpu")]
pub(crate) fn check_values(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<()> {
    let host = |t: &Tensor| t.detach().to_device(&candle_core::Device::Cpu);
    let (q, k) = (host(q)?, host(k)?);
    let (q, k) = (crate::fused::with_contiguous_rows(&q)?, crate::fused::with_contiguous_rows(&k)?);
    if let Some(protected) = scan.protected {
        protected_keys(&host(protected)?, problem)?;
    }
    by_float!("scan", problem.dtype, T => {
        type A = <T as crate::element::Element>::Acc;
        let beta = head_values::<A>("beta", &host(scan.beta)?, problem.q_heads)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(&host(p)?, problem)).transpose()?;
        cpu::view::with_view::<T, _>(&q, |qv| cpu::view::with_view::<T, _>(&k, |kv| {
            let inputs = cpu::scan::Inputs {
                q: qv, k: kv, beta: &beta, prior: prior.as_ref(), protected: None, mask: scan.mask, quantized: None,
            };
            cpu::check::finite(problem, &inputs)
        }))
    })
}
