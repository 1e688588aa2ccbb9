//! What several trained mechanisms have to show: a table over seeds, and the numbers behind it.

use serde::Serialize;

use crate::eval::Evaluation;

/// One training run.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    /// The mechanism's name.
    pub mechanism: &'static str,
    /// Its seed.
    pub seed: u64,
    /// Width of the feed-forward block, by which sizes are made equal.
    pub intermediate_size: usize,
    /// Parameters.
    pub parameters: usize,
    /// The whole validation text after the training.
    #[serde(flatten)]
    pub result: Evaluation,
    /// Training tokens a second.
    pub tokens_per_second: f64,
    /// Greatest resident memory of the training; none where the system does not tell.
    pub peak_memory_mib: Option<f64>,
    /// Training loss of every step.
    pub train_loss: Vec<f64>,
    /// (step, loss) of the looks at the first windows of the validation text.
    pub valid_loss: Vec<(u64, f64)>,
}

/// One mechanism over its seeds: means, unless said otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The mechanism's name.
    pub mechanism: &'static str,
    /// Parameters.
    pub parameters: usize,
    /// Validation loss, nats per token.
    pub loss: f64,
    /// Its standard deviation; none for a single seed.
    pub spread: Option<f64>,
    /// How far the loss lies above that of the first mechanism.
    pub difference_percent: f64,
    /// Bits per byte of the validation text.
    pub bits_per_byte: f64,
    /// Training tokens a second.
    pub tokens_per_second: f64,
    /// The greatest of the seeds.
    pub peak_memory_mib: Option<f64>,
    /// Share of (query, head) pairs that read nothing.
    pub abstain_rate: f64,
    /// Weight on the first position.
    pub first_token_share: f64,
    /// Lead of the best key over the runner-up.
    pub top1_margin: f64,
}

/// All runs and their summary.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// Optimizer steps of each run.
    pub steps: u64,
    /// Training tokens of a step.
    pub tokens_per_step: usize,
    /// Tokens of a window.
    pub context: usize,
    /// One line a mechanism, in the order of the first runs.
    pub mechanisms: Vec<Summary>,
    /// Every run.
    pub runs: Vec<Run>,
}

fn mean(runs: &[&Run], f: impl Fn(&Run) -> f64) -> f64 {
    runs.iter().map(|r| f(r)).sum::<f64>() / runs.len() as f64
}

impl Summary {
    /// `first` is the loss that the difference refers to, if not the runs' own.
    fn new(runs: &[&Run], first: Option<f64>) -> Self {
        let loss = mean(runs, |r| r.result.loss);
        let squares: f64 = runs.iter().map(|r| (r.result.loss - loss).powi(2)).sum();
        Self {
            mechanism: runs[0].mechanism,
            parameters: runs[0].parameters,
            loss,
            spread: (runs.len() > 1).then(|| (squares / (runs.len() - 1) as f64).sqrt()),
            difference_percent: 100.0 * (loss / first.unwrap_or(loss) - 1.0),
            bits_per_byte: mean(runs, |r| r.result.bits_per_byte),
            tokens_per_second: mean(runs, |r| r.tokens_per_second),
            peak_memory_mib: runs.iter().filter_map(|r| r.peak_memory_mib).reduce(f64::max),
            abstain_rate: mean(runs, |r| r.result.heads.abstained),
            first_token_share: mean(runs, |r| r.result.heads.first_token),
            top1_margin: mean(runs, |r| r.result.heads.margin),
        }
    }
}

/// The runs of each mechanism, in the order in which they first come.
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
    /// Sums up runs of `steps` steps.
    pub fn new(runs: Vec<Run>, steps: u64, tokens_per_step: usize, context: usize) -> Self {
        let mut mechanisms: Vec<Summary> = Vec::new();
        for group in by_mechanism(&runs) {
            mechanisms.push(Summary::new(&group, mechanisms.first().map(|s| s.loss)));
        }
        Self { steps, tokens_per_step, context, mechanisms, runs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::HeadStats;

    fn run(mechanism: &'static str, seed: u64, loss: f64) -> Run {
        let heads = HeadStats { abstained: 0.25, first_token: 0.5, margin: loss, ..HeadStats::default() };
        Run {
            mechanism,
            seed,
            intermediate_size: 8,
            parameters: 100,
            result: Evaluation {
                loss,
                perplexity: loss.exp(),
                bits_per_byte: loss / 2f64.ln(),
                tokens: 9,
                heads,
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
        let c = Comparison::new(runs, 20, 8, 4);
        let [a, b] = &c.mechanisms[..] else { panic!("{c:?}") };
        assert_eq!((a.mechanism, a.loss, a.difference_percent), ("a", 3.0, 0.0));
        assert!((a.spread.unwrap() - 2f64.sqrt()).abs() < 1e-12, "{a:?}");
        assert!((b.difference_percent + 10.0).abs() < 1e-9, "{b:?}");
        assert_eq!((a.peak_memory_mib, a.top1_margin, a.abstain_rate), (Some(40.0), 3.0, 0.25));
    }

    #[test]
    fn one_seed_has_no_spread_and_no_memory_is_an_empty_cell() {
        let c = Comparison::new(vec![run("a", 0, 2.0)], 20, 8, 4);
        assert_eq!((c.mechanisms[0].spread, c.mechanisms[0].peak_memory_mib), (None, None));
    }
}
