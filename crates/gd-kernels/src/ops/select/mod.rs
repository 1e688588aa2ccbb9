//! `select`: from candidates to one value row per query and head, or to nothing.
//!
//! candidate energies -> barrier -> threshold, winner, gate -> (residual query -> again): each step
//! is one operator with a backward of its own, O(N * K * D), and key gradients are summed over an
//! inverse index (key -> queries) in a fixed order.

mod barrier;
mod choice;
mod coherence;
pub(crate) mod cpu;
mod energy;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
mod residual;

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::backend::check::{check_head, dims4, head_values, positive};
use crate::backend::cpu::element::{Element, acc_dtype};
use crate::backend::cpu::view::with_view;
use crate::backend::dispatch::on_gpu;
use crate::backend::graph::with_contiguous_rows as rows;
use crate::backend::support::require_device;
use crate::by_float;
use crate::error::{Error, Result};
use crate::ops::scan::Candidates;
use crate::ops::scan::problem::Problem;
use crate::ops::select::cpu::choose::Rule;
use crate::ops::select::cpu::rows::Dims;
use crate::options::{Barrier, CoherenceMode, Estimator, Gate, Precision, Score, TieBreak};

/// How to select. `Select::new` gives the defaults; set the other fields as needed.
#[derive(Debug, Clone)]
pub struct Select<'a> {
    /// Inverse bandwidth per query head `[Hq]`, > 0.
    pub beta: &'a Tensor,
    /// The key prior of the scan.
    pub prior: Option<&'a Tensor>,
    /// The score of the scan.
    pub score: Score,
    /// Which of equals wins.
    pub tie: TieBreak,
    /// Threshold per query head `[Hq]`: candidates with more energy are excluded.
    pub threshold: Option<&'a Tensor>,
    /// Weight of the query's well per head `[Hq]`, in (0, 1); when given, coherence is resolved.
    pub alpha: Option<&'a Tensor>,
    /// What scales the selected row.
    pub gate: Gate,
    /// Gradient of the choice.
    pub estimator: Estimator,
    /// Temperature T of the estimator's softmax.
    pub temperature: f64,
    /// Preserve floor f in [0, 1].
    pub preserve_floor: f64,
    /// Value floor lambda in [0, 1].
    pub value_floor: f64,
    /// Share h in [0, 1] of the hard forward pass: `y = (1 - h) blend + h hard`.
    pub hardness: f64,
    /// Conditional protection of the protected candidates.
    pub barrier: Option<Barrier>,
    /// Weights of the refinement rounds `[Hq, R]`; without them one round of weight 1.
    pub rounds: Option<&'a Tensor>,
    /// Which well stands for a pair with two.
    pub coherence: CoherenceMode,
}

impl<'a> Select<'a> {
    /// Hard selection with the candidate gradient at temperature 1, no threshold, gate or floors.
    pub fn new(beta: &'a Tensor) -> Self {
        Self {
            beta,
            prior: None,
            score: Score::default(),
            tie: TieBreak::default(),
            threshold: None,
            alpha: None,
            gate: Gate::default(),
            estimator: Estimator::default(),
            temperature: 1.0,
            preserve_floor: 0.0,
            value_floor: 0.0,
            hardness: 1.0,
            barrier: None,
            rounds: None,
            coherence: CoherenceMode::default(),
        }
    }
}

/// What was selected. The record is that of the first round; energies are those compared, that is
/// after the barrier.
#[derive(Debug, Clone)]
pub struct Selected {
    /// Output `[B, Hq, N, Dv]`, dtype of v, differentiable.
    pub y: Tensor,
    /// Selected key `[B, Hq, N]`, i32; -1 where the head abstained.
    pub index: Tensor,
    /// Its energy, +inf where the head abstained; f32 (f64 for f64 tensors), as the next three.
    pub energy: Tensor,
    /// Energy of the runner-up that the threshold admits less that of the winner; +inf without one.
    pub margin: Tensor,
    /// What scaled the row: the consistency gate, 1 without one, 0 where the head abstained.
    pub gate: Tensor,
    /// Coherence point u* on the passage from query to key; 0 (the query) where the head abstained.
    /// Present when alpha is given.
    pub coherence: Option<Tensor>,
    /// The energies compared, of every candidate `[B, Hq, N, K]`: those of the scan, or the barrier's. Of
    /// [`scan_select`](crate::scan_select) the winner's alone.
    pub compared: Tensor,
    /// What each further round of refinement read.
    pub later: Vec<Round>,
}

/// A further round of refinement.
#[derive(Debug, Clone)]
pub struct Round {
    /// The key it read `[B, Hq, N]`, i32; -1 where the head abstained, in this round or before.
    pub index: Tensor,
    /// What it added to the output `[B, Hq, N, Dv]`, in the accumulator type and without gradient.
    pub y: Tensor,
}

