//! The teacher of uptraining: the model that a model with another attention mechanism learns from.
//!
//! At first every changed layer learns to give the output of the teacher's layer for the teacher's input
//! ([`Transformer::layer_alignment`]). Then the whole model learns the text and the logits of the teacher
//! ([`linear_distillation`]), while the number of candidates falls
//! ([`uptrain_schedule`](crate::config::uptrain_schedule)).

use candle_core::{DType, Device, Tensor};
use gd_kernels::cross_entropy::linear_distillation;
use gd_layer::Pass;

use crate::config::{Mechanism, ModelConfig};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::model::pretrained::{Loaded, Parts};
use crate::train::trainer::Inherited;

/// The teacher of a run. It is not trained.
pub struct Teacher {
    model: Transformer,
    hash: blake3::Hash,
    /// The layers whose attention differs from that of the student.
    changed: Vec<usize>,
    inherited: Inherited,
}

impl Teacher {
    /// The teacher of a model of the configuration `student`. It computes in `dtype`, as the student does.
    ///
    /// # Errors
    /// Another number of layers, width or vocabulary than the student's, the same attention in every layer, or a model
    /// that cannot be built.
    pub fn new(parts: Parts, student: &ModelConfig, dtype: DType, device: &Device) -> Result<Self> {
        let sizes = |c: &ModelConfig| (c.num_hidden_layers, c.hidden_size, c.vocab_size);
        let (own, taught) = (sizes(&parts.config), sizes(student));
        if own != taught {
            return Err(Error::Invalid(format!(
                "a model of (layers, width, vocabulary) {taught:?} cannot learn from a teacher of {own:?}"
            )));
        }
        let Loaded { model, params, generation, files, .. } = parts.build_in(dtype, device)?;
        let differs = |&i: &usize| {
            let (own, taught) = (model.config().mechanism(i), student.mechanism(i));
            own != taught || (*taught == Mechanism::Gd && student.attention(i) != model.config().attention(i))
        };
        let changed: Vec<usize> = (0..student.num_hidden_layers).filter(differs).collect();
        if changed.is_empty() {
            return Err(Error::Invalid(
                "no layer differs from that of the teacher, so there is nothing to learn".into(),
            ));
        }
        let inherited = Inherited { generation, files };
        Ok(Self { model, hash: params.hash()?, changed, inherited })
    }

    /// The hash of its weights.
    pub fn hash(&self) -> blake3::Hash {
        self.hash
    }

    /// What the student takes over.
    pub fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// The model.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// The layers whose attention differs from that of the student.
    pub fn changed(&self) -> &[usize] {
        &self.changed
    }

    /// The loss of the student from its hidden states `[B, N, C]`: the cross entropy of `targets` plus `kl` times the
    /// divergence from the logits of the teacher for `ids`, both u32 `[B, N]`.
    ///
    /// # Errors
    /// As [`linear_distillation`].
    pub fn loss(
        &self,
        student: &Transformer,
        hidden: &Tensor,
        (ids, targets): (&Tensor, &Tensor),
        pass: &Pass,
        kl: f64,
    ) -> candle_core::Result<Tensor> {
        let own = self.model.hidden(ids, &Pass::new(pass.mask), None)?.flatten_to(1)?;
        let taught = (&hidden.flatten_to(1)?, &student.head_weight()?);
        Ok(linear_distillation(taught, &targets.flatten_all()?, (&own, &self.model.head_weight()?), kl)?)
    }
}
