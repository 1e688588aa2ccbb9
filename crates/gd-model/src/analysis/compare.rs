//! Comparison of attention mechanisms over training runs with several seeds.

use serde::{Deserialize, Serialize};

use crate::config::Mechanism;
use crate::eval::Evaluation;
use crate::eval::reading::ReadingReport;

/// One training run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// The name of the variant.
    pub mechanism: String,
    /// The mechanism of every layer, or one for all, with the parameters that are not its defaults.
    pub layers: Vec<Mechanism>,
    /// The seed of the initialization and of the data order.
    pub seed: u64,
    /// The peak learning rate.
    pub lr: f64,
    /// The width of the feed-forward blocks, which is adjusted to give all models the same size.
    pub intermediate_size: usize,
    /// The number of parameters.
    pub parameters: usize,
    /// The evaluation on the whole validation text after training.
    #[serde(flatten)]
    pub result: Evaluation,
    /// What the reads of the heads are worth on this text.
    pub reading: ReadingReport,
    /// Training tokens per second.
    pub tokens_per_second: f64,
    /// The peak resident memory of the training in MiB; `None` if the system does not report it.
    pub peak_memory_mib: Option<f64>,
    /// The training loss of every step, nats per token.
    pub train_loss: Vec<f64>,
    /// (step, loss) of the evaluations on the first windows of the validation text.
    pub valid_loss: Vec<(u64, f64)>,
}

/// One mechanism: means over its seeds, unless stated otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The name of the variant.
    pub mechanism: String,
    /// The mechanism of every layer, or one for all, with the parameters that are not its defaults.
    pub layers: Vec<Mechanism>,
    /// The number of parameters.
    pub parameters: usize,
    /// Validation loss, nats per token.
    pub loss: f64,
    /// The sample standard deviation of the loss; `None` for a single seed.
    pub spread: Option<f64>,
    /// The difference of the loss to that of the first mechanism, in percent of the latter.
    pub difference_percent: f64,
    /// Bits per byte of the validation text.
    pub bits_per_byte: f64,
    /// What the reads of the heads are worth.
    pub reading: ReadingReport,
    /// The peak learning rate, the best one of a sweep.
    pub lr: f64,
    /// Training tokens per second.
    pub tokens_per_second: f64,
    /// The maximal peak memory of the seeds, in MiB.
    pub peak_memory_mib: Option<f64>,
    /// The fraction of (query, head) pairs that abstain.
    pub abstain_rate: f64,
    /// The mean weight on position 0.
    pub first_token_share: f64,
    /// The mean energy difference between the selected key and the runner-up.
    pub top1_margin: f64,
}

/// All runs and their summaries.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The number of optimizer steps of each run.
    pub steps: u64,
    /// The number of training tokens per step.
    pub tokens_per_step: usize,
    /// The length of a window in tokens.
    pub context: usize,
    /// One summary per mechanism, in the order of their first runs.
    pub mechanisms: Vec<Summary>,
    /// The loss of every mechanism at every learning rate of a sweep, with the first seed.
    pub sweep: Vec<SweepPoint>,
    /// Every run.
    pub runs: Vec<Run>,
}

/// A learning rate of a sweep.
#[derive(Debug, Clone, Serialize)]
pub struct SweepPoint {
    /// The name of the variant.
    pub mechanism: String,
    /// The peak learning rate.
    pub lr: f64,
    /// Validation loss, nats per token.
    pub loss: f64,
}

/// What cutting all reads has to cost in nats per token, so that a comparison measures reading.
pub const LEAST_COST_OF_CUT: f64 = 0.005;

/// The mean of the reports of several runs.
fn mean_reading(runs: &[&Run]) -> ReadingReport {
    let of = |f: fn(&ReadingReport) -> f64| mean(runs, |run| f(&run.reading));
    let some = |f: fn(&ReadingReport) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter_map(|run| f(&run.reading)).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let first = &runs[0].reading;
    let part = |at: usize| mean(runs, |run| run.reading.by_position[at]);
    ReadingReport {
        loss: of(|r| r.loss),
        loss_without_reads: of(|r| r.loss_without_reads),
        gate: some(|r| r.gate),
        open: some(|r| r.open),
        by_position: (0..first.by_position.len()).map(part).collect(),
        ngram: first.ngram,
        repeated: of(|r| r.repeated),
        repeated_share: of(|r| r.repeated_share),
        other: of(|r| r.other),
    }
}

fn mean(runs: &[&Run], f: impl Fn(&Run) -> f64) -> f64 {
    runs.iter().map(|r| f(r)).sum::<f64>() / runs.len() as f64
}