/// Selects one value row for every query and head among its candidates, or abstains (y = 0).
///
/// q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; candidates from [`scan`](crate::scan) of the same q
/// and k. Differentiable in q, k, v, prior, beta, alpha, threshold and rounds.
///
/// On a GPU the values of candidates, beta, threshold and alpha are not looked at, since that would wait for it.
///
/// # Errors
/// Names the shapes or values that do not fit.
pub fn select(q: &Tensor, k: &Tensor, v: &Tensor, candidates: &Candidates, s: &Select) -> Result<Selected> {
    let dims = validate(q, k, v, candidates, s)?;
    let (q, k, v) = (rows(q)?, rows(k)?, rows(v)?);
    on_gpu!(q.device(), G => crate::ops::select::gpu::tensors::select::<G>(dims, [&q, &k, &v], candidates, s));
    check_values(&dims, candidates, s)?;
    let acc = acc_dtype(q.dtype());
    let vector = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(acc)?.contiguous()?) };
    let beta = vector(s.beta)?;
    let tau = match s.threshold {
        Some(t) => vector(t)?,
        None => Tensor::full(f64::INFINITY, dims.hq, q.device())?.to_dtype(acc)?,
    };
    let count = s.rounds.map_or(1, |r| r.dims()[1]);
    // Where no gradient is wanted, the first round's energies are those of the scan: decoding then spares itself
    // copies of the whole prior.
    let wanted = [Some(&q), Some(&k), Some(&beta), s.prior].into_iter().flatten().any(Tensor::track_op);
    let aux = match s.prior.filter(|_| wanted || count > 1) {
        Some(p) => Tensor::cat(&[&beta, &vector(&p.flatten_all()?)?], 0)?,
        None => beta.clone(),
    };
    let prior = s.prior.map(|p| p.dims3()).transpose()?.map(|(b, h, m)| [b, h, m]);
    let mut index = Arc::new(candidates.index.flatten_all()?.to_vec1::<i32>()?);
    let mut query = q.clone();
    let (mut y, mut first, mut later) = (None::<Tensor>, None::<(Step, Tensor)>, Vec::new());
    let shape = (dims.b, dims.hq, dims.n);
    for round in 0..count {
        let known = (round == 0).then(|| candidates.energy.clone());
        let mut energy = match known {
            Some(known) if !wanted => vector(&known.detach())?,
            known => {
                let op = energy::Energy { dims, score: s.score, index: index.clone(), prior, known };
                query.apply_op3(&k, &aux, op)?
            }
        };
        if let (Some(barrier), Some(flags)) = (s.barrier, &candidates.protected) {
            let protected = Arc::new(flags.flatten_all()?.to_vec1::<u8>()?);
            let op = barrier::BarrierOp {
                barrier,
                tie: s.tie,
                slots: dims.slots,
                index: index.clone(),
                protected,
            };
            energy = energy.apply_op1(op)?;
        }
        let step = step(&query, &k, &v, &energy, &tau, &beta, index.clone(), dims, s)?;
        // Weighted and added in the accumulator type: the weights' gradient is a sum over all rows.
        let out = match s.rounds {
            Some(w) => {
                let w = w.narrow(1, round, 1)?.reshape((1, dims.hq, 1, 1))?.to_dtype(acc)?;
                step.y.to_dtype(acc)?.broadcast_mul(&w)?
            }
            None => step.y.clone(),
        };
        if round > 0 {
            let index = Tensor::from_slice(&step.index, shape, q.device())?;
            later.push(Round { index, y: out.detach() });
        }
        y = Some(match y {
            Some(sum) => (sum + out)?,
            None => out,
        });
        if round + 1 < count {
            let mut rest = index.to_vec();
            for (slots, winner) in rest.chunks_mut(dims.slots).zip(&step.slot) {
                match winner {
                    Some(slot) => slots[*slot] = -1,
                    // What abstained once has nothing left to refine.
                    None => slots.fill(-1),
                }
            }
            index = Arc::new(rest);
            let winners = Arc::new(step.index.clone());
            query = query
                .apply_op2(&k, residual::Residual { dims: Dims { slots: 1, ..dims }, index: winners })?;
        }
        first.get_or_insert((step, energy.detach()));
    }
    let (Some(y), Some((first, compared))) = (y, first) else { unreachable!("at least one round") };
    let y = y.to_dtype(v.dtype())?;
    let index = Tensor::from_vec(first.index, shape, q.device())?;
    Ok(Selected {
        y,
        index,
        energy: first.energy,
        margin: first.margin,
        gate: first.gate,
        coherence: first.coherence,
        compared,
        later,
    })
}

