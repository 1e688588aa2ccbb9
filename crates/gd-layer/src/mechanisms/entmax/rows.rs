//! Alpha-entmax of rows of scores, with its gradients.

use candle_core::{D, DType, Result, Tensor};

use crate::mechanisms::rows::{count, fill, row_max, straight_through};

/// Steps of Newton's method, far more than rows of attention need.
const NEWTON_STEPS: usize = 32;

/// [`entmax`] with the same alpha for all rows.
pub(in crate::mechanisms) fn entmax_fixed(scores: &Tensor, set: &Tensor, alpha: f64) -> Result<Tensor> {
    let ones = Tensor::ones(vec![1; scores.rank()], scores.dtype(), scores.device())?;
    Ok(entmax(scores, set, &(ones * alpha)?)?.weights)
}

/// The result of [`entmax`].
#[derive(Debug, Clone)]
pub struct EntmaxRows {
    /// The weights, in the shape of the scores.
    pub weights: Tensor,
    /// The threshold tau of (alpha - 1) z `[.., N, 1]`, without gradient.
    pub threshold: Tensor,
}

/// Alpha-entmax over a set of keys in every row.
///
/// * `scores`: `[.., M]`.
/// * `set`: u8 in the same shape, 1 for the keys in the set.
/// * `alpha`: above 1, `[.., 1]` or of size 1 in the dimensions in which it is shared; of the same rank.
///
/// The weights of a row without keys are 0. Differentiable in scores and alpha: with s = p^(2 - alpha) where p > 0, the
/// Jacobian is diag(s) - s s^T / sum(s), and dp/dalpha = (p - p') / (alpha - 1)^2 - (p ln p - p' sum(p ln p)) /
/// (alpha - 1) with p' = s / sum(s).
///
/// # Errors
/// Shapes that do not fit.
pub fn entmax(scores: &Tensor, set: &Tensor, alpha: &Tensor) -> Result<EntmaxRows> {
    // The maximum is subtracted before the multiplication: the differences then are exact.
    let centred = scores.broadcast_sub(&row_max(scores, set)?)?;
    let power = (alpha.detach() - 1.0)?;
    let x = fill(&centred.detach().broadcast_mul(&power)?, set, f64::NEG_INFINITY)?;
    let tau = threshold(&x, set, &power)?;
    let p = root(&x, &tau, &power)?;
    let offset = row_max(scores, set)?.broadcast_mul(&power)?;
    let threshold = tau.broadcast_add(&offset)?;
    if !scores.track_op() && !alpha.track_op() {
        return Ok(EntmaxRows { weights: p, threshold });
    }
    let inside = p.gt(&p.zeros_like()?)?;
    let inside_only = |t: Tensor| inside.where_cond(&t, &t.zeros_like()?);
    let log_p = inside_only(p.log()?)?;
    let s = inside_only(log_p.broadcast_mul(&(1.0 - &power)?)?.exp()?)?;
    let ratio = divide_by_sum(&s)?;
    // The linear map with the Jacobian of the projection.
    let z = fill(&centred, set, 0.0)?;
    let mean = (&ratio * &z)?.sum_keepdim(D::Minus1)?;
    let carrier = (&s * z.broadcast_sub(&mean)?)?;
    let p_log_p = (&p * &log_p)?;
    let shift = ratio.broadcast_mul(&p_log_p.sum_keepdim(D::Minus1)?)?;
    let by_alpha =
        ((&p - &ratio)?.broadcast_div(&power.sqr()?)? - (p_log_p - shift)?.broadcast_div(&power)?)?;
    let carrier = (carrier + by_alpha.broadcast_mul(alpha)?)?;
    Ok(EntmaxRows { weights: straight_through(&p, &carrier)?, threshold })
}

/// relu(x - tau)^(1 / power).
fn root(x: &Tensor, tau: &Tensor, power: &Tensor) -> Result<Tensor> {
    let above = x.broadcast_sub(tau)?.relu()?;
    above.log()?.broadcast_div(power)?.exp()
}

/// The rows divided by their sums; rows of zeros stay.
fn divide_by_sum(t: &Tensor) -> Result<Tensor> {
    let total = t.sum_keepdim(D::Minus1)?;
    let empty = total.eq(&total.zeros_like()?)?.to_dtype(total.dtype())?;
    t.broadcast_div(&(total + empty)?)
}

/// The tau `[.., 1]` for which [`root`] sums to 1, in rows x whose maximum is 0. It lies between -1, where the greatest
/// term alone is 1, and -n^(-power), where n equal terms sum to 1.
///
/// Up to alpha 2 the sum is convex in tau, so that Newton's method converges from below, mostly in 5 to 10 steps. For a
/// greater alpha, or if rows have not converged, the interval is halved until floating point numbers do not divide it.
fn threshold(x: &Tensor, set: &Tensor, power: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones_like(&count(set, x.dtype())?)?;
    let (halvings, tolerance) = if x.dtype() == DType::F64 { (60, 1e-14) } else { (30, 4e-6) };
    let mut lower = ones.neg()?;
    if scalar(&power.max_all()?)? <= 1.0 {
        for _ in 0..NEWTON_STEPS {
            let step = newton_step(x, &lower, power)?;
            lower = (lower + &step)?;
            if scalar(&step.max_all()?)? <= tolerance {
                return Ok(lower);
            }
        }
    }
    let upper = count(set, x.dtype())?.maximum(&ones)?.log()?.broadcast_mul(power)?.neg()?.exp()?.neg()?;
    let mut width = (upper - &lower)?;
    for _ in 0..halvings {
        width = (width * 0.5)?;
        let middle = (&lower + &width)?;
        let sum = root(x, &middle, power)?.sum_keepdim(D::Minus1)?;
        lower = sum.ge(&ones)?.where_cond(&middle, &lower)?;
    }
    Ok(lower)
}

/// The step of Newton's method towards the tau for which [`root`] sums to 1.
fn newton_step(x: &Tensor, tau: &Tensor, power: &Tensor) -> Result<Tensor> {
    let p = root(x, tau, power)?;
    let zeros = p.zeros_like()?;
    let slope = p.gt(&zeros)?.where_cond(&(&p / x.broadcast_sub(tau)?)?, &zeros)?;
    let slope = slope.sum_keepdim(D::Minus1)?.broadcast_div(power)?;
    let empty = slope.eq(&slope.zeros_like()?)?.to_dtype(slope.dtype())?;
    (p.sum_keepdim(D::Minus1)? - 1.0)? / (slope + empty)?
}

/// A tensor of one element as a number.
fn scalar(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.to_scalar()
}
