//! Y: how well the confidence of a mechanism tells answers that it should not give.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;

use super::Interval;
use super::entries::{Entry, Kind};
use super::recall::{Queries, Recall};
use super::responses::{Responses, Tuned, respond, tune};
use crate::error::Result;
use crate::eval::selective_prediction::{Ranking, least_aurc};

/// Resamples of seeds and queries for an interval.
const RESAMPLES: usize = 400;
/// The first random stream of the resamples.
const FIRST_STREAM: u64 = 2 << 32;

/// The figures of one key bank, or their means over several.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Consistency {
    /// Area under the ROC curve by which confidence separates queries near keys from random ones.
    pub auroc_far: f64,
    /// The same for queries between two keys.
    pub auroc_mix: f64,
    /// `auroc_far + auroc_mix - 1`.
    #[serde(rename = "G")]
    pub g: f64,
    /// The mean rate of abstention on both kinds of queries that belong to no key, minus that on queries near keys.
    #[serde(rename = "J")]
    pub j: f64,
    /// `(r - AURC) / (r - least AURC)` over all queries, with the error rate r; any answer to a query that belongs to no key
    /// is an error. 0 if there is nothing to order, because all or no answers are wrong.
    #[serde(rename = "R")]
    pub r: f64,
    /// `(G + J + R) / 3`.
    #[serde(rename = "Y")]
    pub y: f64,
}

/// The figures of a mechanism with their intervals over seeds and queries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Graded {
    /// See [`Consistency::auroc_far`].
    pub auroc_far: Interval,
    /// See [`Consistency::auroc_mix`].
    pub auroc_mix: Interval,
    /// See [`Consistency::g`].
    #[serde(rename = "G")]
    pub g: Interval,
    /// See [`Consistency::j`].
    #[serde(rename = "J")]
    pub j: Interval,
    /// See [`Consistency::r`].
    #[serde(rename = "R")]
    pub r: Interval,
    /// See [`Consistency::y`].
    #[serde(rename = "Y")]
    pub y: Interval,
    /// The share of the answered queries near keys whose output is one value row, within a tenth of its length.
    pub colour_one_value: f64,
    /// The mean squared error on queries near keys; an abstention returns 0.
    pub mse_in: f64,
    /// The rate of abstention on queries near keys.
    pub abstain_in: f64,
}

/// The figures for confidences of queries near keys with their errors, and of both kinds of queries that belong to no key.
/// A confidence of minus infinity is an abstention. No group is empty.
pub fn consistency(inside: &[f64], error: &[bool], far: &[f64], mix: &[f64]) -> Consistency {
    let answers = Answers::new([inside.to_vec(), far.to_vec(), mix.to_vec()], error);
    answers.consistency(&vec![1; answers.error.len()])
}

/// The answers of one mechanism to the queries of one bank.
struct Answers {
    /// The ends of the three groups.
    ends: [usize; 3],
    error: Vec<bool>,
    abstained: Vec<bool>,
    ranking: Ranking,
}

impl Answers {
    fn new(groups: [Vec<f64>; 3], error: &[bool]) -> Self {
        let mut ends = [0; 3];
        let mut end = 0;
        for (group, last) in groups.iter().zip(&mut ends) {
            end += group.len();
            *last = end;
        }
        let confidence = groups.concat();
        let out = std::iter::repeat_n(true, confidence.len() - error.len());
        Self {
            ends,
            error: error.iter().copied().chain(out).collect(),
            abstained: confidence.iter().map(|c| *c == f64::NEG_INFINITY).collect(),
            ranking: Ranking::new(&confidence),
        }
    }

    /// The figures if the answers occur this often.
    fn consistency(&self, count: &[u32]) -> Consistency {
        let [inside, far, mix] = self.groups();
        let is_in = |i: usize| inside.contains(&i);
        let auroc_far = self.ranking.auroc(is_in, |i| far.contains(&i), count);
        let auroc_mix = self.ranking.auroc(is_in, |i| mix.contains(&i), count);
        let sum = |range: &std::ops::Range<usize>, flags: &[bool]| -> u64 {
            range.clone().filter(|&i| flags[i]).map(|i| u64::from(count[i])).sum()
        };
        let all = vec![true; count.len()];
        let abstention = |range| sum(range, &self.abstained) as f64 / sum(range, &all) as f64;
        let everything = 0..count.len();
        let (errors, total) = (sum(&everything, &self.error), sum(&everything, &all));
        let rate = errors as f64 / total as f64;
        let aurc = self.ranking.aurc(&self.error, count);
        let possible = rate - least_aurc(errors, total);
        let g = auroc_far + auroc_mix - 1.0;
        let j = (abstention(&far) + abstention(&mix)) / 2.0 - abstention(&inside);
        let r = if possible > 0.0 { (rate - aurc) / possible } else { 0.0 };
        Consistency { auroc_far, auroc_mix, g, j, r, y: (g + j + r) / 3.0 }
    }

