//! Statistics of a forward pass, for monitoring.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Candidates, Mask, Selected, masked_softmax};

/// The greatest number of weights in memory for the statistics of softmax attention: 16 MiB of f32.
const MAX_WEIGHTS: usize = 1 << 22;

/// The gate from which a read counts as open.
const OPEN_GATE: f64 = 0.1;

/// Statistics of the selections of a layer in one pass, over batch, heads and queries.
#[derive(Debug, Clone)]
pub struct SelectionStats {
    /// Share of (query, head) pairs that abstained.
    pub abstained: f64,
    /// Mean weight on position 0. That of a read is its gate, 1 without one, so that without gates it is the share of
    /// queries that select position 0.
    pub first_token: f64,
    /// Mean margin over the selections with a runner-up: its energy minus that of the winner. For a softmax layer the
    /// log of the ratio of the two greatest weights.
    pub margin: f64,
    /// Mean entropy in nats of the weights over the candidates, or over the visible keys for a softmax layer.
    pub entropy: f64,
    /// Number of different keys that the heads of a position select, divided by the number of heads that select; the
    /// mean over positions.
    pub distinct: f64,
    /// The key of greatest weight for every (batch, head, query) in this order; -1 where the head abstained.
    pub picks: Vec<i32>,
    /// Mean energy gate, 0 where a head abstained; none for a softmax layer.
    pub gate: Option<f64>,
    /// Share of (query, head) pairs with a gate of at least .1; none for a softmax layer.
    pub open: Option<f64>,
    /// The selections themselves; none for a softmax layer.
    pub selected: Option<Selected>,
    /// What the number of visible keys adds to the thresholds of the heads `[B, Hq, N]`; none where they do not follow it.
    pub threshold_shift: Option<Tensor>,
}

impl SelectionStats {
    /// Statistics of a selecting layer. The entropy is that of the energies of the scan at `temperature`.
    pub(crate) fn of_selection(
        selected: Selected,
        candidates: &Candidates,
        temperature: f64,
    ) -> Result<Self> {
        let (b, _, n) = selected.index.dims3()?;
        let picks = selected.index.flatten_all()?.to_vec1::<i32>()?;
        // Widened on the host: Metal has no f64.
        let wide =
            |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        let margin = wide(&selected.margin)?;
        let gates = wide(&selected.gate)?;
        let open = gates.iter().filter(|gate| **gate >= OPEN_GATE).count() as f64 / gates.len() as f64;
        let abstained = picks.iter().filter(|&&j| j < 0).count() as f64 / picks.len() as f64;
        let mut on_first = weight_on_first(&picks, &gates);
        for pick in &selected.picks {
            on_first += weight_on_first(&pick.index.flatten_all()?.to_vec1::<i32>()?, &wide(&pick.weight)?);
        }
        let energies = wide(&candidates.energy.detach())?;
        let rows = energies.chunks(candidates.energy.dim(3)?);
        Ok(Self {
            abstained,
            first_token: on_first / picks.len() as f64,
            margin: mean(margin.into_iter().filter(|m| m.is_finite())),
            entropy: mean(rows.map(|energies| entropy(energies, temperature))),
            distinct: distinct(&picks, b, n),
            picks,
            gate: Some(mean(gates.into_iter())),
            open: Some(open),
            selected: Some(Selected { y: selected.y.detach(), ..selected }),
            threshold_shift: None,
        })
    }

    /// Statistics of softmax attention, see [`softmax_weights`].
    pub(crate) fn of_softmax(
        qk: [&Tensor; 2],
        prior: Option<&Tensor>,
        mask: &Mask,
        scale: f64,
    ) -> Result<Self> {
        let (b, hq, n, _) = qk[0].dims4()?;
        let mut sums = WeightSums::new([b, hq, n]);
        softmax_weights(qk, prior, mask, scale, |first, weights| sums.add(first, weights))?;
        Ok(sums.finish())
    }

    /// Statistics of a layer with weights `[B, Hq, N, M]`.
    pub(crate) fn of_weights(weights: &Tensor) -> Result<Self> {
        let (b, hq, n, _) = weights.dims4()?;
        let mut sums = WeightSums::new([b, hq, n]);
        sums.add(0, weights)?;
        Ok(sums.finish())
    }
}

