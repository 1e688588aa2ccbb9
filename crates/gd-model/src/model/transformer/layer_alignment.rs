//! Layer alignment: each layer learns alone to give the attention output of the same layer of a teacher.
//!
//! The attention of every layer gets the input of that layer in the teacher, so that the layers do not depend on each
//! other. The teacher needs one forward pass, the student only its attention. Only the graph of one layer exists at a
//! time.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use gd_layer::Pass;

use super::Transformer;
use super::checkpointed::collect;

impl Transformer {
    /// The mean squared error of the attention outputs of `layers` against those of `teacher`, each relative to the mean
    /// square of the output of the teacher, averaged over the layers and multiplied by `weight`; and the gradients of this
    /// loss for `vars`, the parameters of this model. The loss is a detached scalar. `pass` applies to this model; the
    /// teacher, which has as many layers of the same width, runs without gradients and with its own settings.
    ///
    /// # Errors
    /// No layer, a layer that a model lacks, or an error as in [`Transformer::forward`].
    pub fn layer_alignment(
        &self,
        teacher: &Self,
        vars: &[(String, Var)],
        layers: &[usize],
        ids: &Tensor,
        pass: &Pass,
        weight: f64,
    ) -> Result<(Tensor, GradStore)> {
        let count = self.blocks.len();
        if layers.is_empty() || layers.iter().any(|&i| i >= count) || teacher.blocks.len() != count {
            bail!("layers {layers:?} of {count} cannot be aligned with those of {}", teacher.blocks.len());
        }
        let mut sum: Option<(Tensor, GradStore)> = None;
        let mut x = teacher.embedded(ids)?.detach();
        for (i, (block, teacher)) in self.blocks.iter().zip(&teacher.blocks).enumerate() {
            let target = teacher.attend(&x, &Pass::new(pass.mask), None)?.detach();
            if layers.contains(&i) {
                let mean_square = target.sqr()?.mean_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let mean_square = mean_square.to_scalar::<f64>()?;
                let scale = weight / layers.len() as f64 / mean_square.max(f64::MIN_POSITIVE);
                let loss = ((block.attend(&x, pass, None)? - &target)?.sqr()?.mean_all()? * scale)?;
                let grads = loss.backward()?;
                sum = Some(match sum {
                    None => (loss.detach(), grads),
                    Some((sum, mut total)) => {
                        collect(vars, &mut total, grads)?;
                        ((sum + loss.detach())?, total)
                    }
                });
            }
            x = teacher.add(&x, &target)?.detach();
        }
        match sum {
            Some(sum) => Ok(sum),
            None => bail!("no layer of {layers:?} was aligned"),
        }
    }
}
