//! Activation checkpointing: a training pass that stores only the inputs of the blocks and recomputes their activations.
//!
//! The forward pass records no graph. The backward pass goes from the last block to the first. It computes each block
//! again with a graph, from which it gets the gradients of the parameters and of the input. Only the graph of one block
//! exists at a time, at the cost of a second forward pass. The gradients have the same bits as without checkpointing.

use candle_core::backprop::GradStore;
use candle_core::{Module, Result, Tensor, Var};
use gd_layer::Pass;

use super::Transformer;

impl Transformer {
    /// The loss, which `head` computes from the hidden states `[B, N, C]` after the last norm, and its gradients for `vars`,
    /// the parameters of the model. The loss is a detached scalar. `frozen` is the same model over the same parameters
    /// without gradients.
    ///
    /// # Errors
    /// As [`Transformer::hidden`], or an error of `head`.
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
        // The last entry is the output of the last block, the input of the norm.
        let x = leaf(inputs.pop())?;
        let loss = head(&self.norm.forward(&x)?)?;
        let mut total = loss.backward()?;
        let mut incoming = take_gradient(&mut total, &x)?;
        drop(x);
        for block in self.blocks.iter().rev() {
            let x = leaf(inputs.pop())?;
            let mut grads = vector_jacobian(&block.forward(&x, pass, None)?, &incoming)?;
            incoming = take_gradient(&mut grads, &x)?;
            collect(vars, &mut total, grads)?;
        }
        collect(vars, &mut total, vector_jacobian(&self.embedded(ids)?, &incoming)?)?;
        Ok((loss.detach(), total))
    }
}

/// A variable with the value of `x`, for which the backward pass computes a gradient.
fn leaf(x: Option<Tensor>) -> Result<Var> {
    match x {
        Some(x) => Var::from_tensor(&x),
        None => candle_core::bail!("there are more blocks than inputs"),
    }
}

/// The vector-Jacobian product: the gradients of `sum(y * incoming)`, in which `incoming` is the gradient of `y`.
fn vector_jacobian(y: &Tensor, incoming: &Tensor) -> Result<GradStore> {
    (y * incoming)?.sum_all()?.backward()
}

/// Removes the gradient of `x` from the store.
fn take_gradient(grads: &mut GradStore, x: &Tensor) -> Result<Tensor> {
    match grads.remove(x) {
        Some(grad) => Ok(grad.detach()),
        None => candle_core::bail!("a block has no gradient for its input"),
    }
}

/// Adds the gradients of `vars` in `segment` to `total`. A tied embedding has gradients in two segments.
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