/// Computes the weights of softmax attention with `scale` over q `[B, Hq, N, D]`, k `[B, Hk, M, D]` and a prior
/// `[B, Hk, M]`. `each` gets the weights `[B, Hq, count, M]` of a few queries at a time and the first of these queries.
pub(crate) fn softmax_weights(
    [q, k]: [&Tensor; 2],
    prior: Option<&Tensor>,
    mask: &Mask,
    scale: f64,
    mut each: impl FnMut(usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let ((b, hq, n, d), (_, hk, m, _)) = (q.dims4()?, k.dims4()?);
    let (q, k) = ((q.detach() * scale)?, k.detach().contiguous()?.t()?);
    let queries = (MAX_WEIGHTS / (b * hq * m).max(1)).clamp(1, n.max(1));
    for first in (0..n).step_by(queries) {
        let count = queries.min(n - first);
        // The heads of a group share keys: fold them into the rows of one product.
        let q = q.narrow(2, first, count)?.contiguous()?.reshape((b, hk, hq / hk * count, d))?;
        let scores = match prior {
            Some(prior) => q.matmul(&k)?.broadcast_add(&prior.detach().unsqueeze(2)?)?,
            None => q.matmul(&k)?,
        };
        let mask = mask.clone().from_query(first);
        each(first, &masked_softmax(&scores.reshape((b, hq, count, m))?, &mask)?)?;
    }
    Ok(())
}

/// Sums over the rows of weights.
struct WeightSums {
    sizes: [usize; 3],
    first_token: f64,
    empty: usize,
    entropy: f64,
    margin: f64,
    /// Number of rows with two weights, over which `margin` is a sum.
    margins: usize,
    picks: Vec<i32>,
}

impl WeightSums {
    /// For B, Hq and N.
    fn new(sizes: [usize; 3]) -> Self {
        let picks = vec![-1; sizes.iter().product()];
        Self { sizes, first_token: 0.0, empty: 0, entropy: 0.0, margin: 0.0, margins: 0, picks }
    }

    /// Adds the weights `[B, Hq, count, M]` of the queries from `first` on.
    fn add(&mut self, first: usize, weights: &Tensor) -> Result<()> {
        let (_, _, count, m) = weights.dims4()?;
        let w = weights.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        for (at, row) in w.chunks(m).enumerate() {
            let (mut top, mut next, mut pick) = (0f32, 0f32, -1);
            for (j, &x) in row.iter().enumerate() {
                if x > 0.0 {
                    self.entropy -= f64::from(x * x.ln());
                }
                if x > top {
                    (next, top, pick) = (top, x, j as i32);
                } else if x > next {
                    next = x;
                }
            }
            self.first_token += f64::from(row[0]);
            self.empty += usize::from(top == 0.0);
            self.picks[at / count * self.sizes[2] + first + at % count] = pick;
            if next > 0.0 {
                self.margin += f64::from(top / next).ln();
                self.margins += 1;
            }
        }
        Ok(())
    }

    fn finish(self) -> SelectionStats {
        let [b, _, n] = self.sizes;
        let rows = self.picks.len() as f64;
        SelectionStats {
            abstained: self.empty as f64 / rows,
            first_token: self.first_token / rows,
            margin: self.margin / self.margins.max(1) as f64,
            entropy: self.entropy / rows,
            distinct: distinct(&self.picks, b, n),
            picks: self.picks,
            gate: None,
            open: None,
            selected: None,
            threshold_shift: None,
        }
    }
}

/// The sum of the weights of the reads of position 0.
fn weight_on_first(keys: &[i32], weights: &[f64]) -> f64 {
    keys.iter().zip(weights).filter(|(key, _)| **key == 0).map(|(_, weight)| weight).sum()
}

/// The mean, or 0 of no values.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
    sum / count.max(1) as f64
}

/// Entropy of `softmax(-energies / temperature)` in nats; padding has infinite energy and no weight.
fn entropy(energies: &[f64], temperature: f64) -> f64 {
    let least = energies.iter().copied().fold(f64::INFINITY, f64::min);
    let (mut sum, mut moment) = (0.0, 0.0);
    for &energy in energies.iter().filter(|e| e.is_finite()) {
        let height = (least - energy) / temperature;
        sum += height.exp();
        moment += height * height.exp();
    }
    // ln(sum) - sum(w ln w') with w' the weights before they are divided by their sum.
    if sum > 0.0 { sum.ln() - moment / sum } else { 0.0 }
}