/// One round: its output and record.
struct Step {
    y: Tensor,
    slot: Vec<Option<usize>>,
    index: Vec<i32>,
    energy: Tensor,
    margin: Tensor,
    gate: Tensor,
    coherence: Option<Tensor>,
}

#[allow(clippy::too_many_arguments)]
fn step(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    energy: &Tensor,
    tau: &Tensor,
    beta: &Tensor,
    index: Arc<Vec<i32>>,
    dims: Dims,
    s: &Select,
) -> Result<Step> {
    let rule =
        |h: f64| Rule::new(s.tie, s.estimator, s.gate, [s.temperature, s.preserve_floor, s.value_floor, h]);
    let pick = |h: f64| choice::Choose { dims, rule: rule(h), index: index.clone() };
    let shape = (dims.b, dims.hq, dims.n);
    by_float!("select", q.dtype(), T => {
        type A = <T as Element>::Acc;
        let (e, t) = (energy.flatten_all()?.to_vec1::<A>()?, tau.to_vec1::<A>()?);
        let r = pick(s.hardness).record(&e, &t);
        let column = |x: Vec<A>| Tensor::from_vec(x, shape, q.device());
        let (mut gate, mut coherence) = (column(r.gate)?, None);
        let density = |keys: &[i32]| coherence::Density {
            dims: Dims { slots: 1, ..dims },
            mode: s.coherence,
            index: Arc::new(keys.to_vec()),
        };
        let aux = s.alpha.map(|a| Tensor::cat(&[beta, &a.to_dtype(beta.dtype())?], 0)).transpose()?;
        if let Some(aux) = &aux {
            let values = aux.to_vec1::<A>()?;
            let points = with_view::<T, _>(q, |q| with_view::<T, _>(k, |k| Ok(density(&r.index).points(q, k, &values))))?;
            coherence = Some(column(points)?);
        }
        let y = match (s.gate, &aux) {
            (Gate::Coherence, Some(aux)) => {
                // Of the nearest key even where it is not admitted: like the energy gate, it scales
                // the estimator's gradient there, so that a row can learn its way back.
                let rho = q.apply_op3(k, aux, density(&r.nearest))?;
                let mut open = rho.flatten_all()?.to_vec1::<A>()?;
                open.iter_mut().zip(&r.slot).filter(|(_, s)| s.is_none()).for_each(|(x, _)| *x = 0.0);
                gate = column(open)?;
                let hard = s.hardness;
                let soft_only = s.estimator == Estimator::Blend || hard == 0.0;
                let scaled = |h: f64| -> Result<Tensor> {
                    let y = energy.apply_op3(v, tau, pick(h))?;
                    Ok(y.broadcast_mul(&rho.unsqueeze(3)?.to_dtype(v.dtype())?)?)
                };
                // The gate scales the selected row alone, not the soft mixture.
                match (soft_only, hard == 1.0) {
                    (true, _) => energy.apply_op3(v, tau, pick(0.0))?,
                    (false, true) => scaled(1.0)?,
                    (false, false) => {
                        ((energy.apply_op3(v, tau, pick(0.0))? * (1.0 - hard))? + (scaled(1.0)? * hard)?)?
                    }
                }
            }
            _ => energy.apply_op3(v, tau, pick(s.hardness))?,
        };
        Ok(Step { y, slot: r.slot, index: r.index, energy: column(r.energy)?, margin: column(r.margin)?, gate, coherence })
    })
}

/// The sizes of q, k and v, without candidates.
pub(crate) fn check_sizes(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Dims, usize)> {
    let (b, hq, n, d) = dims4("q", q)?;
    let (kb, hk, m, kd) = dims4("k", k)?;
    let (vb, vh, vm, _) = dims4("v", v)?;
    require_device("select", q.device())?;
    if kb != b || kd != d || hq % hk != 0 {
        return Err(Error::Invalid(format!("q {:?} and k {:?} do not fit", q.dims(), k.dims())));
    }
    if (vb, vh, vm) != (b, hk, m) {
        return Err(Error::Invalid(format!(
            "k {:?} and v {:?} differ in batch, heads or keys",
            k.dims(),
            v.dims()
        )));
    }
    if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        return Err(Error::Invalid(format!("q, k, v are {:?}, {:?}, {:?}", q.dtype(), k.dtype(), v.dtype())));
    }
    if !(q.device().same_device(k.device()) && q.device().same_device(v.device())) {
        return Err(Error::Invalid("q, k and v are on different devices".into()));
    }
    Ok((Dims { b, hq, hk, n, m, slots: 0 }, d))
}

