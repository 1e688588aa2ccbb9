//! The validated sizes and options of a scan.

use candle_core::{DType, Tensor};

use crate::backend::check::dims4;
use crate::error::{Error, Result};
use crate::ops::scan::Scan;
use crate::options::{Precision, Score, TieBreak};

/// A validated scan: q `[batch, q_heads, queries, head_dim]`, k `[batch, kv_heads, keys, head_dim]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// B.
    pub batch: usize,
    /// Hq, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// N.
    pub queries: usize,
    /// M.
    pub keys: usize,
    /// D.
    pub head_dim: usize,
    /// Candidates kept per query, protected ones not counted.
    pub candidates: usize,
    /// Element type of q and k.
    pub dtype: DType,
    /// How keys are scored.
    pub score: Score,
    /// Which of equals wins.
    pub tie: TieBreak,
    /// How candidates are found.
    pub precision: Precision,
}

impl Problem {
    /// Query heads per key-value head.
    pub fn group(&self) -> usize {
        self.q_heads / self.kv_heads
    }
}

/// The validated problem.
pub(crate) fn problem(q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Problem> {
    let (batch, q_heads, queries, head_dim) = dims4("q", q)?;
    let (kb, kv_heads, keys, kd) = dims4("k", k)?;
    if kb != batch || kd != head_dim {
        return Err(Error::Invalid(format!(
            "q {:?} and k {:?} differ in batch or head_dim",
            q.dims(),
            k.dims()
        )));
    }
    if q_heads % kv_heads != 0 {
        return Err(Error::Invalid(format!(
            "{q_heads} query heads are not a multiple of {kv_heads} key heads"
        )));
    }
    if q.dtype() != k.dtype() {
        return Err(Error::Invalid(format!("q is {:?}, k is {:?}", q.dtype(), k.dtype())));
    }
    if !q.device().same_device(k.device()) {
        return Err(Error::Invalid("q and k are on different devices".into()));
    }
    if keys > i32::MAX as usize {
        return Err(Error::Invalid(format!("{keys} keys do not fit an i32 index")));
    }
    scan.mask.validate(batch, keys)?;
    Ok(Problem {
        batch,
        q_heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        candidates: scan.candidates,
        dtype: q.dtype(),
        score: scan.score,
        tie: scan.tie,
        precision: scan.precision,
    })
}

/// The shape of a key prior, checked against `[B|1, Hq|Hk, M]`.
pub(crate) fn prior_dims(prior: &Tensor, problem: &Problem) -> Result<[usize; 3]> {
    match *prior.dims() {
        [b, h, m]
            if (b == 1 || b == problem.batch)
                && (h == problem.q_heads || h == problem.kv_heads)
                && m == problem.keys =>
        {
            Ok([b, h, m])
        }
        _ => Err(Error::Invalid(format!(
            "prior {:?} is not [{} or 1, {} or {}, {}] (batch, heads, keys)",
            prior.dims(),
            problem.batch,
            problem.q_heads,
            problem.kv_heads,
            problem.keys
        ))),
    }
}

/// The shape of protected keys, checked against `[B|1, Hq|Hk|1, N|1, P]`.
pub(crate) fn protected_dims(t: &Tensor, problem: &Problem) -> Result<[usize; 4]> {
    let Problem { batch, q_heads, kv_heads, queries, .. } = *problem;
    let fits = |x: usize, sizes: &[usize]| x == 1 || sizes.contains(&x);
    if t.dtype() != DType::I32 {
        return Err(Error::Invalid(format!("protected holds {:?}, not i32 key indices", t.dtype())));
    }
    match *t.dims() {
        [b, h, n, p]
            if fits(b, &[batch]) && fits(h, &[q_heads, kv_heads]) && fits(n, &[queries]) && p > 0 =>
        {
            Ok([b, h, n, p])
        }
        _ => Err(Error::Invalid(format!(
            "protected {:?} is not [{batch} or 1, {q_heads}, {kv_heads} or 1, {queries} or 1, slots]",
            t.dims()
        ))),
    }
}
