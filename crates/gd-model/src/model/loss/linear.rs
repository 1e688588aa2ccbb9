//! Output projection and cross entropy in one: the logits of all rows never exist together.
//!
//! Rows go through in chunks. Each chunk's logits become its loss and their own gradient at once, and from
//! that the gradients of hidden states and weights, so that the backward pass has nothing left to do but to
//! scale them. Compared with computing the logits again there, this saves one of four products and holds
//! the weights' gradient a little earlier.

use candle_core::{DType, Result, Shape, Tensor, bail};
use gd_kernels::element::{Element, Real};
use gd_kernels::fused::{attach2, with_contiguous_rows};
use gd_kernels::{by_float, on_cpu};

use super::{PerRow, backward, checked_targets, count, forward, on_device, token_losses};

/// Logits that exist at a time where the vocabulary is small: 4 MiB in f32.
const CHUNK: usize = 1 << 20;

/// Rows that go through at a time. With a large vocabulary a product of few rows does little but read the
/// weights, and their gradient is held in any case, so that logits of a quarter of its size cost little more.
pub(crate) fn chunk_rows(vocab: usize, hidden: usize) -> usize {
    (CHUNK / vocab).max(hidden / 4).max(16)
}

/// As [`cross_entropy`](super::cross_entropy) of the logits `hidden weightᵀ`, for hidden states `[rows, C]`,
/// weights `[V, C]` and targets u32 `[rows]`.
///
/// # Errors
/// Shapes that do not fit, no rows, or a target outside the vocabulary.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    validate("linear_cross_entropy", hidden, weight, targets)?;
    if !on_cpu(hidden.device()) {
        return on_device::linear_cross_entropy(hidden, weight, targets);
    }
    by_float!("linear_cross_entropy", hidden.dtype(), T => {
        in_chunks::<T>("linear_cross_entropy", hidden, weight, targets, |_, logits, targets, scale| {
            let (losses, log_sums) = forward::<T>(logits, targets)?;
            let gradient = scale.map(|scale| backward::<T>(logits, targets, &log_sums, scale));
            Ok((losses, gradient.transpose()?))
        })
    })
}

/// As [`token_losses`] of the logits `hidden weightᵀ`: the loss of every row, 0 for ignored ones, without
/// gradient.
///
/// # Errors
/// As [`linear_cross_entropy`].
pub fn linear_token_losses(hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Vec<f32>> {
    validate("linear_token_losses", hidden, weight, targets)?;
    let (hidden, head) = (hidden.detach(), weight.detach().t()?);
    let mut losses = Vec::with_capacity(targets.elem_count());
    for (at, rows) in pieces(&hidden, weight)? {
        let logits = hidden.narrow(0, at, rows)?.matmul(&head)?;
        losses.extend(token_losses(&logits, &targets.narrow(0, at, rows)?)?);
    }
    Ok(losses)
}

/// Checks the arguments of the loss `name`.
pub(super) fn validate(name: &str, hidden: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<()> {
    let fits = matches!(
        (hidden.dims(), weight.dims(), targets.dims()),
        ([r, c], [v, w], [t]) if r == t && c == w && *r > 0 && *c > 0 && *v > 0
    );
    if fits && targets.dtype() == DType::U32 && hidden.dtype() == weight.dtype() {
        return Ok(());
    }
    bail!(
        "{name}: hidden {:?} {:?}, weight {:?} {:?} and targets {:?} {:?}; [rows, C], [V, C] of \
         the same dtype and u32 [rows] expected, none empty",
        hidden.dims(),
        hidden.dtype(),
        weight.dims(),
        weight.dtype(),
        targets.dims(),
        targets.dtype()
    )
}

/// First row and number of rows of every chunk.
fn pieces(hidden: &Tensor, weight: &Tensor) -> Result<impl Iterator<Item = (usize, usize)> + use<>> {
    let (rows, c) = hidden.dims2()?;
    let chunk = chunk_rows(weight.dim(0)?, c);
    Ok((0..rows).step_by(chunk).map(move |at| (at, chunk.min(rows - at))))
}

/// The mean over counted rows of a loss of the logits `hidden weightᵀ`, differentiable by both. `piece` gets the
/// first row of a chunk, its logits and its targets; it returns the loss of every row, and with a scale the
/// gradient of the losses' sum times the scale.
pub(super) fn in_chunks<T: Element>(
    name: &'static str,
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    piece: impl Fn(usize, &Tensor, &[u32], Option<f64>) -> Result<(PerRow<T>, Option<Tensor>)>,
) -> Result<Tensor> {
    let (hidden, weight) = (with_contiguous_rows(hidden)?, with_contiguous_rows(weight)?);
    let wanted = hidden.track_op() || weight.track_op();
    let (loss, gradients) = chunks::<T>(&hidden.detach(), &weight.detach(), targets, wanted, piece)?;
    let result = (vec![<T as Element>::Acc::of(loss)], Shape::from(()));
    let Some((of_hidden, of_weight)) = gradients else {
        return Tensor::from_vec(result.0, result.1, hidden.device());
    };
    attach2(name, &hidden, &weight, result, move |_, _, grad| {
        let grad = grad.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        // The usual case: nothing but the loss is differentiated.
        if grad == 1.0 {
            return Ok([of_hidden.clone(), of_weight.clone()]);
        }
        Ok([(&of_hidden * grad)?, (&of_weight * grad)?])
    })
}

/// The mean loss, and if wanted its gradients for hidden states and weights.
fn chunks<T: Element>(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    wanted: bool,
    piece: impl Fn(usize, &Tensor, &[u32], Option<f64>) -> Result<(PerRow<T>, Option<Tensor>)>,
) -> Result<(f64, Option<(Tensor, Tensor)>)> {
    let (head, targets) = (weight.t()?, checked_targets(targets, weight.dim(0)?)?);
    let counted = count(&targets).max(1) as f64;
    let (mut sum, mut of_hidden, mut of_weight) = (0f64, Vec::new(), None::<Tensor>);
    for (at, rows) in pieces(hidden, weight)? {
        let (x, targets) = (hidden.narrow(0, at, rows)?, &targets[at..at + rows]);
        let (losses, of_logits) = piece(at, &x.matmul(&head)?, targets, wanted.then_some(1.0 / counted))?;
        // Added in f64 and in order: the loss has the same bits for any thread count.
        sum = losses.iter().fold(sum, |sum, &l| sum + l.wide());
        let Some(of_logits) = of_logits else { continue };
        of_hidden.push(of_logits.matmul(weight)?);
        let part = of_logits.t()?.matmul(&x)?.to_dtype(accumulator(weight.dtype()))?;
        of_weight = Some(match of_weight {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let gradients = match of_weight {
        Some(of_weight) => Some((Tensor::cat(&of_hidden, 0)?, of_weight.to_dtype(weight.dtype())?)),
        None => None,
    };
    Ok((sum / counted, gradients))
}

/// What sums over chunks run in.
pub(super) fn accumulator(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
