//! Prediction with rejection: Chow's rule, the loss of SelectiveNet, and how well a confidence orders predictions.

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};

/// The decisions of [`chow`].
#[derive(Debug, Clone)]
pub struct ChowDecisions {
    /// 1 where the prediction is rejected, u8 `[n]`.
    pub reject: Tensor,
    /// The class of greatest probability, i64 `[n]`.
    pub predicted: Tensor,
}

/// Chow's rule (1970): of probabilities `[n, C]`, rejects a prediction if its probability is less than `1 - cost`, where a
/// rejection costs `cost` and an error 1.
///
/// # Errors
/// A cost outside 0..=1, or probabilities of another rank.
pub fn chow(probabilities: &Tensor, cost: f64) -> Result<ChowDecisions> {
    if !(0.0..=1.0).contains(&cost) {
        return Err(Error::out_of_range("cost", cost.to_string(), "in [0, 1]"));
    }
    probabilities.dims2()?;
    Ok(ChowDecisions {
        reject: probabilities.max(1)?.lt(1.0 - cost)?,
        predicted: probabilities.argmax(1)?.to_dtype(DType::I64)?,
    })
}

/// The options of [`selectivenet_loss`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SelectiveNet {
    /// The coverage that is asked for, c.
    pub coverage: f64,
    /// The weight of a missing coverage, lambda.
    pub penalty: f64,
    /// The share of the selective loss, alpha; the rest is the auxiliary loss.
    pub alpha: f64,
}

impl Default for SelectiveNet {
    /// The values of the paper, with a coverage of 0.7.
    fn default() -> Self {
        Self { coverage: 0.7, penalty: 32.0, alpha: 0.5 }
    }
}

/// The result of [`selectivenet_loss`], scalars.
#[derive(Debug, Clone)]
pub struct SelectiveLoss {
    /// The loss L.
    pub loss: Tensor,
    /// The coverage phi, the mean of the gate.
    pub coverage: Tensor,
    /// The selective risk, `mean(loss * gate) / phi`.
    pub risk: Tensor,
}

/// The loss of SelectiveNet (Geifman and El-Yaniv 2019, arXiv 1901.09192), differentiable:
/// `L = alpha (mean(loss * gate) / phi + lambda max(0, c - phi)^2) + (1 - alpha) mean(auxiliary)` with `phi = mean(gate)`.
///
/// `loss`, `auxiliary` and `gate` (in (0, 1)) are `[n]`, one entry an example.
///
/// # Errors
/// Shapes that differ.
pub fn selectivenet_loss(
    loss: &Tensor,
    auxiliary: &Tensor,
    gate: &Tensor,
    options: SelectiveNet,
) -> Result<SelectiveLoss> {
    let SelectiveNet { coverage: asked, penalty, alpha } = options;
    let coverage = gate.mean_all()?;
    let risk = ((loss * gate)?.mean_all()? / &coverage)?;
    let missing = ((&coverage * -1.0)? + asked)?.relu()?.sqr()?;
    let selective = (&risk + (missing * penalty)?)?;
    let loss = ((selective * alpha)? + (auxiliary.mean_all()? * (1.0 - alpha))?)?;
    Ok(SelectiveLoss { loss, coverage, risk })
}

/// Predictions in the order of falling confidence. With it, the figures of many resamples of the same predictions need no
/// further sorting: each prediction counts as often as a resample has it.
#[derive(Debug, Clone)]
pub struct Ranking {
    /// The numbers of the predictions.
    order: Vec<usize>,
    /// The ends in `order` of the runs of equal confidence.
    ends: Vec<usize>,
}

impl Ranking {
    /// The ranking of predictions with these confidences, which are not NaN.
    pub fn new(confidence: &[f64]) -> Self {
        let mut order: Vec<usize> = (0..confidence.len()).collect();
        order.sort_by(|&a, &b| confidence[b].total_cmp(&confidence[a]));
        let differs = |i: &usize| *i == order.len() || confidence[order[*i - 1]] != confidence[order[*i]];
        let ends = (1..=order.len()).filter(differs).collect();
        Self { order, ends }
    }

    /// The runs of equal confidence, the greatest first.
    fn ties(&self) -> impl Iterator<Item = &[usize]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.order[start..end])
    }

    /// The area under the risk-coverage curve: the mean over i of the error rate of the i most confident predictions. Among
    /// equal confidences, every prediction counts the mean error of all. `count` says how often each prediction occurs.
    pub fn aurc(&self, error: &[bool], count: &[u32]) -> f64 {
        let (mut errors, mut before, mut sum) = (0.0, 0u64, 0.0);
        for tie in self.ties() {
            let size: u64 = tie.iter().map(|&i| u64::from(count[i])).sum();
            let wrong: u64 = tie.iter().filter(|&&i| error[i]).map(|&i| u64::from(count[i])).sum();
            let rate = wrong as f64 / size.max(1) as f64;
            sum += (1..=size).map(|t| (errors + t as f64 * rate) / (before + t) as f64).sum::<f64>();
            errors += wrong as f64;
            before += size;
        }
        sum / before as f64
    }

    /// The probability that a prediction with `positive` has a greater confidence than one with `negative`; equal
    /// confidences count half. `count` says how often each prediction occurs.
    pub fn auroc(
        &self,
        positive: impl Fn(usize) -> bool,
        negative: impl Fn(usize) -> bool,
        count: &[u32],
    ) -> f64 {
        let (mut above, mut positives, mut negatives) = (0.0, 0.0, 0.0);
        for tie in self.ties() {
            let of = |is: &dyn Fn(usize) -> bool| -> f64 {
                tie.iter().filter(|&&i| is(i)).map(|&i| f64::from(count[i])).sum()
            };
            let (p, n) = (of(&positive), of(&negative));
            above += n * (positives + 0.5 * p);
            positives += p;
            negatives += n;
        }
        above / (positives * negatives)
    }
}

/// The area under the risk-coverage curve of predictions; see [`Ranking::aurc`].
///
/// # Errors
/// Lists of different lengths, no predictions, or a confidence that is NaN.
pub fn aurc(confidence: &[f64], error: &[bool]) -> Result<f64> {
    let (predictions, errors) = (confidence.len(), error.len());
    if predictions != errors || predictions == 0 || confidence.iter().any(|c| c.is_nan()) {
        return Err(Error::Invalid(format!(
            "{predictions} confidences and {errors} errors: as many of both, at least 1 and no NaN, are needed"
        )));
    }
    Ok(Ranking::new(confidence).aurc(error, &vec![1; predictions]))
}

/// The least area under the risk-coverage curve of `total` predictions of which `errors` are wrong: that of an order with
/// the errors last.
pub fn least_aurc(errors: u64, total: u64) -> f64 {
    let correct = total - errors;
    (correct + 1..=total).map(|i| (i - correct) as f64 / i as f64).sum::<f64>() / total as f64
}
