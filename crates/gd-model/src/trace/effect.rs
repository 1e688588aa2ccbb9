//! The effect of interventions on the predictions of a model.

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use gd_kernels::Mask;
use gd_layer::Pass;
use serde::Serialize;

use super::header::Header;
use super::intervention::{Intervention, Query};
use super::recorder::{Reads, Recorder};
use crate::error::Result;
use crate::infer::generate::check_prompt;
use crate::model::pretrained::Loaded;

/// The number of most probable tokens that are listed, before and after each.
const TOP_TOKENS: usize = 8;

/// The maximal number of logits in memory at a time.
const MAX_LOGITS: usize = 1 << 22;

/// The effect of interventions on the processing of a prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Effect {
    /// The Kullback-Leibler divergence `sum p ln(p / p')` in nats of the distributions of the token after the prompt, `p`
    /// without and `p'` with the interventions.
    pub kl: f64,
    /// The total variation distance of the two distributions, `sum |p - p'| / 2`.
    pub total_variation: f64,
    /// The mean Kullback-Leibler divergence in nats over the positions from `first` on.
    pub mean_kl: f64,
    /// The first position that an intervention changes.
    pub first: usize,
    /// The most probable tokens after the prompt, without or with the interventions.
    pub tokens: Vec<Change>,
    /// The selections of the heads and queries that the interventions name.
    pub picks: Vec<Pick>,
    /// The number of changed selections in all layers, heads and positions, except those in `picks`.
    pub others: u64,
    /// The number of all selections.
    pub selections: u64,
}

/// The probability of a token after the prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// The token id.
    pub token: u32,
    /// The text of the token.
    pub text: String,
    /// The probability without the interventions.
    pub before: f64,
    /// The probability with the interventions.
    pub after: f64,
}

/// The selection of a head for a query.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Pick {
    /// The layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// The position of the query.
    pub query: usize,
    /// The position that is read without the interventions; -1 if the head abstains.
    pub before: i32,
    /// The position that is read with the interventions; -1 if the head abstains.
    pub after: i32,
}

/// Processes `prompt` with and without the interventions of `header` and compares the results.
///
/// # Errors
/// As [`super::record()`].
pub fn effect(loaded: &Loaded, header: &Header, prompt: &[u32], device: &Device) -> Result<Effect> {
    check_prompt(&loaded.model, prompt)?;
    super::intervention::check(&header.interventions, &header.layers, prompt.len())?;
    let plain = Header { interventions: Vec::new(), ..header.clone() };
    let read = |header: &Header| -> Result<(Tensor, Vec<Reads>)> {
        let (mask, recorder) = (Mask::causal(0), Recorder::new(header));
        let ids = Tensor::new(prompt, device)?.unsqueeze(0)?;
        let pass = Pass { probe: Some(&recorder), ..Pass::new(&mask) };
        let hidden = loaded.model.hidden(&ids, &pass, None)?.squeeze(0)?;
        Ok((hidden, recorder.take(prompt.len())?))
    };
    let ((before, reads), (after, changed)) = (read(&plain)?, read(header)?);
    let first = |i: &Intervention| match i.query {
        Query::At(query) => query,
        Query::All => 0,
        Query::Last => prompt.len() - 1,
    };
    let first = header.interventions.iter().map(first).min().unwrap_or(0);
    let log_p = |hidden: &Tensor, start: usize, n: usize| -> candle_core::Result<Vec<Vec<f64>>> {
        let logits = loaded.model.logits(&hidden.narrow(0, start, n)?.unsqueeze(0)?)?.squeeze(0)?;
        // On the CPU, because Metal has no f64.
        log_softmax(&logits.to_device(&Device::Cpu)?.to_dtype(DType::F64)?, 1)?.to_vec2()
    };
    let step = (MAX_LOGITS / loaded.model.config().vocab_size).max(1);
    let (mut sum, mut last) = (0.0, (Vec::new(), Vec::new()));
    for start in (first..prompt.len()).step_by(step) {
        let n = step.min(prompt.len() - start);
        for (p, q) in log_p(&before, start, n)?.into_iter().zip(log_p(&after, start, n)?) {
            sum += divergence(&p, &q);
            last = (p, q);
        }
    }
    let (p, q) = last;
    let (mut picks, mut others, mut selections) = (Vec::new(), 0, 0);
    for (query, (rows, changed)) in reads.iter().zip(&changed).enumerate() {
        let heads = header.selecting().flat_map(|layer| (0..layer.heads).map(|h| (layer.layer, h)));
        for ((layer, head), (row, now)) in heads.zip(rows.rows.iter().zip(&changed.rows)) {
            selections += 1;
            let (before, after) = (row.selected, now.selected);
            if header.interventions.iter().any(|i| i.applies(layer, head, query)) {
                picks.push(Pick { layer, head, query, before, after });
            } else if before != after {
                others += 1;
            }
        }
    }
    Ok(Effect {
        kl: divergence(&p, &q),
        total_variation: total_variation(&p, &q),
        mean_kl: sum / (prompt.len() - first) as f64,
        first,
        tokens: tokens(loaded, &p, &q)?,
        picks,
        others,
        selections,
    })
}

impl Effect {
    /// Whether neither a selection nor the distribution of the next token is another one.
    pub fn is_none(&self) -> bool {
        let same = self.picks.iter().all(|pick| pick.before == pick.after);
        same && self.others == 0 && self.kl == 0.0 && self.mean_kl == 0.0
    }
}

/// The total variation distance of distributions given by their log-probabilities.
pub(super) fn total_variation(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| (p.exp() - q.exp()).abs()).sum::<f64>() / 2.0
}

/// The Kullback-Leibler divergence `sum p ln(p / q)` of distributions given by their log-probabilities.
pub(super) fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).filter(|(p, _)| p.is_finite()).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

/// The most probable tokens of both distributions, given by their log-probabilities, in descending order of `p`.
fn tokens(loaded: &Loaded, p: &[f64], q: &[f64]) -> Result<Vec<Change>> {
    let mut listed = Vec::new();
    for row in [p, q] {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        listed.extend(order.into_iter().take(TOP_TOKENS));
    }
    listed.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    listed.dedup();
    let change = |token: usize| {
        let text = loaded.tokenizer.decode(&[token as u32])?;
        Ok(Change { token: token as u32, text, before: p[token].exp(), after: q[token].exp() })
    };
    listed.into_iter().map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_of_two_distributions_follows_its_formula() {
        let logs = |p: &[f64]| p.iter().map(|p| p.ln()).collect::<Vec<_>>();
        let actual = divergence(&logs(&[0.5, 0.5, 0.0]), &logs(&[0.25, 0.5, 0.25]));
        assert!((actual - 0.5 * 2f64.ln()).abs() < 1e-12, "{actual}");
        assert_eq!(divergence(&logs(&[0.3, 0.7]), &logs(&[0.3, 0.7])), 0.0);
    }
}
