//! Between interval masks and the mask tensors of other libraries.

use candle_core::{DType, Result, Tensor};
use gd_kernels::Mask;

/// What stands for -inf: finite, so that a row without keys stays finite too.
const HIDDEN: f32 = -1e30;

/// An additive mask `[B|1, 1, N, M]` in the dtype of `like`, and a factor `[B|1, 1, N, 1]` that is
/// 0 for queries without keys (none if every query sees one).
pub(crate) fn additive(
    mask: &Mask,
    batch: usize,
    n: usize,
    m: usize,
    like: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    mask.validate(batch, m)?;
    let b = if mask.differs() { batch } else { 1 };
    let hidden = if like.dtype() == DType::F16 { -6e4 } else { HIDDEN };
    let mut bias = vec![hidden; b * n * m];
    let mut seen = vec![1f32; b * n];
    for (row, (bias, seen)) in bias.chunks_mut(m).zip(&mut seen).enumerate() {
        let visible = mask.visible(row / n, row % n, m);
        *seen = if visible.is_empty() { 0.0 } else { 1.0 };
        bias[visible].fill(0.0);
    }
    let some_empty = seen.contains(&0.0);
    let tensor =
        |x: Vec<f32>, width| Tensor::from_vec(x, (b, 1, n, width), like.device())?.to_dtype(like.dtype());
    Ok((tensor(bias, m)?, if some_empty { Some(tensor(seen, 1)?) } else { None }))
}

/// Reads an additive mask of 0 (visible) and -inf, `[N, M]` or with leading dimensions of which all
/// entries are alike, as an interval mask for queries from position `offset` on.
///
/// Causal masks, sliding windows and full visibility are recognised; anything else is an error.
pub(crate) fn from_additive(mask: &Tensor, offset: usize) -> Result<Mask> {
    let dims = mask.dims();
    let [.., n, m] = *dims else { candle_core::bail!("a mask {dims:?} has no rows of keys") };
    let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let visible = |at: usize| values[at] == 0.0;
    if let Some(x) = values.iter().find(|&&x| x != 0.0 && x > -1e4) {
        candle_core::bail!("a mask value of {x} is neither 0 nor -inf; biases are not masks");
    }
    let at = offset as i64;
    let reach = (0..n).map(|i| (0..m).filter(|&j| visible(i * m + j)).count()).max().unwrap_or(0);
    let guesses = [Mask::none(), Mask::causal(at), Mask::window(reach.max(1), at)];
    let fits = |guess: &Mask| {
        values.chunks(m).enumerate().all(|(row, values)| {
            let range = guess.visible(0, row % n, m);
            values.iter().enumerate().all(|(j, &x)| range.contains(&j) == (x == 0.0))
        })
    };
    match guesses.iter().find(|g| fits(g)) {
        Some(mask) => Ok(mask.clone()),
        None => candle_core::bail!("a mask {dims:?} that is neither full, causal nor a sliding window"),
    }
}
