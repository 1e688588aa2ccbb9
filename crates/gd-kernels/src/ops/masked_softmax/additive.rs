//! Conversions between interval masks and additive mask tensors (0 where a key is visible, minus infinity elsewhere).

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
use crate::mask::Mask;

/// The bias of a hidden key: finite, so that a row without keys stays finite too.
const HIDDEN_BIAS: f32 = -1e30;
/// The bias of a hidden key in f16, whose largest number is 65504.
const HIDDEN_BIAS_F16: f32 = -6e4;
/// A mask value of this or less hides a key.
const HIDDEN_BELOW: f32 = -1e4;

/// The additive form of `mask` for `[B, N, M]`: the bias `[B|1, 1, N, M]` in the dtype and on the device of `like`, and
/// a factor `[B|1, 1, N, 1]` that is 0 for queries without keys (none if every query sees one).
///
/// Only the first and the last visible key of each query are copied to the device, instead of N * M biases.
pub(super) fn additive(
    mask: &Mask,
    [batch, n, m]: [usize; 3],
    like: &Tensor,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let b = if mask.differs() { batch } else { 1 };
    let hidden = if like.dtype() == DType::F16 { HIDDEN_BIAS_F16 } else { HIDDEN_BIAS };
    let ranges: Vec<_> = (0..b * n).map(|row| mask.visible(row / n, row % n, m)).collect();
    let some_empty = ranges.iter().any(|r| r.is_empty());
    let column = |f: fn(&std::ops::Range<usize>) -> u32| {
        Tensor::from_vec(ranges.iter().map(f).collect::<Vec<_>>(), (b, 1, n, 1), like.device())
    };
    let keys = Tensor::arange(0u32, m as u32, like.device())?.reshape((1, 1, 1, m))?;
    let (start, end) = (column(|r| r.start as u32)?, column(|r| r.end as u32)?);
    // 1 for keys before or after the visible range.
    let outside = (keys.broadcast_lt(&start)? + keys.broadcast_ge(&end)?)?.to_dtype(DType::F32)?;
    let bias = (outside * f64::from(hidden))?.to_dtype(like.dtype())?;
    let sees_a_key = || start.lt(&end)?.to_dtype(like.dtype());
    Ok((bias, if some_empty { Some(sees_a_key()?) } else { None }))
}

impl Mask {
    /// Converts an additive mask to an interval mask.
    ///
    /// * `mask`: `[N, M]`, or with leading dimensions of which all entries are equal: 0 where the key is visible, minus
    ///   infinity (or any value of -10000 or less) elsewhere.
    /// * `offset`: the key position of query 0.
    ///
    /// Causal masks, sliding windows and full visibility are recognised. The values are read on the host.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a mask of another form, or a value between -10000 and 0.
    ///
    /// # Examples
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use gd_kernels::Mask;
    ///
    /// let hidden = f32::NEG_INFINITY;
    /// let mask = Tensor::new(&[[0f32, hidden], [0.0, 0.0]], &Device::Cpu)?;
    /// assert_eq!(Mask::from_additive(&mask, 0)?, Mask::causal(0));
    /// # Ok::<(), gd_kernels::Error>(())
    /// ```
    pub fn from_additive(mask: &Tensor, offset: usize) -> Result<Self> {
        let dims = mask.dims();
        let [.., n, m] = *dims else {
            return Err(Error::Invalid(format!("a mask {dims:?} has no rows of keys")));
        };
        let values = mask.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let visible = |at: usize| values[at] == 0.0;
        if let Some(x) = values.iter().find(|&&x| x != 0.0 && x > HIDDEN_BELOW) {
            return Err(Error::Invalid(format!(
                "a mask value of {x} is neither 0 nor -inf; biases are not masks"
            )));
        }
        let at = offset as i64;
        let window = (0..n).map(|i| (0..m).filter(|&j| visible(i * m + j)).count()).max().unwrap_or(0);
        let forms = [Mask::none(), Mask::causal(at), Mask::window(window.max(1), at)];
        let fits = |form: &Mask| {
            values.chunks(m).enumerate().all(|(row, values)| {
                let range = form.visible(0, row % n, m);
                values.iter().enumerate().all(|(j, &x)| range.contains(&j) == (x == 0.0))
            })
        };
        forms.into_iter().find(fits).ok_or_else(|| {
            Error::Invalid(format!("a mask {dims:?} that is neither full, causal nor a sliding window"))
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result};

    use super::*;

    /// The result of [`additive`], built key by key on the host.
    fn key_by_key(
        mask: &Mask,
        [batch, n, m]: [usize; 3],
        hidden: f32,
        like: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let b = if mask.differs() { batch } else { 1 };
        let mut bias = vec![hidden; b * n * m];
        let mut factor = vec![1f32; b * n];
        for (row, (bias, factor)) in bias.chunks_mut(m).zip(&mut factor).enumerate() {
            let visible = mask.visible(row / n, row % n, m);
            *factor = if visible.is_empty() { 0.0 } else { 1.0 };
            bias[visible].fill(0.0);
        }
        let some_empty = factor.contains(&0.0);
        let tensor =
            |x: Vec<f32>, width| Tensor::from_vec(x, (b, 1, n, width), like.device())?.to_dtype(like.dtype());
        Ok((tensor(bias, m)?, if some_empty { Some(tensor(factor, 1)?) } else { None }))
    }

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
            let hidden = if dtype == DType::F16 { HIDDEN_BIAS_F16 } else { HIDDEN_BIAS };
            for mask in &masks {
                let (bias, factor) = key_by_key(mask, [2, 7, 9], hidden, &like)?;
                let (built, built_factor) = additive(mask, [2, 7, 9], &like)?;
                let flat = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                assert_eq!(built.dims(), bias.dims(), "{mask:?}");
                assert_eq!(flat(&built)?, flat(&bias)?, "{mask:?} {dtype:?}");
                assert_eq!(built_factor.is_some(), factor.is_some(), "{mask:?}");
                if let (Some(a), Some(b)) = (built_factor, factor) {
                    assert_eq!((a.dims(), flat(&a)?), (b.dims(), flat(&b)?), "{mask:?} {dtype:?}");
                }
            }
        }
        Ok(())
    }
}
