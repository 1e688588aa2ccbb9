//! The weights of monotonic attention from energies, by probabilities or by hard decisions.

use candle_core::{DType, Result, Tensor};
use candle_nn::ops::sigmoid;

use crate::mechanisms::indices::{arange, index_or_none};

/// The probabilities α `[B, N, M]` that row i stops at key j, from energies `[B, N, M]` and, in training, noise of that
/// shape that is added to them: with `p = σ(energies + noise)`,
/// `q_ij = (1 − p_{i,j−1}) q_{i,j−1} + α_{i−1,j}` and `α_ij = p_ij q_ij`; the row before the first stands at key 0.
///
/// `1 − Σ_j α_ij` is the probability that the row selects no key. A row that selects none stays behind the last key,
/// and so do all later rows. The recurrence has only sums and products of numbers in 0..1; it takes N + M − 1 steps, each over
/// one anti-diagonal, and O(N·M) memory.
///
/// # Errors
/// Shapes that do not fit.
pub fn monotonic_weights(energies: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
    let p = match noise {
        Some(noise) => sigmoid(&(energies + noise)?)?,
        None => sigmoid(energies)?,
    };
    let (b, n, m) = p.dims3()?;
    let p = skewed(&p)?;
    let passed = (1.0 - &p)?;
    let column = |t: &Tensor, d: usize| t.narrow(2, d, 1)?.squeeze(2);
    let first = Tensor::ones((b, 1), p.dtype(), p.device())?.pad_with_zeros(1, 0, n - 1)?;
    let mut reached = first;
    let mut alpha = (&reached * column(&p, 0)?)?;
    let mut columns = vec![alpha.clone()];
    for d in 1..n + m - 1 {
        // The same key in the row before lies on the anti-diagonal before.
        let entering = alpha.pad_with_zeros(1, 1, 0)?.narrow(1, 0, n)?;
        reached = ((column(&passed, d - 1)? * reached)? + entering)?;
        alpha = (&reached * column(&p, d)?)?;
        columns.push(alpha.clone());
    }
    unskewed(&Tensor::stack(&columns, 2)?, m)
}

/// `[B, N, M]` -> `[B, N, N + M − 1]` with row i shifted by i places: the column d holds the anti-diagonal i + j = d.
/// Other places are 0.
fn skewed(x: &Tensor) -> Result<Tensor> {
    let (b, n, m) = x.dims3()?;
    let rows = x.pad_with_zeros(2, 0, n)?.reshape((b, n * (m + n)))?;
    rows.narrow(1, 0, n * (m + n - 1))?.reshape((b, n, m + n - 1))
}

/// The inverse of [`skewed`].
fn unskewed(x: &Tensor, m: usize) -> Result<Tensor> {
    let (b, n, width) = x.dims3()?;
    let rows = x.reshape((b, n * width))?.pad_with_zeros(1, 0, n)?;
    rows.reshape((b, n, width + 1))?.narrow(2, 0, m)
}

/// Hard decoding of energies `[B, N, M]`: row i selects the first key `j ≥ t_{i−1}` with a positive energy, from key 0 in
/// the first row. Returns i64 `[B, N]`, −1 where no key was selected; all rows after such a row are −1 too.
///
/// # Errors
/// Energies of another rank.
pub fn monotonic_hard(energies: &Tensor) -> Result<Tensor> {
    let (b, n, m) = energies.dims3()?;
    let device = energies.device();
    let positive = energies.gt(0f64)?;
    let key = arange(m, device)?.broadcast_as((b, m))?.contiguous()?;
    let none = Tensor::full(m as u32, (b, m), device)?;
    let mut start = Tensor::zeros((b, 1), DType::U32, device)?;
    let mut rows = Vec::with_capacity(n);
    for i in 0..n {
        // After a row without a key, start is m, which no key reaches.
        let admitted = (key.broadcast_ge(&start)? * positive.narrow(1, i, 1)?.squeeze(1)?)?;
        start = admitted.where_cond(&key, &none)?.min_keepdim(1)?;
        rows.push(start.clone());
    }
    let t = Tensor::cat(&rows, 1)?;
    index_or_none(&t, &t.lt(m as u32)?)
}
