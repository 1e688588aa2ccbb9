//! The sequence of steps of a selection, which is the same on every device: energies, barrier, choice; then the same
//! for every further round of refinement, with the residual query and the remaining candidates.

use candle_core::Tensor;

use super::{Pick, Round, Select, Selected, Sizes};
use crate::backend::cpu::element::acc_dtype;
use crate::error::Result;
use crate::ops::scan::Candidates;
use crate::options::{Estimator, Gate};

/// The steps of a selection on one kind of device, each with its backward pass in candle's graph.
///
/// Parameters, energies and records are tensors of the accumulator type: f32, or f64 for f64.
pub(super) trait Steps {
    /// The keys that each query may select, and data that the steps derive from them.
    type Keys;

    /// The keys of candidates i32 `[B, Hq, N, K]`, -1 where unused.
    fn keys(&self, index: &Tensor) -> Result<Self::Keys>;

    /// One key for every query, i32 `[B, Hq, N]`, -1 for none.
    fn single_keys(&self, index: &Tensor) -> Result<Self::Keys>;

    /// The candidates without the selected ones. A query that abstained has none left.
    fn remaining_keys(&self, keys: &Self::Keys, record: &Record) -> Result<Self::Keys>;

    /// The energies `[B, Hq, N, K]` of candidates, differentiable in q, k and `aux`, which is beta `[Hq]` followed by
    /// the flat prior. `scanned` holds them if the scan of the same q and k has computed them.
    fn energy(&self, qk_aux: [&Tensor; 3], keys: &Self::Keys, scanned: Option<&Tensor>) -> Result<Tensor>;

    /// The energies after the barrier, given u8 flags `[B, Hq, N, K]` of the protected candidates.
    fn barrier(&self, energy: &Tensor, keys: &Self::Keys, protected: &Tensor) -> Result<Tensor>;

    /// The output `[B, Hq, N, Dv]` of the choice at these energies and thresholds `[Hq]` or `[B, Hq, N]`, with this share
    /// of the hard forward pass, and the record of the choice.
    fn choose(
        &self,
        energy_v_threshold: [&Tensor; 3],
        keys: &Self::Keys,
        hardness: f64,
    ) -> Result<(Tensor, Record)>;

    /// The coherence point u* of one key a query, `[B, Hq, N]`, without gradient; `aux` is beta and alpha `[2 Hq]`.
    fn coherence(&self, qk_aux: [&Tensor; 3], keys: &Self::Keys) -> Result<Tensor>;

    /// The mixture density at that point, differentiable in q, k and `aux`.
    fn density(&self, qk_aux: [&Tensor; 3], keys: &Self::Keys) -> Result<Tensor>;

    /// The queries `[B, Hq, N, D]` without their components along the jump to one key each.
    fn residual(&self, qk: [&Tensor; 2], keys: &Self::Keys) -> Result<Tensor>;
}

/// The choice of every row, `[B, Hq, N]` each, without gradient.
pub(super) struct Record {
    /// The winning slot, i32; -1 where the row abstains.
    pub(super) slot: Tensor,
    /// Its key, i32; -1 where the row abstains.
    pub(super) index: Tensor,
    /// The key of least energy, admitted or not, i32; -1 in a row without candidates.
    pub(super) nearest: Tensor,
    /// Its energy; +inf where the row abstains.
    pub(super) energy: Tensor,
    /// Energy of the runner-up that the threshold admits minus that of the winner; +inf without one.
    pub(super) margin: Tensor,
    /// The energy gate, 1 without one; 0 where the row abstains.
    pub(super) gate: Tensor,
}

/// One round: its output `[B, Hq, N, Dv]` and record.
struct Outcome {
    y: Tensor,
    record: Record,
    coherence: Option<Tensor>,
}

