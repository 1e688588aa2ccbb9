//! What a mechanism answers to queries of the recall task, and with which confidence.

use candle_core::{D, DType, Tensor};

use super::entries::{Entry, Figure, Kind, Rule};
use super::quantile;
use super::recall::{Queries, Recall, chosen};
use super::weights::{FromScores, Weights, rows};
use crate::error::Result;

/// Softmax weights.
const SOFTMAX: FromScores = FromScores::Mechanism { configuration: r#"{"name":"softmax"}"#, learned: &[] };
/// One-hot weights on the greatest score.
pub(super) const HARD: FromScores =
    FromScores::Mechanism { configuration: r#"{"name":"hard"}"#, learned: &[] };
/// Inverse temperatures that are tried: a geometric sequence from 1 to 128.
const BETAS: usize = 57;
const GREATEST_BETA: f64 = 128.0;
/// An output within this share of the length of a value row counts as that row.
const ONE_VALUE_TOLERANCE: f64 = 0.1;

/// The answers to a group of queries.
#[derive(Debug, Clone)]
pub(super) struct Responses {
    /// `[Q, 16]`; 0 where the mechanism abstains.
    pub(super) out: Tensor,
    /// The key of the greatest weight; none where the mechanism abstains.
    pub(super) choice: Vec<Option<usize>>,
    /// Minus infinity where the mechanism abstains.
    pub(super) confidence: Vec<f64>,
}

/// The tuned parameters of a mechanism.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Tuned {
    /// Inverse temperature.
    pub(super) beta: f64,
    /// The threshold of its rule; minus infinity without one.
    pub(super) threshold: f64,
}

impl Responses {
    /// The answers by weights `[Q, n]` over values `[n, 16]`. The confidence is the greatest weight; a null weight that is
    /// greater means abstention.
    fn of_weights(weights: &Weights, values: &Tensor) -> Result<Self> {
        let greatest = weights.weights.max(D::Minus1)?;
        let answered = match &weights.null {
            Some(null) => null.le(&greatest)?,
            None => Tensor::ones(greatest.dims(), DType::U8, greatest.device())?,
        };
        let choice = weights.weights.argmax(D::Minus1)?.to_vec1::<u32>()?;
        Self::new(weights.weights.matmul(values)?, &answered, &choice, &greatest.to_vec1()?)
    }

    /// The answers with outputs `[Q, 16]`, where `answered` (u8 `[Q]`) is 1; the other outputs become 0.
    fn new(out: Tensor, answered: &Tensor, choice: &[u32], confidence: &[f64]) -> Result<Self> {
        let out = out.broadcast_mul(&answered.to_dtype(out.dtype())?.unsqueeze(1)?)?;
        let answered = answered.to_vec1::<u8>()?;
        let pairs = answered.iter().zip(choice).map(|(a, &j)| (*a == 1).then_some(j as usize));
        let confidence =
            answered.iter().zip(confidence).map(|(a, c)| if *a == 1 { *c } else { f64::NEG_INFINITY });
        Ok(Self { choice: pairs.collect(), confidence: confidence.collect(), out })
    }

    /// The mean squared error of the elements of the outputs, against the values of the keys that the queries belong to.
    pub(super) fn mean_squared_error(&self, queries: &Queries, values: &Tensor) -> Result<f64> {
        let difference = (&self.out - chosen(values, &queries.label)?)?;
        Ok(difference.sqr()?.mean_all()?.to_scalar::<f64>()?)
    }

    /// The share of the answers that are a single value row, within a tenth of its length.
    pub(super) fn one_value_share(&self, values: &Tensor) -> Result<f64> {
        let squared = |x: &Tensor| x.sqr()?.sum_keepdim(D::Minus1);
        let lengths = squared(values)?.t()?;
        let products = (self.out.matmul(&values.t()?)? * 2.0)?;
        let distances = squared(&self.out)?.broadcast_add(&lengths)?.broadcast_sub(&products)?;
        let near =
            distances.broadcast_le(&(lengths * ONE_VALUE_TOLERANCE.powi(2))?)?.max(1)?.to_vec1::<u8>()?;
        let answered = self.choice.iter().zip(&near).filter(|(choice, _)| choice.is_some());
        let (count, one) =
            answered.fold((0u32, 0u32), |(count, one), (_, near)| (count + 1, one + u32::from(*near)));
        Ok(f64::from(one) / f64::from(count))
    }
}

/// The inverse temperature, of those tried, with the least mean squared error on the tuning split; the least of several.
pub(super) fn tuned_beta(recall: &Recall, respond: impl Fn(f64) -> Result<Responses>) -> Result<f64> {
    let mut least = (f64::INFINITY, 1.0);
    for i in 0..BETAS {
        let beta = GREATEST_BETA.powf(i as f64 / (BETAS - 1) as f64);
        let error = respond(beta)?.mean_squared_error(&recall.tuning, &recall.values)?;
        if error < least.0 {
            least = (error, beta);
        }
    }
    Ok(least.1)
}

/// Tunes an entry on the tuning split; none for an entry that the task does not apply to.
pub(super) fn tune(entry: &Entry, recall: &Recall) -> Result<Option<Tuned>> {
    let free = |beta: f64| Tuned { beta, threshold: f64::NEG_INFINITY };
    let beta_of =
        |entry: &Entry| tuned_beta(recall, |beta| respond(entry, free(beta), recall, &recall.tuning));
    Ok(match entry.kind {
        Kind::ScoresOnly(_) => None,
        Kind::Scores(_) | Kind::Keys(_) => Some(free(beta_of(entry)?)),
        Kind::Reject(Rule { figure, share }) => {
            let softmax = |beta| scored(SOFTMAX, beta, recall, &recall.tuning);
            let beta = if figure == Figure::Chow { tuned_beta(recall, softmax)? } else { 1.0 };
            let mut figures = figure.of(&recall.tuning, beta)?;
            figures.sort_by(f64::total_cmp);
            Some(Tuned { beta, threshold: quantile(&figures, share) })
        }
        Kind::Selection(selection) => Some(selection.tune(recall)?),
    })
}

/// The answers of an entry to queries.
pub(super) fn respond(entry: &Entry, tuned: Tuned, recall: &Recall, queries: &Queries) -> Result<Responses> {
    match entry.kind {
        Kind::Scores(from) | Kind::ScoresOnly(from) => scored(from, tuned.beta, recall, queries),
        Kind::Keys(from) => {
            let weights =
                Weights { weights: from.weights(&queries.q, &recall.keys, tuned.beta)?, null: None };
            Responses::of_weights(&weights, &recall.values)
        }
        Kind::Reject(rule) => {
            let figures = rule.figure.of(queries, tuned.beta)?;
            let hard = scored(HARD, 1.0, recall, queries)?;
            hard.rejected_below(tuned.threshold, figures)
        }
        Kind::Selection(selection) => selection.respond(&queries.q, &recall.keys, &recall.values, tuned),
    }
}

fn scored(from: FromScores, beta: f64, recall: &Recall, queries: &Queries) -> Result<Responses> {
    let scores = (&queries.scores * beta)?;
    Responses::of_weights(&from.weights(&scores, &scores)?, &recall.values)
}

impl Responses {
    /// The same answers with other confidences, and none where they are less than the threshold.
    pub(super) fn rejected_below(self, threshold: f64, confidence: Vec<f64>) -> Result<Self> {
        let answered =
            self.choice.iter().zip(&confidence).map(|(choice, c)| choice.is_some() && *c >= threshold);
        let answered = Tensor::from_iter(answered.map(u8::from), self.out.device())?;
        let choice: Vec<u32> = self.choice.iter().map(|choice| choice.unwrap_or(0) as u32).collect();
        Self::new(self.out, &answered, &choice, &confidence)
    }

    /// The answers by outputs `[Q, 16]`, choices and confidences of selection attention, where a choice of -1 is none.
    pub(super) fn of_selection(out: Tensor, choice: &[i32], confidence: &[f64]) -> Result<Self> {
        let answered = Tensor::from_iter(choice.iter().map(|j| u8::from(*j >= 0)), out.device())?;
        let choice: Vec<u32> = choice.iter().map(|j| (*j).max(0) as u32).collect();
        Self::new(out, &answered, &choice, confidence)
    }
}

impl Figure {
    /// The figure of every query.
    fn of(self, queries: &Queries, beta: f64) -> Result<Vec<f64>> {
        let of_row = |scores: &Vec<f64>| {
            let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            match self {
                Self::Energy => greatest,
                Self::Chow => 1.0 / scores.iter().map(|s| (beta * (s - greatest)).exp()).sum::<f64>(),
                Self::Margin => {
                    let mut sorted = scores.clone();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    sorted[0] - sorted[1]
                }
            }
        };
        Ok(rows(&queries.scores)?.iter().map(of_row).collect())
    }
}
