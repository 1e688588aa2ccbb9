//! Checks of the arguments of `select`.

use candle_core::{DType, Tensor};

use super::{MAX_PICKS, Select, Sizes};
use crate::backend::check::{check_head, check_stored, dims4, head_values, positive, refuse_mixed_gradients};
use crate::backend::cpu::element::acc_dtype;
use crate::backend::support::require_device;
use crate::error::{Error, Result};
use crate::ops::scan::Candidates;
use crate::ops::scan::problem::Problem;
use crate::options::{Estimator, Gate, Precision};

/// The sizes of q, k and v, without candidates.
///
/// # Errors
/// Shapes, dtypes or devices that do not fit.
pub(crate) fn sizes(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Sizes> {
    let (b, hq, n, d) = dims4("q", q)?;
    let (kb, hk, m, kd) = dims4("k", k)?;
    let (vb, vh, vm, value_dim) = dims4("v", v)?;
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
    check_stored("select", q, "k", k)?;
    check_stored("select", q, "v", v)?;
    if !(q.device().same_device(k.device()) && q.device().same_device(v.device())) {
        return Err(Error::Invalid("q, k and v are on different devices".into()));
    }
    Ok(Sizes {
        batch: b,
        q_heads: hq,
        kv_heads: hk,
        queries: n,
        keys: m,
        head_dim: d,
        value_dim,
        slots: 0,
        dtype: q.dtype(),
    })
}

/// Checks shapes, dtypes, devices and options; returns the sizes.
pub(super) fn validate(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    candidates: &Candidates,
    s: &Select,
) -> Result<Sizes> {
    let sizes = sizes(q, k, v)?;
    refuse_mixed_gradients("select", [q, k, v], &[Some(s.beta), s.prior, s.threshold, s.alpha, s.rounds])?;
    let Sizes { batch: b, q_heads: hq, kv_heads: hk, queries: n, keys: m, head_dim: d, .. } = sizes;
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
    unit("gate floor", s.gradient.gate_floor)?;
    if !(0.0..1.0).contains(&s.exclude_below) {
        return Err(Error::Invalid(format!("exclude_below {} is outside [0, 1)", s.exclude_below)));
    }
    let spread = s.gradient.temperature_spread;
    if !(spread.is_finite() && spread >= 0.0) {
        return Err(Error::Invalid(format!("temperature spread {spread} is not finite and >= 0")));
    }
    let above_zero = |name: &str, x: f64| match x.is_finite() && x > 0.0 {
        true => Ok(()),
        false => Err(Error::Invalid(format!("{name} {x} is not finite and > 0"))),
    };
    above_zero("temperature", s.temperature)?;
    if let Some(temperature) = s.gate.temperature() {
        above_zero("gate temperature", temperature)?;
        let margin = matches!(s.gate, Gate::Margin { .. });
        if s.threshold.is_none() {
            let gate = if margin { "margin" } else { "energy" };
            return Err(Error::Invalid(format!("the {gate} gate needs a threshold")));
        }
        if margin && (s.rounds.is_some() || s.barrier.is_some()) {
            return Err(Error::Invalid("the margin gate excludes rounds and barrier".into()));
        }
    }
    if s.gate == Gate::Coherence && s.alpha.is_none() {
        return Err(Error::Invalid("the coherence gate needs alpha".into()));
    }
    for (name, t) in [("beta", Some(s.beta)), ("alpha", s.alpha)] {
        t.map_or(Ok(()), |t| check_head(name, t, hq))?;
    }
    if let Some(tau) = s.threshold.filter(|t| t.dims() != [hq] && t.dims() != [b, hq, n]) {
        return Err(Error::Invalid(format!(
            "threshold {:?} is neither [{hq}], one value per query head, nor [{b}, {hq}, {n}], one per query",
            tau.dims()
        )));
    }
    if let Some(r) = s.rounds
        && (r.rank() != 2 || r.dims()[0] != hq || r.dims()[1] == 0)
    {
        return Err(Error::Invalid(format!("rounds {:?} is not [{hq}, rounds >= 1]", r.dims())));
    }
    if !(1..=MAX_PICKS).contains(&s.picks) {
        return Err(Error::Invalid(format!("picks {} is outside 1..={MAX_PICKS}", s.picks)));
    }
    let ranked = matches!(s.estimator, Estimator::Candidates | Estimator::Winner);
    if s.picks > 1 && (s.rounds.is_some() || s.barrier.is_some() || s.gate == Gate::Coherence || !ranked) {
        return Err(Error::Invalid(format!(
            "{} picks exclude rounds, barrier, the coherence gate and the estimator {:?}",
            s.picks, s.estimator
        )));
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
            key_dtype: k.dtype(),
            score: s.score,
            tie: s.tie,
            precision: Precision::Native,
        };
        problem.prior_dims(prior)?;
    }
    Ok(Sizes { slots, ..sizes })
}

/// Checks values that [`validate`] does not, since reading them would wait for a GPU.
pub(super) fn check_values(sizes: &Sizes, candidates: &Candidates, s: &Select) -> Result<()> {
    let index = candidates.index.flatten_all()?.to_vec1::<i32>()?;
    if let Some(j) = index.iter().find(|&&j| j >= sizes.keys as i32) {
        return Err(Error::Invalid(format!("candidate key {j} is beyond the {} keys", sizes.keys)));
    }
    positive("beta", &head_values::<f64>("beta", s.beta, sizes.q_heads)?)?;
    if let Some(tau) = s.threshold {
        let values = tau.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        if let Some(at) = values.iter().position(|x| x.is_nan()) {
            let h = if tau.rank() == 1 { at } else { sizes.coordinates(at)[1] };
            return Err(Error::Invalid(format!("threshold of head {h} is NaN")));
        }
    }
    if let Some(alpha) = s.alpha {
        let alpha = head_values::<f64>("alpha", alpha, sizes.q_heads)?;
        if let Some(h) = alpha.iter().position(|x| !(*x > 0.0 && *x < 1.0)) {
            return Err(Error::Invalid(format!("alpha of head {h} is {}, outside (0, 1)", alpha[h])));
        }
    }
    Ok(())
}
