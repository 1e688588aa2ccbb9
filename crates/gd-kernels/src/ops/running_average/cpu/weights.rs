//! The scalar half of the running average: the factor of the previous mean and the share of the new value, for every
//! step. One sequential pass over N per sequence, sequences in parallel.
//!
//! decay, write `[B * H]` rows of N; weights `[B * H, N]`.

use num_traits::Float;

use crate::backend::cpu::element::Element;
use crate::backend::cpu::parallel::for_chunks2;
use crate::backend::cpu::view::Rows;
use crate::ops::running_average::Sizes;

/// `mean = keep * mean + take * value`. Both are computed with their own relative precision, so
/// that a share near 0 is not the rounding error of one near 1.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weight<R> {
    pub(super) keep: R,
    pub(super) take: R,
}

fn log_sigmoid<R: Float>(x: R) -> R {
    x.min(R::zero()) - (-x.abs()).exp().ln_1p()
}

fn sigmoid<R: Float>(x: R) -> R {
    (R::one() + (-x).exp()).recip()
}

/// The weight of a step with these logits after `log d` = `log`, and the `log d` after it.
fn step<R: Float>(decay: R, write: R, log: R) -> (Weight<R>, R) {
    let past = log_sigmoid(decay) + log;
    if past == R::neg_infinity() && write == R::neg_infinity() {
        return (Weight { keep: R::one(), take: R::zero() }, past);
    }
    let difference = write - past;
    let e = (-difference.abs()).exp();
    let (larger, smaller) = ((R::one() + e).recip(), e / (R::one() + e));
    let (keep, take) = if difference >= R::zero() { (smaller, larger) } else { (larger, smaller) };
    (Weight { keep, take }, past.max(write) + e.ln_1p())
}

/// The weights of every step and the final `log d` of every sequence.
pub(super) fn forward<T: Element>(
    sizes: Sizes,
    decay: &Rows<T>,
    write: &Rows<T>,
    start: Option<&[T::Acc]>,
) -> (Vec<Weight<T::Acc>>, Vec<T::Acc>) {
    let zero = T::Acc::default();
    let mut weights = vec![Weight { keep: zero, take: zero }; sizes.sequences() * sizes.rows];
    let mut logs = vec![zero; sizes.sequences()];
    for_chunks2((&mut weights, sizes.rows), (&mut logs, 1), |s, weights, last| {
        let mut log = start.map_or(T::Acc::neg_infinity(), |start| start[s]);
        for ((weight, &decay), &write) in weights.iter_mut().zip(decay.row(s)).zip(write.row(s)) {
            (*weight, log) = step(decay.up(), write.up(), log);
        }
        last[0] = log;
    });
    (weights, logs)
}

/// Gradients of decay and write, given `dtake[s, t]`, the gradient of the share taken at step t with
/// `keep = 1 - take`.
///
/// With `z = write - past`, `take = sigmoid(z)`: `dz = dtake take keep`. `log d` has the gradient
/// `q`, and `past = log a + log d_(t-1)`: `dwrite = dz + take q`, `dpast = keep q - dz`, which is
/// both the next q and, times `sigmoid(-decay)`, ddecay.
pub(super) fn backward<T: Element>(
    sizes: Sizes,
    decay: &Rows<T>,
    weights: &[Weight<T::Acc>],
    dtake: &[T::Acc],
) -> (Vec<T>, Vec<T>) {
    let n = sizes.rows;
    let mut ddecay = vec![T::zero(); sizes.sequences() * n];
    let mut dwrite = ddecay.clone();
    for_chunks2((&mut ddecay, n), (&mut dwrite, n), |s, ddecay, dwrite| {
        let (decay, at) = (decay.row(s), s * n);
        let mut q = T::Acc::default();
        for t in (0..n).rev() {
            let Weight { keep, take } = weights[at + t];
            let dz = dtake[at + t] * take * keep;
            dwrite[t] = T::down(dz + take * q);
            q = keep * q - dz;
            ddecay[t] = T::down(q * sigmoid(-decay[t].up()));
        }
    });
    (ddecay, dwrite)
}
