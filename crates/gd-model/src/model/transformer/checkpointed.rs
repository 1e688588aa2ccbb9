//! Activation checkpointing: a training pass that keeps the inputs of the blocks instead of their inside.
//!
//! The forward pass runs without a graph. The backward pass goes from the last block to the first, computes
//! each one again with a graph, and hands the gradient of its input on. At any time one block's graph exists;
//! the price is a second forward pass. Gradients are those of the plain pass, to the bit.

use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Tensor, Var};
use gd_layer::Pass;

use super::Transformer;

impl Transformer {
    /// What `head` makes of the hidden states behind the last norm, a scalar (returned detached), and its
    /// gradients for `vars`, which are the model's parameters. `frozen` is the same model over the same
    /// parameters without gradients.
    ///
    /// # Errors
    /// As [`Transformer::hidden`], or what `head` reports.
    pub fn checkpointed(
        &self,
        frozen: &Self,
        vars: &[(String, Var)],
        ids: &Tensor,
        pass: &Pass,
        head: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, GradStore)> {
        let mut inputs = vec![frozen.embedded(ids)?];
        for block in &frozen.blocks {
            let x = block.forward(&inputs[inputs.len() - 1], pass, None)?;
            inputs.push(x);
        }
        // The last input is that of the head.
        let x = leaf(inputs.pop())?;
        let loss = head(&self.norm.forward(&x)?)?;
        let mut total = loss.backward()?;
        let mut incoming = taken(&mut total, &x)?;
        drop(x);
        for block in self.blocks.iter().rev() {
            let x = leaf(inputs.pop())?;
            let mut grads = pull(&block.forward(&x, pass, None)?, &incoming)?;
            incoming = taken(&mut grads, &x)?;
            collect(vars, &mut total, grads)?;
        }
        collect(vars, &mut total, pull(&self.embedded(ids)?, &incoming)?)?;
        Ok((loss.detach(), total))
    }
}

/// A tensor that gets a gradient.
fn leaf(x: Option<Tensor>) -> Result<Var> {
    match x {
        Some(x) => Var::from_tensor(&x),
        None => candle_core::bail!("more blocks than inputs"),
    }
}

/// The gradients behind `y`, whose own gradient is `incoming`: those of `sum(y * incoming)`, in which
/// `incoming` is multiplied by ones.
fn pull(y: &Tensor, incoming: &Tensor) -> Result<GradStore> {
    (y * incoming)?.sum_all()?.backward()
}

fn taken(grads: &mut GradStore, x: &Tensor) -> Result<Tensor> {
    match grads.remove(x) {
        Some(grad) => Ok(grad.detach()),
        None => candle_core::bail!("a block that does not depend on its input"),
    }
}

/// Moves the parameters' gradients of a segment to the others; a tied embedding has two.
pub(super) fn collect(vars: &[(String, Var)], total: &mut GradStore, mut segment: GradStore) -> Result<()> {
    for (_, var) in vars {
        let Some(grad) = segment.remove(var) else { continue };
        let grad = match total.remove(var) {
            Some(sum) => (sum + grad)?.detach(),
            None => grad,
        };
        total.insert(var, grad);
    }
    Ok(())
}
