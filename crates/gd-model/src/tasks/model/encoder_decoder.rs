//! An encoder-decoder for the tasks that write a string again: attention from the states of a decoder to those of an encoder,
//! by the mechanisms that score encoder states.
//!
//! The state of a letter of the string is a projection of its embedding and of its distances from both ends, that of a
//! written letter a projection of the embedding of the letter before it and of its position. Luong and Bahdanau attention
//! return a mixture of encoder states, from which the next letter is read; the weights of pointer networks and of monotonic
//! attention are the probabilities of the letters to which they point.

use candle_core::{D, DType, Device, Module, Tensor};
use candle_nn::ops::log_softmax;
use candle_nn::{Embedding, Init, VarBuilder};
use gd_kernels::cross_entropy::IGNORE;
use gd_layer::mechanisms::{AttentionMechanism, Inputs};
use gd_layer::{Linear, Pass};

use super::TaskModel;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::tasks::Examples;

/// The mechanisms that score encoder states, by name.
pub const ENCODER_DECODERS: &[&str] = &["luong", "bahdanau", "pointer", "monotonic"];

/// Sines and cosines of a position.
const POSITION_FEATURES: usize = 32;
/// The greatest period of a sine of a position.
const LONGEST_PERIOD: f64 = 1e4;
/// The smallest probability of a letter to which no weight points.
const LEAST_PROBABILITY: f64 = 1e-6;

/// The model.
pub(super) struct EncoderDecoder {
    attention: AttentionMechanism,
    /// The learned parameters of the attention.
    learned: Inputs,
    letters: Embedding,
    source: Linear,
    query: Linear,
    output: Linear,
    vocabulary: usize,
}

/// A projection with bias.
fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    Ok(gd_layer::linear(inputs, outputs, true, false, vb)?)
}

impl EncoderDecoder {
    pub(super) fn new(attention: AttentionMechanism, config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let (c, vocabulary) = (config.hidden_size, config.vocab_size);
        let mut learned = Inputs::new();
        for &(name, _) in attention.info().learned {
            let deviation = (c as f64).sqrt().recip();
            let (shape, init): (&[usize], _) = match name {
                // The gain of the energies of monotonic attention: the norm of their vector is learned apart.
                "g" => (&[1], Init::Const(deviation.recip())),
                "r" => (&[1], Init::Const(0.0)),
                "b" => (&[c], Init::Const(0.0)),
                "vec" => (&[c], Init::Randn { mean: 0.0, stdev: 1.0 }),
                _ => (&[c, c], Init::Randn { mean: 0.0, stdev: deviation }),
            };
            learned.insert(name, vb.pp("attention").get_with_hints(shape, name, init)?);
        }
        let letters = Init::Randn { mean: 0.0, stdev: 1.0 };
        let letters = vb.get_with_hints((vocabulary, c), "letters", letters)?;
        Ok(Self {
            attention,
            learned,
            letters: Embedding::new(letters, c),
            source: linear(c + 2 * POSITION_FEATURES, c, vb.pp("source"))?,
            query: linear(c + POSITION_FEATURES, c, vb.pp("query"))?,
            output: linear(c, vocabulary, vb.pp("output"))?,
            vocabulary,
        })
    }

    /// The log-probabilities `[B, n, V]` of the n letters that are written after the string, given those before them.
    fn log_probabilities(&self, examples: &Examples, cut: bool) -> Result<Tensor> {
        let tokens = examples.inputs(self.letters.embeddings().device())?;
        let (b, length) = tokens.dims2()?;
        // The string ends before the first answer.
        let string = examples.answers.iter().position(|answer| *answer != IGNORE).unwrap_or(length);
        let written = length - string;
        let source = tokens.narrow(1, 0, string)?.contiguous()?;
        let device = tokens.device();
        let embedded = |tokens: &Tensor| self.letters.forward(tokens);
        let with = |x: Tensor, places: &[Tensor]| {
            let places =
                places.iter().map(|p| p.unsqueeze(0)?.broadcast_as((b, x.dim(1)?, POSITION_FEATURES)));
            let parts: Vec<Tensor> =
                [Ok(x.clone())].into_iter().chain(places).collect::<candle_core::Result<_>>()?;
            Tensor::cat(&parts, 2)
        };
        let from_start = sinusoids(0..string, device)?;
        let from_end = sinusoids((0..string).rev(), device)?;
        let states = self.source.forward(&with(embedded(&source)?, &[from_start, from_end])?)?;
        let before = embedded(&tokens.narrow(1, string, written)?.contiguous()?)?;
        let queries = self.query.forward(&with(before, &[sinusoids(0..written, device)?])?)?;
        let out = self.attend(&queries, &states)?;
        let out = if cut { out.zeros_like()? } else { out };
        if !self.is_distribution() {
            return Ok(log_softmax(&self.output.forward(&out)?, D::Minus1)?);
        }
        let letters = Tensor::arange(0u32, self.vocabulary as u32, device)?;
        let letters = source.unsqueeze(2)?.broadcast_eq(&letters)?.to_dtype(out.dtype())?;
        Ok((out.contiguous()?.matmul(&letters)? + LEAST_PROBABILITY)?.log()?)
    }

    /// Whether the output of the attention is its weights.
    fn is_distribution(&self) -> bool {
        ["pointer", "monotonic"].contains(&self.attention.name())
    }

    /// The output of the attention for queries `[B, n, C]` and states `[B, m, C]`.
    fn attend(&self, queries: &Tensor, states: &Tensor) -> Result<Tensor> {
        let [query, state] = if self.attention.name() == "pointer" { ["dec", "e"] } else { ["q", "k"] };
        let inputs = self.learned.clone().with(query, queries).with(state, states);
        Ok(self.attention.attend(&inputs)?.get("out")?.clone())
    }
}

impl TaskModel for EncoderDecoder {
    fn loss(&self, examples: &Examples, pass: &Pass) -> Result<Tensor> {
        let (log_p, answers) = self.answers(examples, pass)?;
        let answers = Tensor::new(answers, log_p.device())?.unsqueeze(1)?;
        Ok(log_p.gather(&answers, 1)?.mean_all()?.neg()?)
    }

    fn answers(&self, examples: &Examples, pass: &Pass) -> Result<(Tensor, Vec<u32>)> {
        let log_p = self.log_probabilities(examples, pass.cut_reads)?;
        let answers = examples.answers.iter().copied().filter(|answer| *answer != IGNORE);
        Ok((log_p.flatten_to(1)?, answers.collect()))
    }
}

/// Sines and cosines of positions `[n, POSITION_FEATURES]` with geometric periods.
fn sinusoids(positions: impl Iterator<Item = usize>, device: &Device) -> candle_core::Result<Tensor> {
    let half = POSITION_FEATURES / 2;
    let angle = |at: usize, i: usize| at as f64 / LONGEST_PERIOD.powf(i as f64 / half as f64);
    let features = |at: usize| (0..half).flat_map(move |i| [angle(at, i).sin(), angle(at, i).cos()]);
    let values: Vec<f64> = positions.flat_map(features).collect();
    let rows = values.len() / POSITION_FEATURES;
    Tensor::from_vec(values, (rows, POSITION_FEATURES), device)?.to_dtype(DType::F32)
}