/// The number of different keys that the heads of a position select, divided by the number of heads that select: the
/// mean over batch and positions where a head selects. `picks` as in [`SelectionStats`], for `b` sequences of `n`
/// queries.
fn distinct(picks: &[i32], b: usize, n: usize) -> f64 {
    let heads = picks.len() / (b * n).max(1);
    let (mut sum, mut count) = (0.0, 0usize);
    let mut selected = Vec::with_capacity(heads);
    for (b, i) in (0..b).flat_map(|b| (0..n).map(move |i| (b, i))) {
        selected.clear();
        selected.extend((0..heads).map(|h| picks[(b * heads + h) * n + i]).filter(|&j| j >= 0));
        if selected.is_empty() {
            continue;
        }
        let selecting = selected.len();
        selected.sort_unstable();
        selected.dedup();
        sum += selected.len() as f64 / selecting as f64;
        count += 1;
    }
    sum / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use gd_kernels::{Gate, Scan, Select, scan, select};

    use super::*;

    #[test]
    fn entropy_of_equal_of_certain_and_of_no_candidates() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
        close(entropy(&[3.0, 3.0, 3.0, f64::INFINITY], 1.0), 3f64.ln());
        close(entropy(&[-900.0, 900.0], 1.0), 0.0);
        close(entropy(&[f64::INFINITY; 2], 1.0), 0.0);
        // Weights 2/3 and 1/3.
        let expected = -(2.0 / 3.0 * (2f64 / 3.0).ln() + 1.0 / 3.0 * (1f64 / 3.0).ln());
        close(entropy(&[0.0, 2.0 * 2f64.ln()], 2.0), expected);
    }

    #[test]
    fn reads_of_the_first_token_count_by_their_weights() {
        let device = &Device::Cpu;
        let [q, k, v] = [5, 9, 3].map(|seed| {
            let values: Vec<f32> = (0..48).map(|i| ((i * i * seed % 31) as f32 - 15.0) / 15.0).collect();
            Tensor::from_vec(values, (1, 2, 6, 4), device).unwrap()
        });
        let (beta, mask) = (Tensor::new(&[0.5f32, 0.75], device).unwrap(), Mask::causal(0));
        let candidates = scan(&q, &k, &Scan::new(&beta, &mask, 4)).unwrap();
        let threshold = Tensor::new(&[0.25f32, 0.5], device).unwrap();
        let options = Select {
            threshold: Some(&threshold),
            gate: Gate::Margin { temperature: 1.0 },
            exclude_below: 0.0,
            picks: 2,
            ..Select::new(&beta)
        };
        let selected = select(&q, &k, &v, &candidates, &options).unwrap();
        let host =
            |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
        let ranks =
            [(&selected.index, &selected.gate), (&selected.picks[0].index, &selected.picks[0].weight)];
        let (mut expected, mut reads) = (0.0, [0, 0]);
        for (rank, (keys, weights)) in ranks.into_iter().enumerate() {
            for (key, weight) in host(keys).into_iter().zip(host(weights)) {
                expected += if key == 0.0 { weight / 12.0 } else { 0.0 };
                reads[rank] += usize::from(key == 0.0 && weight > 0.0);
            }
        }
        assert!(reads[0] > 1 && reads[1] > 0, "{reads:?}");
        let stats = SelectionStats::of_selection(selected, &candidates, 1.0).unwrap();
        assert!((stats.first_token - expected).abs() < 1e-12, "{} {expected}", stats.first_token);
        assert_eq!(stats.abstained, 0.0);
    }

    #[test]
    fn distinct_keys_are_counted_over_the_heads_that_select() {
        // Two sequences, three heads, two queries.
        let picks = [0, 1, 0, 1, 0, 0, 5, -1, 6, -1, -1, -1];
        // (0: one of three), (1: two of three), (5 and 6: two of two), none.
        assert!((distinct(&picks, 2, 2) - (1.0 / 3.0 + 2.0 / 3.0 + 1.0) / 3.0).abs() < 1e-12);
    }
}