/// The selection of validated tensors; q, k and v have contiguous rows.
pub(super) fn run<S: Steps>(
    steps: &S,
    sizes: &Sizes,
    [q, k, v]: [&Tensor; 3],
    candidates: &Candidates,
    s: &Select,
) -> Result<Selected> {
    let acc = acc_dtype(q.dtype());
    let vector = |t: &Tensor| -> Result<Tensor> { Ok(t.to_dtype(acc)?.contiguous()?) };
    let beta = vector(s.beta)?;
    let mut threshold = match s.threshold {
        Some(t) => vector(t)?,
        None => Tensor::full(f32::INFINITY, sizes.q_heads, q.device())?.to_dtype(acc)?,
    };
    let rounds = s.rounds.map_or(1, |r| r.dims()[1]);
    // Without gradients, the energies of the first round are those of the scan: decoding then needs no copy of the
    // whole prior.
    let differentiate = [Some(q), Some(k), Some(&beta), s.prior].into_iter().flatten().any(Tensor::track_op);
    let aux = match s.prior.filter(|_| differentiate || rounds > 1) {
        Some(p) => Tensor::cat(&[&beta, &vector(&p.flatten_all()?)?], 0)?,
        None => beta.clone(),
    };
    let mut keys = steps.keys(&candidates.index)?;
    let mut query = q.clone();
    let (mut y, mut first, mut later) = (None::<Tensor>, None::<(Outcome, Tensor)>, Vec::new());
    for round in 0..rounds {
        let mut energy = match round == 0 {
            true if !differentiate => vector(&candidates.energy.detach())?,
            true => steps.energy([&query, k, &aux], &keys, Some(&candidates.energy))?,
            false => steps.energy([&query, k, &aux], &keys, None)?,
        };
        if let (Some(_), Some(protected)) = (s.barrier, &candidates.protected) {
            energy = steps.barrier(&energy, &keys, protected)?;
        }
        if let Gate::Margin { .. } = s.gate {
            threshold = above_runner_up(&energy, &threshold, s.picks)?;
        }
        let outcome = choose(steps, [&query, k, v], [&energy, &threshold, &beta], &keys, s)?;
        // Weighted and added in the accumulator type: the gradient of the weights is a sum over all rows.
        let weighted = match s.rounds {
            Some(w) => {
                let w = w.narrow(1, round, 1)?.reshape((1, sizes.q_heads, 1, 1))?.to_dtype(acc)?;
                outcome.y.to_dtype(acc)?.broadcast_mul(&w)?
            }
            None => outcome.y.clone(),
        };
        if round > 0 {
            later.push(Round { index: outcome.record.index.clone(), y: weighted.detach() });
        }
        y = Some(match y {
            Some(sum) => (sum + weighted)?,
            None => weighted,
        });
        if round + 1 < rounds {
            keys = steps.remaining_keys(&keys, &outcome.record)?;
            query = steps.residual([&query, k], &steps.single_keys(&outcome.record.index)?)?;
        }
        first.get_or_insert((outcome, energy.detach()));
    }
    let (Some(y), Some((Outcome { record, coherence, .. }, compared))) = (y, first) else {
        unreachable!("at least one round")
    };
    let Record { index, energy, margin, gate, .. } = record;
    let picks = later_picks(&compared, &candidates.index, &threshold, s)?;
    Ok(Selected { y: y.to_dtype(q.dtype())?, index, energy, margin, gate, coherence, compared, later, picks })
}

/// The thresholds of the queries `[B, Hq, N]` with [`Gate::Margin`]: the energy of the first candidate that is not read, +inf
/// for a query without one, plus `threshold` `[Hq]` or `[B, Hq, N]`.
///
/// * `energy`: of the candidates in ascending order, `[B, Hq, N, K]`.
/// * `picks`: the number of candidates that a query reads.
///
/// Differentiable in both tensors, which have one dtype.
///
/// # Errors
/// Shapes or dtypes that do not fit.
pub fn above_runner_up(energy: &Tensor, threshold: &Tensor, picks: usize) -> Result<Tensor> {
    let (b, h, n, slots) = energy.dims4()?;
    let threshold = match threshold.rank() {
        1 => threshold.reshape((1, (), 1))?,
        _ => threshold.clone(),
    };
    let runner_up = match picks < slots {
        true => energy.narrow(3, picks, 1)?.squeeze(3)?,
        false => Tensor::full(f32::INFINITY, (b, h, n), energy.device())?.to_dtype(energy.dtype())?,
    };
    Ok(runner_up.broadcast_add(&threshold)?)
}

