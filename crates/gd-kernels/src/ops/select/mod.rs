//! `select`: the value row of one candidate for every query and head, or zeros where the head abstains.
//!
//! The barrier is applied to the energies of the candidates, then the threshold, the choice of the winner and the gate;
//! a further round of refinement repeats this with the residual query. `rounds` has this sequence once, in terms of
//! steps that each kind of device implements. Each step has a backward pass of its own in O(N * K * D), and gradients
//! of keys are summed over an inverse index (key to queries) in a fixed order.

mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
mod options;
mod rounds;
mod sizes;
mod validate;

use candle_core::Tensor;

use self::cpu::CpuSteps;
pub(crate) use self::options::Rule;
pub use self::options::Select;
pub use self::rounds::above_runner_up;
pub(crate) use self::sizes::Sizes;
#[cfg(feature = "gpu")]
pub(crate) use self::validate::sizes as check_sizes;
use crate::backend::dispatch::on_gpu;
use crate::backend::graph::with_contiguous_rows;
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;
use crate::ops::scan::{Candidates, overflow};

/// The result of [`select()`]. Index, energy, margin, gate and coherence point are those of the first round; energies
/// are those after the barrier.
#[derive(Debug, Clone)]
pub struct Selected {
    /// Output `[B, Hq, N, Dv]`, dtype of q, differentiable.
    pub y: Tensor,
    /// Selected key `[B, Hq, N]`, i32; -1 where the head abstained.
    pub index: Tensor,
    /// Energy of the selected key `[B, Hq, N]`, +inf where the head abstained; f32 (f64 for f64 tensors), as the next
    /// three. An energy that exceeds the range of the dtype is its greatest number ([`Selected::overflowed`]).
    pub energy: Tensor,
    /// Energy of the runner-up that the threshold admits minus that of the winner; +inf without one.
    pub margin: Tensor,
    /// The consistency gate by which the value row was multiplied; 1 without one, 0 where the head abstained.
    pub gate: Tensor,
    /// Coherence point u* on the passage from query to key; 0 (the query) where the head abstained.
    /// Present when alpha is given.
    pub coherence: Option<Tensor>,
    /// The energies that the selection compared, for every candidate `[B, Hq, N, K]`: those of the scan, or those after
    /// the barrier. [`scan_select`](crate::scan_select) has that of the winner alone, K = 1.
    pub compared: Tensor,
    /// The selections of the further rounds of refinement.
    pub later: Vec<Round>,
    /// The picks after the winner, whose weight is `gate`.
    pub picks: Vec<Pick>,
}

impl Selected {
    /// The number of selected keys whose energy exceeds the range of its dtype. On a GPU this waits for the device.
    ///
    /// # Errors
    /// An earlier launch that failed, or a failed copy to the host.
    pub fn overflowed(&self) -> Result<usize> {
        overflow::count(&self.energy)
    }
}

/// The most rows that a query reads.
pub const MAX_PICKS: usize = 4;

/// A row that a query reads besides that of the winner.
#[derive(Debug, Clone)]
pub struct Pick {
    /// Its key `[B, Hq, N]`, i32; -1 where the query has no further candidate.
    pub index: Tensor,
    /// Its weight `[B, Hq, N]`, without gradient; 0 where it is excluded and not read.
    pub weight: Tensor,
}

/// A further round of refinement.
#[derive(Debug, Clone)]
pub struct Round {
    /// The selected key `[B, Hq, N]`, i32; -1 where the head abstained in this round or an earlier one.
    pub index: Tensor,
    /// Its contribution to the output `[B, Hq, N, Dv]`, in the accumulator type and without gradient.
    pub y: Tensor,
}

/// Selects one value row for every query and head among its candidates, or abstains (y = 0).
///
/// `y = gate * v[j]` for the candidate j of least energy, if its energy is at most the threshold; energies are
/// `beta |q - k|^2 - prior` or, with [`Score::Dot`](crate::Score::Dot), `-beta <q, k> - prior`. The gradient of the
/// choice is that of the [`Estimator`](crate::Estimator).
///
/// * `q`: `[B, Hq, N, D]`; `k`: `[B, Hk, M, D]`; `v`: `[B, Hk, M, Dv]`, of one dtype and device: f64, f32, f16 or bf16
///   on the CPU; f32, f16 or bf16 on a GPU. On the CPU, without gradients, k and v may be in f16 or bf16 where q is in f32.
///   Hq is a multiple of Hk; query head h reads key-value head `h / (Hq / Hk)`.
/// * `candidates`: from a [`scan`](crate::scan) of the same q and k. On a GPU at most 64 a query.
///
/// Differentiable in q, k, v and in the tensors of `select`: prior, beta, alpha, threshold and rounds. Forward and
/// backward pass cost O(N * K * D). On a GPU the values of candidates, beta, threshold and alpha are not checked, since
/// that would wait for the device.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) names the shapes or values that do not fit;
/// [`Error::Unsupported`](crate::Error::Unsupported) what the device has no kernels for.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::{Mask, Scan, Select, scan, select};
///
/// # fn main() -> gd_kernels::Result<()> {
/// let device = Device::Cpu;
/// // One head, two queries, three keys.
/// let q = Tensor::new(&[[[[0f32, 1.0], [2.0, 0.0]]]], &device)?;
/// let k = Tensor::new(&[[[[0f32, 0.9], [2.1, 0.0], [5.0, 5.0]]]], &device)?;
/// let v = Tensor::new(&[[[[10f32], [20.0], [30.0]]]], &device)?;
/// let (beta, mask) = (Tensor::new(&[1f32], &device)?, Mask::none());
/// let candidates = scan(&q, &k, &Scan::new(&beta, &mask, 2))?;
/// let selected = select(&q, &k, &v, &candidates, &Select::new(&beta))?;
/// assert_eq!(selected.index.flatten_all()?.to_vec1::<i32>()?, [0, 1]);
/// assert_eq!(selected.y.flatten_all()?.to_vec1::<f32>()?, [10.0, 20.0]);
/// # Ok(())
/// # }
/// ```
pub fn select(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    candidates: &Candidates,
    select: &Select,
) -> Result<Selected> {
    let _span = operator_span("select", Pass::Forward);
    let sizes = validate::validate(q, k, v, candidates, select)?;
    let (q, k, v) = (with_contiguous_rows(q)?, with_contiguous_rows(k)?, with_contiguous_rows(v)?);
    let rule = Rule::of(select);
    let prior = select.prior.map(Tensor::dims3).transpose()?;
    on_gpu!(q.device(), G => {
        let prior = prior.map(|(batch, heads, _)| [batch, heads]);
        let steps = gpu::steps::GpuSteps::<G>::new(q.device(), sizes, rule, prior)?;
        rounds::run(&steps, &sizes, [&q, &k, &v], candidates, select)
    });
    validate::check_values(&sizes, candidates, select)?;
    let prior = prior.map(|(batch, heads, keys)| [batch, heads, keys]);
    rounds::run(&CpuSteps { sizes, rule, prior }, &sizes, [&q, &k, &v], candidates, select)
}
