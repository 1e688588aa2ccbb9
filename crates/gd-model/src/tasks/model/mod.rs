//! The models of tasks: decoders with the mechanisms of layers, and encoder-decoders with those that score the states of an
//! encoder.

mod decoder;
mod encoder_decoder;

use candle_core::Tensor;
use candle_nn::VarBuilder;
use gd_kernels::Mask;
use gd_layer::Pass;

use self::decoder::Decoder;
pub use self::encoder_decoder::ENCODER_DECODERS;
use self::encoder_decoder::EncoderDecoder;
use super::{Contender, Examples, TASKS, Task};
use crate::error::{Error, Result};
use crate::model::params::Params;

/// A model that answers the examples of a task.
pub(super) trait TaskModel {
    /// The mean loss of the answers, with gradients.
    fn loss(&self, examples: &Examples, pass: &Pass) -> Result<Tensor>;

    /// The logits or log-probabilities of the answers `[A, V]`, and the correct ones.
    fn answers(&self, examples: &Examples, pass: &Pass) -> Result<(Tensor, Vec<u32>)>;

    /// Sets what depends on a first batch.
    fn calibrate(&self, _examples: &Examples, _params: &Params) -> Result<()> {
        Ok(())
    }

    /// The mean gate of the heads that select; none without such heads.
    fn gate(&self, _examples: &Examples) -> Result<Option<f64>> {
        Ok(None)
    }
}

/// The model of a contender for a task.
///
/// # Errors
/// A configuration that contradicts itself, or an encoder-decoder for a task that has no string to read.
pub(super) fn task_model(
    task: &dyn Task,
    contender: &Contender,
    vb: VarBuilder,
) -> Result<Box<dyn TaskModel>> {
    let config = &contender.recipe.model;
    Ok(match contender.encoder_attention()? {
        None => Box::new(Decoder::new(config, task.features(), vb)?),
        Some(_) if !task.writes_a_string() => return Err(no_string(task, contender)),
        Some(attention) => Box::new(EncoderDecoder::new(attention, config, vb)?),
    })
}

/// The error of an encoder-decoder for a task without a string to read.
fn no_string(task: &dyn Task, contender: &Contender) -> Error {
    let others = TASKS.iter().filter(|task| task.writes_a_string()).map(|task| task.name());
    Error::Invalid(format!(
        "{} scores the states of an encoder, which {} does not have; {} have one",
        contender.name,
        task.name(),
        others.collect::<Vec<_>>().join(", ")
    ))
}

/// The sum of the losses of the answers, the number of correct ones, and the number of all.
pub(super) fn test(model: &dyn TaskModel, examples: &Examples, pass: &Pass) -> Result<(f64, usize, usize)> {
    let (logits, answers) = model.answers(examples, pass)?;
    let count = answers.len();
    let predicted = logits.argmax(1)?.to_vec1::<u32>()?;
    let correct = predicted.iter().zip(&answers).filter(|(a, b)| a == b).count();
    let answers = Tensor::new(answers, logits.device())?;
    let loss = candle_nn::loss::cross_entropy(&logits, &answers)?.to_scalar::<f32>()?;
    Ok((f64::from(loss) * count as f64, correct, count))
}

/// The causal mask of examples.
pub(super) fn mask() -> Mask {
    Mask::causal(0)
}
