//! Alignment: layers learn, each for itself, what the same layers of another model read.
//!
//! Every layer's attention gets the other model's input of that layer and is to give its output, so that the
//! layers do not depend on each other: one forward pass of the other model, and of this one the attention alone,
//! one layer's graph at a time.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use gd_layer::Pass;

use super::Transformer;
use super::checkpointed::collect;

impl Transformer {
    /// The mean over `layers` of the squared error of what their attention reads, relative to the mean square of
    /// what `other`'s reads (detached), times `weight`, and the gradients of that product for `vars`, which are
    /// this model's parameters. `pass` is this model's; `other`, of the same layers and width, runs without
    /// gradients and selects in full.
    ///
    /// # Errors
    /// No layer, or one that a model lacks; as [`Transformer::forward`].
    pub fn layer_alignment(
        &self,
        other: &Self,
        vars: &[(String, Var)],
        layers: &[usize],
        ids: &Tensor,
        pass: &Pass,
        weight: f64,
    ) -> Result<(Tensor, GradStore)> {
        let count = self.blocks.len();
        if layers.is_empty() || layers.iter().any(|&i| i >= count) || other.blocks.len() != count {
            bail!("layers {layers:?} of {count} are to learn from those of {}", other.blocks.len());
        }
        let mut sum: Option<(Tensor, GradStore)> = None;
        let mut x = other.embedded(ids)?.detach();
        for (i, (block, other)) in self.blocks.iter().zip(&other.blocks).enumerate() {
            let read = other.read(&x, &Pass::new(pass.mask), None)?.detach();
            if layers.contains(&i) {
                let size = read.sqr()?.mean_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let size = size.to_scalar::<f64>()?;
                let scale = weight / layers.len() as f64 / size.max(f64::MIN_POSITIVE);
                let loss = ((block.read(&x, pass, None)? - &read)?.sqr()?.mean_all()? * scale)?;
                let grads = loss.backward()?;
                sum = Some(match sum {
                    None => (loss.detach(), grads),
                    Some((sum, mut total)) => {
                        collect(vars, &mut total, grads)?;
                        ((sum + loss.detach())?, total)
                    }
                });
            }
            x = other.add(&x, &read)?.detach();
        }
        match sum {
            Some(sum) => Ok(sum),
            None => bail!("no layer of {layers:?} learned"),
        }
    }
}
