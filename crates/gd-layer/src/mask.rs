//! Between interval masks and the mask tensors of other libraries.

use candle_core::{DType, Result, Tensor};
use gd_kernels::{Mask, on_cpu};

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
    if !on_cpu(like.device()) {
        return on_device(mask, (b, n, m), hidden, like);
    }
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

/// The same off the CPU: two numbers a query are copied there instead of one for each of its keys.
fn on_device(
    mask: &Mask,
    (b, n, m): (usize, usize, usize),
    hidden: f32,
    like: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let ranges: Vec<_> = (0..b * n).map(|row| mask.visible(row / n, row % n, m)).collect();
    let some_empty = ranges.iter().any(|r| r.is_empty());
    let column = |f: fn(&std::ops::Range<usize>) -> u32| {
        Tensor::from_vec(ranges.iter().map(f).collect::<Vec<_>>(), (b, 1, n, 1), like.device())
    };
    let keys = Tensor::arange(0u32, m as u32, like.device())?.reshape((1, 1, 1, m))?;
    let (start, end) = (column(|r| r.start as u32)?, column(|r| r.end as u32)?);
    // 1 where a key lies before the range or behind it.
    let outside = (keys.broadcast_lt(&start)? + keys.broadcast_ge(&end)?)?.to_dtype(DType::F32)?;
    let bias = (outside * f64::from(hidden))?.to_dtype(like.dtype())?;
    let seen = || start.lt(&end)?.to_dtype(like.dtype());
    Ok((bias, if some_empty { Some(seen()?) } else { None }))
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

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn masks_built_from_ranges_are_those_built_key_by_key() -> Result<()> {
        let packed = vec![vec![0, 2, 5, 9], vec![0, 9]];
        let masks = [
            Mask::none(),
            Mask::causal(2),
            // The first queries see no key.
            Mask::causal(-2),
            Mask::window(3, 2),
            Mask::causal(2).packed(packed),
            Mask::causal(0).kv_len(vec![4, 9]),
        ];
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let like = Tensor::zeros(1, dtype, &Device::Cpu)?;
            let hidden = if dtype == DType::F16 { -6e4 } else { HIDDEN };
            for mask in &masks {
                let (bias, seen) = additive(mask, 2, 7, 9, &like)?;
                let b = if mask.differs() { 2 } else { 1 };
                let (built, built_seen) = on_device(mask, (b, 7, 9), hidden, &like)?;
                let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                assert_eq!(built.dims(), bias.dims(), "{mask:?}");
                assert_eq!(flat(&built)?, flat(&bias)?, "{mask:?} {dtype:?}");
                assert_eq!(built_seen.is_some(), seen.is_some(), "{mask:?}");
                if let (Some(a), Some(b)) = (built_seen, seen) {
                    assert_eq!((a.dims(), flat(&a)?), (b.dims(), flat(&b)?), "{mask:?} {dtype:?}");
                }
            }
        }
        Ok(())
    }
}