fn validate(q: &Tensor, k: &Tensor, v: &Tensor, candidates: &Candidates, s: &Select) -> Result<Dims> {
    let (Dims { b, hq, hk, n, m, .. }, d) = check_sizes(q, k, v)?;
    let (cb, ch, cn, slots) = candidates.index.dims4()?;
    if (cb, ch, cn) != (b, hq, n) || candidates.energy.dims() != candidates.index.dims() {
        return Err(Error::Invalid(format!(
            "candidates {:?} do not belong to q {:?}",
            candidates.index.dims(),
            q.dims()
        )));
    }
    if candidates.energy.dtype() != acc_dtype(q.dtype()) || candidates.index.dtype() != DType::I32 {
        return Err(Error::Invalid(format!(
            "candidates hold {:?} and {:?}, not i32 and {:?}",
            candidates.index.dtype(),
            candidates.energy.dtype(),
            acc_dtype(q.dtype())
        )));
    }
    if let Some(flags) = &candidates.protected
        && (flags.dims() != candidates.index.dims() || flags.dtype() != DType::U8)
    {
        return Err(Error::Invalid(format!(
            "protected {:?} of {:?} is not one u8 for each of the candidates {:?}",
            flags.dims(),
            flags.dtype(),
            candidates.index.dims()
        )));
    }
    if s.estimator == Estimator::Dense && slots < m {
        return Err(Error::Invalid(format!(
            "the dense estimator needs all {m} keys as candidates, not {slots}"
        )));
    }
    let unit = |name: &str, x: f64| match (0.0..=1.0).contains(&x) {
        true => Ok(()),
        false => Err(Error::Invalid(format!("{name} {x} is outside 0..=1"))),
    };
    unit("preserve floor", s.preserve_floor)?;
    unit("value floor", s.value_floor)?;
    unit("hardness", s.hardness)?;
    let above_zero = |name: &str, x: f64| match x.is_finite() && x > 0.0 {
        true => Ok(()),
        false => Err(Error::Invalid(format!("{name} {x} is not finite and > 0"))),
    };
    above_zero("temperature", s.temperature)?;
    if let Gate::Energy { temperature } = s.gate {
        above_zero("gate temperature", temperature)?;
        if s.threshold.is_none() {
            return Err(Error::Invalid("the energy gate needs a threshold".into()));
        }
    }
    if s.gate == Gate::Coherence && s.alpha.is_none() {
        return Err(Error::Invalid("the coherence gate needs alpha".into()));
    }
    for (name, t) in [("beta", Some(s.beta)), ("threshold", s.threshold), ("alpha", s.alpha)] {
        t.map_or(Ok(()), |t| check_head(name, t, hq))?;
    }
    if let Some(r) = s.rounds
        && (r.rank() != 2 || r.dims()[0] != hq || r.dims()[1] == 0)
    {
        return Err(Error::Invalid(format!("rounds {:?} is not [{hq}, rounds >= 1]", r.dims())));
    }
    if let Some(b) = s.barrier
        && !(b.floor > 0.0 && b.floor < 1.0 && b.strength >= 0.0)
    {
        return Err(Error::Invalid(format!(
            "barrier floor {} or strength {} is out of range",
            b.floor, b.strength
        )));
    }
    if let Some(prior) = s.prior {
        let problem = Problem {
            batch: b,
            q_heads: hq,
            kv_heads: hk,
            queries: n,
            keys: m,
            head_dim: d,
            candidates: slots,
            dtype: q.dtype(),
            score: s.score,
            tie: s.tie,
            precision: Precision::Native,
        };
        problem.prior_dims(prior)?;
    }
    Ok(Dims { b, hq, hk, n, m, slots })
}

/// The values that `validate` leaves out: looking at them would wait for a device.
fn check_values(dims: &Dims, candidates: &Candidates, s: &Select) -> Result<()> {
    let index = candidates.index.flatten_all()?.to_vec1::<i32>()?;
    if let Some(j) = index.iter().find(|&&j| j >= dims.m as i32) {
        return Err(Error::Invalid(format!("candidate key {j} is beyond the {} keys", dims.m)));
    }
    positive("beta", &head_values::<f64>("beta", s.beta, dims.hq)?)?;
    if let Some(tau) = s.threshold {
        let tau = head_values::<f64>("threshold", tau, dims.hq)?;
        if let Some(h) = tau.iter().position(|x| x.is_nan()) {
            return Err(Error::Invalid(format!("threshold of head {h} is NaN")));
        }
    }
    if let Some(alpha) = s.alpha {
        let alpha = head_values::<f64>("alpha", alpha, dims.hq)?;
        if let Some(h) = alpha.iter().position(|x| !(*x > 0.0 && *x < 1.0)) {
            return Err(Error::Invalid(format!("alpha of head {h} is {}, outside (0, 1)", alpha[h])));
        }
    }
    Ok(())
}