    fn groups(&self) -> [std::ops::Range<usize>; 3] {
        let [a, b, c] = self.ends;
        [0..a, a..b, b..c]
    }

    /// How often each answer occurs in a resample of every group.
    fn resample(&self, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let mut count = vec![0; self.error.len()];
        for group in self.groups() {
            for _ in group.clone() {
                count[rng.random_range(group.clone())] += 1;
            }
        }
        count
    }
}

/// Measures an entry on all banks: with its confidence, and with the decision to answer where it abstains by a rule. None
/// for an entry that the task does not apply to.
pub(super) fn measure(
    entry: &Entry,
    tasks: &[Recall],
    seed: u64,
) -> Result<(Option<Graded>, Option<Graded>)> {
    let tuned = tasks.par_iter().map(|recall| tune(entry, recall)).collect::<Result<Option<Vec<Tuned>>>>()?;
    let Some(tuned) = tuned else { return Ok((None, None)) };
    let banks = tasks.par_iter().zip(&tuned).map(|(recall, tuned)| Bank::new(entry, *tuned, recall));
    let banks = banks.collect::<Result<Vec<Bank>>>()?;
    let abstains = match entry.kind {
        Kind::Reject(_) => true,
        Kind::Selection(selection) => selection.abstains(),
        _ => false,
    };
    let gate = abstains.then(|| graded(&banks, |bank| &bank.gate, seed));
    Ok((Some(graded(&banks, |bank| &bank.graded, seed)), gate))
}

/// What an entry did on one bank.
struct Bank {
    graded: Answers,
    gate: Answers,
    one_value_share: f64,
    mean_squared_error: f64,
    abstention: f64,
}

impl Bank {
    fn new(entry: &Entry, tuned: Tuned, recall: &Recall) -> Result<Self> {
        let answer = |queries: &Queries| respond(entry, tuned, recall, queries);
        let [inside, far, mix] = [answer(&recall.inside)?, answer(&recall.far)?, answer(&recall.mix)?];
        let wrong = |(i, choice): (usize, &Option<usize>)| {
            choice.unwrap_or(recall.inside.nearest[i]) != recall.inside.label[i]
        };
        let error: Vec<bool> = inside.choice.iter().enumerate().map(wrong).collect();
        let decision = |answers: &Responses| {
            let answered = |c: &f64| if *c == f64::NEG_INFINITY { *c } else { 1.0 };
            answers.confidence.iter().map(answered).collect::<Vec<f64>>()
        };
        let gate = Answers::new([&inside, &far, &mix].map(decision), &error);
        let abstentions = inside.choice.iter().filter(|choice| choice.is_none()).count();
        Ok(Self {
            one_value_share: inside.one_value_share(&recall.values)?,
            mean_squared_error: inside.mean_squared_error(&recall.inside, &recall.values)?,
            abstention: abstentions as f64 / recall.inside.len() as f64,
            graded: Answers::new([inside.confidence, far.confidence, mix.confidence], &error),
            gate,
        })
    }
}

/// The figures of banks, and their intervals by resampling banks and then queries.
fn graded<'a>(banks: &'a [Bank], answers: impl Fn(&'a Bank) -> &'a Answers + Sync, seed: u64) -> Graded {
    let figures = |c: Consistency| [c.auroc_far, c.auroc_mix, c.g, c.j, c.r, c.y];
    let mean = |all: &[[f64; 6]]| -> [f64; 6] {
        std::array::from_fn(|f| all.iter().map(|of| of[f]).sum::<f64>() / all.len() as f64)
    };
    let own = |bank| {
        let answers: &Answers = answers(bank);
        figures(answers.consistency(&vec![1; answers.error.len()]))
    };
    let means = mean(&banks.iter().map(own).collect::<Vec<_>>());
    let resample = |number: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(FIRST_STREAM + number as u64);
        let drawn = (0..banks.len()).map(|_| {
            let answers = answers(&banks[rng.random_range(0..banks.len())]);
            let count = answers.resample(&mut rng);
            figures(answers.consistency(&count))
        });
        mean(&drawn.collect::<Vec<_>>())
    };
    let resamples: Vec<[f64; 6]> = (0..RESAMPLES).into_par_iter().map(resample).collect();
    let interval = |f: usize| Interval::new(means[f], resamples.iter().map(|of| of[f]).collect());
    let over_banks = |of: fn(&Bank) -> f64| banks.iter().map(of).sum::<f64>() / banks.len() as f64;
    Graded {
        auroc_far: interval(0),
        auroc_mix: interval(1),
        g: interval(2),
        j: interval(3),
        r: interval(4),
        y: interval(5),
        colour_one_value: over_banks(|bank| bank.one_value_share),
        mse_in: over_banks(|bank| bank.mean_squared_error),
        abstain_in: over_banks(|bank| bank.abstention),
    }
}
