//! The coherence point, and the mixture density at it as a gate.

use std::sync::Arc;

use super::Keys;
use super::loops::{for_rows, head_sums, key_gradient};
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::view::View;
use crate::options::CoherenceMode;

/// Maximum number of Newton steps. In this many steps bisection alone reaches f64 precision.
const MAX_NEWTON_STEPS: usize = 60;

/// The coherence point u* in [0, 1] on the passage from query to key, for `t = beta |q - k|^2` and
/// the mixture weight `alpha` of the query's well: `u = sigmoid(l + t (2u - 1))`.
fn coherence_point(t: f64, alpha: f64, mode: CoherenceMode) -> f64 {
    let l = ((1.0 - alpha) / alpha).ln();
    match mode {
        CoherenceMode::Global => 0.5 * (1.0 + global_root(t, l)),
        CoherenceMode::Passage => {
            let (mut lo, mut hi) = (0.0f64, 1.0f64);
            for _ in 0..MAX_NEWTON_STEPS {
                let u = 0.5 * (lo + hi);
                let f = u - 1.0 / (1.0 + (-(l + t * (2.0 * u - 1.0))).exp());
                if f == 0.0 {
                    return u;
                }
                if f < 0.0 { lo = u } else { hi = u }
            }
            0.5 * (lo + hi)
        }
    }
}

/// `m = tanh((l + t m) / 2)` in the heavier well; the tie at l = 0 goes to the query (m < 0).
fn global_root(t: f64, l: f64) -> f64 {
    if l == 0.0 && t <= 2.0 {
        return 0.0;
    }
    // In the heavier well's half the root is unique, and f = m - tanh is convex towards m = +-1.
    let side = if l > 0.0 { 1.0 } else { -1.0 };
    let l = l.abs();
    let (mut lo, mut hi) = (0.0f64, 1.0f64);
    let mut m = 1.0f64;
    for _ in 0..MAX_NEWTON_STEPS {
        let th = (0.5 * (l + t * m)).tanh();
        let f = m - th;
        if f > 0.0 {
            hi = m
        } else {
            lo = m
        }
        let slope = 1.0 - 0.5 * t * (1.0 - th * th);
        let newton = m - f / slope;
        let next = if newton > lo && newton < hi { newton } else { 0.5 * (lo + hi) };
        if (next - m).abs() <= f64::EPSILON * m {
            return side * next;
        }
        m = next;
    }
    side * m
}

/// `exp(-E*)`, and its derivatives with respect to t and alpha.
fn density(t: f64, alpha: f64, mode: CoherenceMode) -> (f64, f64, f64) {
    let u = coherence_point(t, alpha, mode);
    let (query, key) = ((-t * u * u).exp(), (-t * (1.0 - u) * (1.0 - u)).exp());
    let rho = alpha * query + (1.0 - alpha) * key;
    // Both partial derivatives hold u fixed: the density is stationary in u (envelope theorem).
    (rho, -(alpha * u * u * query + (1.0 - alpha) * (1.0 - u) * (1.0 - u) * key), query - key)
}

/// `(q, k, [beta, alpha]) -> rho [B, Hq, N]` for one key of every query; 0 for a query without a key.
pub(super) struct Density {
    pub(super) mode: CoherenceMode,
    /// One key for every query.
    pub(super) keys: Arc<Keys>,
}

/// `|q - k|^2` in f64.
fn squared_distance<T: Element, S: Element>(q: &[T], k: &[S]) -> f64 {
    q.iter().zip(k).map(|(q, k)| (q.up().wide() - k.up().wide()).powi(2)).sum()
}

impl Density {
    /// The density of every row.
    pub(super) fn forward<T: Element, S: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, S>,
        aux: &[T::Acc],
    ) -> Vec<T::Acc> {
        self.map(q, k, aux, |t, alpha| density(t, alpha, self.mode).0)
    }

    /// The coherence point u* of every row; 0, the query itself, where there is no key.
    pub(super) fn points<T: Element, S: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, S>,
        aux: &[T::Acc],
    ) -> Vec<T::Acc> {
        self.map(q, k, aux, |t, alpha| coherence_point(t, alpha, self.mode))
    }

    fn map<T: Element, S: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, S>,
        aux: &[T::Acc],
        f: impl Fn(f64, f64) -> f64 + Sync,
    ) -> Vec<T::Acc> {
        let mut out = vec![T::Acc::of(0.0); self.keys.sizes.rows()];
        for_rows(
            &mut out,
            1,
            || (),
            |row, (), out| {
                let ([b, h, hk, i], j) = (self.keys.sizes.coordinates(row), self.keys.index[row]);
                if j >= 0 {
                    let t = aux[h].wide() * squared_distance(q.row(b, h, i), k.row(b, hk, j as usize));
                    out[0] = T::Acc::of(f(t, aux[self.keys.sizes.q_heads + h].wide()));
                }
            },
        );
        out
    }

    /// Gradients of q, k and `[beta, alpha]`.
    pub(super) fn backward<T: Element>(
        &self,
        q: View<'_, T>,
        k: View<'_, T>,
        aux: &[T::Acc],
        grad: &[T::Acc],
    ) -> (Vec<T>, Vec<T>, Vec<T::Acc>) {
        let (sizes, d) = (&self.keys.sizes, q.dims[3]);
        // Per row: the factor of (q - k) in dq, then the gradients of beta and alpha.
        let mut rows = vec![0f64; sizes.rows() * 3];
        for_rows(
            &mut rows,
            3,
            || (),
            |row, (), out| {
                let ([b, h, hk, i], j) = (sizes.coordinates(row), self.keys.index[row]);
                if j >= 0 {
                    let (beta, alpha) = (aux[h].wide(), aux[sizes.q_heads + h].wide());
                    let dist = squared_distance(q.row(b, h, i), k.row(b, hk, j as usize));
                    let (_, by_t, by_alpha) = density(beta * dist, alpha, self.mode);
                    let g = grad[row].wide();
                    out.copy_from_slice(&[g * by_t * 2.0 * beta, g * by_t * dist, g * by_alpha]);
                }
            },
        );
        let mut dq = vec![T::down(T::Acc::of(0.0)); sizes.rows() * d];
        for_rows(
            &mut dq,
            d,
            || (),
            |row, (), out| {
                let ([b, h, hk, i], j) = (sizes.coordinates(row), self.keys.index[row]);
                if j >= 0 {
                    let c = T::Acc::of(rows[row * 3]);
                    for ((o, q), k) in out.iter_mut().zip(q.row(b, h, i)).zip(k.row(b, hk, j as usize)) {
                        *o = T::down(c * (q.up() - k.up()));
                    }
                }
            },
        );
        let dk = key_gradient::<T>(&self.keys, d, |row, [b, hk, j], sum| {
            let [_, h, _, i] = sizes.coordinates(row);
            let c = T::Acc::of(rows[row * 3]);
            for ((s, q), k) in sum.iter_mut().zip(q.row(b, h, i)).zip(k.row(b, hk, j)) {
                *s += c * (k.up() - q.up());
            }
        });
        let column = |c: usize| rows.chunks(3).map(|r| T::Acc::of(r[c])).collect::<Vec<_>>();
        let mut daux = head_sums(sizes, &column(1));
        daux.extend(head_sums(sizes, &column(2)));
        (dq, dk, daux)
    }
}
