//! The arguments of a scan, read from tensors on the CPU.

use candle_core::Tensor;

use crate::backend::cpu::element::{Element, Real, acc_dtype};
use crate::backend::cpu::view::View;
use crate::cache::CachedKeys;
use crate::cache::int8_keys::cpu::Int8Panels;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::ops::scan::options::Scan;
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// Key prior b `[B|1, Hq|Hk, M]`, in the accumulator type.
pub(crate) struct Prior<A> {
    pub(crate) data: Vec<A>,
    pub(crate) dims: [usize; 3],
}

impl<A: Real> Prior<A> {
    /// The row of batch entry `b` and query head `h`, of `q_heads`.
    #[inline(always)]
    pub(crate) fn row(&self, b: usize, h: usize, q_heads: usize) -> &[A] {
        let at = self.offset(b, h, q_heads);
        &self.data[at..at + self.dims[2]]
    }

    /// Where that row starts.
    #[inline(always)]
    pub(crate) fn offset(&self, b: usize, h: usize, q_heads: usize) -> usize {
        let [batch, heads, keys] = self.dims;
        ((b % batch) * heads + h / (q_heads / heads)) * keys
    }
}

/// Protected keys `[B|1, Hq|Hk|1, N|1, P]`, negative in unused slots.
pub(crate) struct Protected {
    data: Vec<i32>,
    dims: [usize; 4],
}

impl Protected {
    /// The protected keys of query `i` of head `h` of batch entry `b`.
    pub(crate) fn row(&self, b: usize, h: usize, i: usize, q_heads: usize) -> &[i32] {
        let [batch, heads, queries, slots] = self.dims;
        let row = ((b % batch) * heads + h / (q_heads / heads)) * queries + i % queries;
        &self.data[row * slots..(row + 1) * slots]
    }

    /// P.
    pub(crate) fn slots(&self) -> usize {
        self.dims[3]
    }
}

/// The arguments of a scan; q and k are `[B, H, rows, D]`. The keys may be stored in fewer bits than the queries are
/// computed in, as in a cache: queries are in the accumulator type.
pub(crate) struct Arguments<'a, T: Element> {
    pub(crate) q: View<'a, T::Acc>,
    pub(crate) k: View<'a, T>,
    pub(crate) beta: &'a [T::Acc],
    pub(crate) prior: Option<&'a Prior<T::Acc>>,
    pub(crate) protected: Option<&'a Protected>,
    pub(crate) mask: &'a Mask,
    /// The cached 8-bit form of k, for a certified scan.
    pub(crate) int8: Option<&'a Int8Panels>,
}

/// The values of a key prior.
pub(crate) fn prior_values<A: Real>(prior: &Tensor, problem: &Problem) -> Result<Prior<A>> {
    let dims = problem.prior_dims(prior)?;
    let data: Vec<A> = prior.detach().to_dtype(acc_dtype(problem.dtype))?.flatten_all()?.to_vec1()?;
    // -inf excludes a key; NaN and +inf have no meaning.
    if let Some(at) = data.iter().position(|x| x.is_nan() || *x == A::infinity()) {
        return Err(Error::Invalid(format!("prior value {at} (flat) is {}", data[at])));
    }
    Ok(Prior { data, dims })
}

/// The protected keys; refuses keys beyond the last.
pub(crate) fn protected_keys(t: &Tensor, problem: &Problem) -> Result<Protected> {
    let dims = problem.protected_dims(t)?;
    let data: Vec<i32> = t.flatten_all()?.to_vec1()?;
    match data.iter().find(|&&j| j >= problem.keys as i32) {
        Some(j) => Err(Error::Invalid(format!("protected key {j} is beyond the {} keys", problem.keys))),
        None => Ok(Protected { data, dims }),
    }
}

/// The cached 8-bit keys that a certified scan reads.
pub(crate) fn cached_int8<'a>(scan: &Scan<'a>, problem: &Problem) -> Result<Option<&'a Int8Panels>> {
    match (scan.cached, problem.precision) {
        (Some(CachedKeys::Int8(keys)), Precision::Certified) => {
            keys.panels(&problem.key_shape(), problem.keys).map(Some)
        }
        _ => Ok(None),
    }
}
