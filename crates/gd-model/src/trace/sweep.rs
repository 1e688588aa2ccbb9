//! The effects of one kind of intervention on every head in turn, at the last position of a prompt.

use candle_core::{D, Device, Tensor};
use candle_nn::ops::log_softmax;
use serde::Serialize;

use super::effect::{divergence, total_variation};
use super::header::Header;
use super::intervention::{Act, Intervention, Query};
use super::recorder::{Reads, Recorder};
use super::run::SequenceReader;
use crate::error::Result;
use crate::infer::generate::check_prompt;
use crate::model::pretrained::Loaded;

/// What is done to every head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SweepAct {
    /// The head selects as if the position that it reads were not visible.
    Ban,
    /// The head abstains.
    Ablate,
}

/// The effects on the token after a prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sweep {
    /// What was done to every head.
    pub act: SweepAct,
    /// The position at which it was done, the last one of the prompt.
    pub query: usize,
    /// The most probable token after the prompt.
    pub likeliest: String,
    /// Its probability.
    pub probability: f64,
    /// One entry for each head of every selecting layer, layer by layer.
    pub heads: Vec<HeadEffect>,
}

/// The effect of the intervention on one head.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadEffect {
    /// The layer.
    pub layer: usize,
    /// The query head.
    pub head: usize,
    /// The position that the head reads without the intervention; -1 if it abstains.
    pub before: i32,
    /// The position that it reads with the intervention; -1 if it abstains.
    pub after: i32,
    /// The Kullback-Leibler divergence in nats of the distributions of the next token without and with the intervention.
    pub kl: f64,
    /// The total variation distance of the two distributions.
    pub total_variation: f64,
    /// The probability, with the intervention, of the token that is the most probable one without.
    pub probability: f64,
    /// The token that is the most probable one instead, if it is another one.
    pub likeliest: Option<String>,
}

/// Bans what every head reads at the last position of `prompt`, or lets the head abstain, one head at a time. The positions
/// before the last one are processed once. A head that abstains already is not changed. `header` is that of the prompt without
/// interventions.
///
/// # Errors
/// As [`super::record()`].
pub fn sweep(
    loaded: &Loaded,
    header: &Header,
    prompt: &[u32],
    act: SweepAct,
    device: &Device,
) -> Result<Sweep> {
    check_prompt(&loaded.model, prompt)?;
    let (last, earlier) = (prompt.len() - 1, &prompt[..prompt.len() - 1]);
    let mut reader = SequenceReader::new(&loaded.model, device);
    if !earlier.is_empty() {
        reader.read(earlier, &Recorder::new(header))?;
    }
    let read = |header: &Header| -> Result<(Vec<f64>, Reads)> {
        let recorder = Recorder::continuing(header, last);
        let (logits, mut reads) = reader.clone().read(&prompt[last..], &recorder)?;
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        let log_p = log_softmax(&Tensor::new(logits, &Device::Cpu)?, D::Minus1)?.to_vec1()?;
        Ok((log_p, reads.swap_remove(0)))
    };
    let (plain, reads) = read(header)?;
    let likeliest = greatest(&plain);
    let text = |token: usize| loaded.tokenizer.decode(&[token as u32]);
    let mut heads = Vec::new();
    let places = header.selecting().flat_map(|layer| (0..layer.heads).map(|head| (layer.layer, head)));
    for (row, (layer, head)) in places.enumerate() {
        let before = reads.rows[row].selected;
        let act = match (act, usize::try_from(before)) {
            (SweepAct::Ban, Ok(key)) => Some(Act::Ban(key)),
            (SweepAct::Ablate, Ok(_)) => Some(Act::Ablate),
            (_, Err(_)) => None,
        };
        let (changed, after) = match act {
            None => (plain.clone(), before),
            Some(act) => {
                let interventions = vec![Intervention { act, layer, head, query: Query::At(last) }];
                let (changed, reads) = read(&Header { interventions, ..header.clone() })?;
                (changed, reads.rows[row].selected)
            }
        };
        let now = greatest(&changed);
        heads.push(HeadEffect {
            layer,
            head,
            before,
            after,
            kl: divergence(&plain, &changed),
            total_variation: total_variation(&plain, &changed),
            probability: changed[likeliest].exp(),
            likeliest: (now != likeliest).then(|| text(now)).transpose()?,
        });
    }
    Ok(Sweep { act, query: last, likeliest: text(likeliest)?, probability: plain[likeliest].exp(), heads })
}

/// The index of the greatest number, the first of equal ones.
fn greatest(numbers: &[f64]) -> usize {
    (1..numbers.len()).fold(0, |greatest, at| if numbers[at] > numbers[greatest] { at } else { greatest })
}