impl Summary {
    /// `baseline` is the loss that the difference refers to; `None` if it is that of these runs.
    fn new(runs: &[&Run], baseline: Option<f64>) -> Self {
        let loss = mean(runs, |r| r.result.loss);
        let squares: f64 = runs.iter().map(|r| (r.result.loss - loss).powi(2)).sum();
        Self {
            mechanism: runs[0].mechanism.clone(),
            layers: runs[0].layers.clone(),
            parameters: runs[0].parameters,
            loss,
            spread: (runs.len() > 1).then(|| (squares / (runs.len() - 1) as f64).sqrt()),
            difference_percent: 100.0 * (loss / baseline.unwrap_or(loss) - 1.0),
            bits_per_byte: mean(runs, |r| r.result.bits_per_byte),
            reading: mean_reading(runs),
            lr: runs[0].lr,
            tokens_per_second: mean(runs, |r| r.tokens_per_second),
            peak_memory_mib: runs.iter().filter_map(|r| r.peak_memory_mib).reduce(f64::max),
            abstain_rate: mean(runs, |r| r.result.heads.abstained),
            first_token_share: mean(runs, |r| r.result.heads.first_token),
            top1_margin: mean(runs, |r| r.result.heads.margin),
        }
    }
}

/// Groups runs by mechanism, in the order of their first runs.
pub fn by_mechanism(runs: &[Run]) -> Vec<Vec<&Run>> {
    let mut groups: Vec<Vec<&Run>> = Vec::new();
    for run in runs {
        match groups.iter_mut().find(|g| g[0].mechanism == run.mechanism) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    groups
}

impl Comparison {
    /// Summarizes runs of `steps` steps with `tokens_per_step` tokens in windows of `context` tokens.
    pub fn new(
        runs: Vec<Run>,
        sweep: Vec<SweepPoint>,
        steps: u64,
        tokens_per_step: usize,
        context: usize,
    ) -> Self {
        let mut mechanisms: Vec<Summary> = Vec::new();
        for group in by_mechanism(&runs) {
            mechanisms.push(Summary::new(&group, mechanisms.first().map(|s| s.loss)));
        }
        Self { steps, tokens_per_step, context, mechanisms, sweep, runs }
    }

    /// Whether the comparison measures reading: cutting all reads costs some mechanism at least [`LEAST_COST_OF_CUT`].
    pub fn measures_reading(&self) -> bool {
        self.mechanisms.iter().any(|s| s.reading.cost_of_cut() >= LEAST_COST_OF_CUT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::HeadStats;

    fn run(mechanism: &str, seed: u64, loss: f64) -> Run {
        let heads = HeadStats { abstained: 0.25, first_token: 0.5, margin: loss, ..HeadStats::default() };
        Run {
            mechanism: mechanism.into(),
            layers: vec![Mechanism::Softmax],
            seed,
            lr: 3e-3,
            intermediate_size: 8,
            parameters: 100,
            result: Evaluation {
                loss,
                perplexity: loss.exp(),
                bits_per_byte: loss / 2f64.ln(),
                tokens: 9,
                text_tokens: 9,
                text_bytes: 9.0,
                heads,
            },
            reading: ReadingReport {
                loss,
                loss_without_reads: loss + 0.001 * (seed + 1) as f64,
                by_position: vec![loss; 8],
                ..ReadingReport::default()
            },
            tokens_per_second: 1000.0,
            peak_memory_mib: (seed > 0).then_some(10.0 * loss),
            train_loss: (0..20).map(|i| loss + 3.0 / f64::from(i + 1)).collect(),
            valid_loss: vec![(10, loss + 0.2), (20, loss)],
        }
    }

    #[test]
    fn the_summary_is_the_mean_over_seeds_with_their_deviation() {
        let runs = vec![run("a", 0, 2.0), run("b", 0, 2.2), run("a", 1, 4.0), run("b", 1, 3.2)];
        let c = Comparison::new(runs, Vec::new(), 20, 8, 4);
        let [a, b] = &c.mechanisms[..] else { panic!("{c:?}") };
        assert_eq!((a.mechanism.as_str(), a.loss, a.difference_percent), ("a", 3.0, 0.0));
        assert!((a.spread.unwrap() - 2f64.sqrt()).abs() < 1e-12, "{a:?}");
        assert!((b.difference_percent + 10.0).abs() < 1e-9, "{b:?}");
        assert_eq!((a.peak_memory_mib, a.top1_margin, a.abstain_rate), (Some(40.0), 3.0, 0.25));
    }

    #[test]
    fn a_comparison_measures_reading_if_a_cut_costs_enough() {
        // Costs .001 and .002, mean .0015.
        let mut runs = vec![run("a", 0, 2.0), run("a", 1, 4.0)];
        let c = Comparison::new(runs.clone(), Vec::new(), 20, 8, 4);
        assert!((c.mechanisms[0].reading.cost_of_cut() - 0.0015).abs() < 1e-9 && !c.measures_reading());
        runs[1].reading.loss_without_reads += 0.008;
        assert!(Comparison::new(runs, Vec::new(), 20, 8, 4).measures_reading());
    }

    #[test]
    fn one_seed_has_no_deviation_and_unreported_memory_is_none() {
        let c = Comparison::new(vec![run("a", 0, 2.0)], Vec::new(), 20, 8, 4);
        assert_eq!((c.mechanisms[0].spread, c.mechanisms[0].peak_memory_mib), (None, None));
    }
}
