//! The training loop.

use std::time::Instant;

use candle_core::{DType, Device};
use gd_kernels::Mask;
use gd_layer::Pass;
use serde::Serialize;

use crate::config::Recipe;
use crate::data::{Batches, Corpus};
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate};
use crate::loss::cross_entropy;
use crate::optimizer::{AdamW, accumulate, clip_scale, global_norm};
use crate::params::Params;
use crate::transformer::Transformer;

/// Validation windows of a look during training; the whole text is measured at the end.
const GLANCE: usize = 32;

/// What happened in a step.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total: u64,
    /// Training loss of the step, nats per token.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Share of the hard forward pass.
    pub hardness: f64,
    /// Training tokens per second since the start, looks at the validation text left out.
    pub tokens_per_second: f64,
    /// Seconds to the end of the run at this rate.
    pub seconds_left: f64,
    /// Loss on the first windows of the validation text, every `eval_every` steps and at the end.
    pub valid_loss: Option<f64>,
}

/// A model in training.
pub struct Trainer {
    recipe: Recipe,
    /// The model.
    pub model: Transformer,
    /// Its parameters.
    pub params: Params,
    optimizer: AdamW,
    batches: Batches,
    corpus: Corpus,
    device: Device,
    step: u64,
    seconds: f64,
}

impl Trainer {
    /// A new model, initialised from `seed`, which also orders the data.
    ///
    /// # Errors
    /// A text too short for one window, or a config that does not fit.
    pub fn new(recipe: Recipe, corpus: Corpus, seed: u64, device: &Device) -> Result<Self> {
        corpus.check(recipe.train.context)?;
        let params = Params::new(seed, DType::F32, device);
        let model = Transformer::new(&recipe.model, params.builder())?;
        let optimizer = AdamW::new(params.vars(), recipe.train.adamw)?;
        let batches = Batches::new(corpus.train.clone(), seed);
        Ok(Self {
            recipe,
            model,
            params,
            optimizer,
            batches,
            corpus,
            device: device.clone(),
            step: 0,
            seconds: 0.0,
        })
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.recipe.train.steps
    }

    /// Trains to the end of the run; `watch` sees every step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, or what `watch` returns.
    pub fn run(&mut self, mut watch: impl FnMut(&Step) -> Result<()>) -> Result<()> {
        while self.step < self.recipe.train.steps {
            let step = self.advance()?;
            watch(&step)?;
        }
        Ok(())
    }

    /// One step.
    ///
    /// # Errors
    /// A loss or gradient that is not finite.
    pub fn advance(&mut self) -> Result<Step> {
        let started = Instant::now();
        let train = &self.recipe.train;
        let (mask, vars) = (Mask::causal(0), self.params.vars());
        let hardness = train.hardness(self.step);
        let pass = Pass { hardness, ..Pass::new(&mask) };
        let (mut total, mut loss) = (None, 0f64);
        for micro in 0..train.accumulation as u64 {
            let at = self.step * train.accumulation as u64 + micro;
            let (inputs, targets) = self.batches.batch(at, train.batch, train.context, &self.device)?;
            let logits = self.model.forward(&inputs, &pass, None)?;
            let one = cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)?;
            loss += f64::from(one.to_dtype(DType::F32)?.to_scalar::<f32>()?) / train.accumulation as f64;
            let grads = one.backward()?;
            match &mut total {
                None => total = Some(grads),
                Some(total) => accumulate(&vars, total, &grads)?,
            }
        }
        let Some(grads) = total else { return Err(Error::Invalid("train.accumulation is 0".into())) };
        let mean = 1.0 / train.accumulation as f64;
        let grad_norm = global_norm(&vars, &grads)? * mean;
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Err(Error::Invalid(format!(
                "step {}: loss {loss} or gradient norm {grad_norm} is not finite",
                self.step + 1
            )));
        }
        let lr = train.lr.lr(self.step, train.steps);
        self.optimizer.step(&grads, lr, mean * clip_scale(grad_norm, train.clip)?)?;
        self.step += 1;
        self.seconds += started.elapsed().as_secs_f64();
        let tokens = self.step as f64 * (train.batch * train.context * train.accumulation) as f64;
        let look = self.step.is_multiple_of(train.eval_every) || self.step == train.steps;
        let valid_loss = if look { Some(self.glance()?) } else { None };
        Ok(Step {
            step: self.step,
            total: self.recipe.train.steps,
            loss,
            grad_norm,
            lr,
            hardness,
            tokens_per_second: tokens / self.seconds,
            seconds_left: self.seconds / self.step as f64 * (self.recipe.train.steps - self.step) as f64,
            valid_loss,
        })
    }

    fn glance(&self) -> Result<f64> {
        let context = self.recipe.train.context;
        let tokens = &self.corpus.valid[..self.corpus.valid.len().min(GLANCE * context + 1)];
        Ok(evaluate(&self.model, tokens, tokens.len(), context, self.recipe.train.batch, &self.device)?.loss)
    }

    /// The whole validation text.
    ///
    /// # Errors
    /// Whatever the forward pass reports.
    pub fn validate(&self) -> Result<Evaluation> {
        let train = &self.recipe.train;
        evaluate(
            &self.model,
            &self.corpus.valid,
            self.corpus.valid_bytes,
            train.context,
            train.batch,
            &self.device,
        )
    }
}