/// The picks after the winner, from the energies and keys of all candidates `[B, Hq, N, K]`.
fn later_picks(energy: &Tensor, index: &Tensor, threshold: &Tensor, s: &Select) -> Result<Vec<Pick>> {
    let count = s.picks.min(index.dim(3)?);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let (energy, index) = (energy.narrow(3, 0, count)?, index.narrow(3, 0, count)?);
    let threshold = match threshold.rank() {
        1 => threshold.detach().reshape((1, (), 1, 1))?,
        _ => threshold.detach().unsqueeze(3)?,
    };
    let slots = match s.gate.temperature() {
        Some(temperature) => {
            let (b, h, n, _) = energy.dims4()?;
            (Tensor::cat(&[&energy, &threshold.broadcast_as((b, h, n, 1))?], 3)? / -temperature)?
        }
        None => energy.neg()?,
    };
    let heights = slots.broadcast_sub(&slots.max_keepdim(3)?)?.exp()?;
    let weights = heights.broadcast_div(&heights.sum_keepdim(3)?)?.narrow(3, 0, count)?;
    // candle has no operations on i32 on a GPU: an unused slot is known by its energy, +inf.
    let limit = (threshold + s.gate.admission(s.exclude_below))?;
    let read = energy.broadcast_le(&limit)?.mul(&energy.lt(f32::INFINITY)?)?;
    let weights = read.where_cond(&weights, &weights.zeros_like()?)?;
    let pick = |r: usize| -> Result<Pick> {
        let of = |t: &Tensor| t.narrow(3, r, 1)?.squeeze(3);
        Ok(Pick { index: of(&index)?, weight: of(&weights)? })
    };
    (1..count).map(pick).collect()
}

/// One round: the choice, and with alpha the coherence point and the coherence gate.
fn choose<S: Steps>(
    steps: &S,
    [q, k, v]: [&Tensor; 3],
    [energy, threshold, beta]: [&Tensor; 3],
    keys: &S::Keys,
    s: &Select,
) -> Result<Outcome> {
    let (y, mut record) = steps.choose([energy, v, threshold], keys, s.hardness)?;
    let Some(alpha) = s.alpha else { return Ok(Outcome { y, record, coherence: None }) };
    let aux = Tensor::cat(&[beta, &alpha.to_dtype(beta.dtype())?], 0)?;
    let coherence = Some(steps.coherence([q, k, &aux], &steps.single_keys(&record.index)?)?);
    if s.gate != Gate::Coherence {
        return Ok(Outcome { y, record, coherence });
    }
    // The density of the nearest key, admitted or not: like the energy gate, it also scales the estimator's gradient of
    // a row that abstains, which can so learn to select again.
    let density = steps.density([q, k, &aux], &steps.single_keys(&record.nearest)?)?;
    // Without an energy gate, the gate of the record is 1, or 0 where the row abstains.
    record.gate = record.gate.gt(0.0)?.where_cond(&density.detach(), &record.gate)?;
    let scaled =
        |y: &Tensor| -> Result<Tensor> { Ok(y.broadcast_mul(&density.unsqueeze(3)?.to_dtype(y.dtype())?)?) };
    let hard = s.hardness;
    // The gate scales the selected row alone, not the soft mixture.
    let y = match (s.estimator == Estimator::Blend || hard == 0.0, hard == 1.0) {
        (true, _) => y,
        (false, true) => scaled(&y)?,
        (false, false) => {
            let soft = (steps.choose([energy, v, threshold], keys, 0.0)?.0 * (1.0 - hard))?;
            (soft + (scaled(&steps.choose([energy, v, threshold], keys, 1.0)?.0)? * hard)?)?
        }
    };
    Ok(Outcome { y, record, coherence })
}
