//! The tensors and options of a scan.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use gd_kernels::{Mask, Precision, Scan, Score, TieBreak};

use super::args::ScanArgs;
use super::inputs::{Inputs, candidate_count};

/// The tensors of a scan, as variables for the backward pass, and its options. An optional tensor that was neither
/// in the file nor given by a flag is `None`.
pub(super) struct ScanProblem {
    pub(super) q: Var,
    pub(super) k: Var,
    pub(super) beta: Var,
    pub(super) prior: Option<Var>,
    mask: Mask,
    protected: Option<Tensor>,
    candidates: usize,
    score: Score,
    tie: TieBreak,
    precision: Precision,
    checked: bool,
}

impl ScanProblem {
    /// Takes the tensors from the input file, or their values from the flags.
    pub(super) fn new(inputs: &Inputs, args: &ScanArgs) -> Result<Self> {
        let (q, k) = (inputs.operand("q")?, inputs.operand("k")?);
        let (dtype, heads) = (energy_dtype(q), q.dim(1)?);
        let beta = inputs.per_head("beta", args.beta, heads, dtype)?;
        let beta = beta.map_or_else(|| Tensor::ones(heads, dtype, q.device()), Ok)?;
        let prior = inputs.optional("prior").map(|b| Var::from_tensor(&b.to_dtype(dtype)?)).transpose()?;
        Ok(Self {
            q: Var::from_tensor(q)?,
            k: Var::from_tensor(k)?,
            beta: Var::from_tensor(&beta)?,
            prior,
            mask: inputs.mask(args.mask, args.kv_offset)?,
            protected: inputs.protected()?,
            candidates: candidate_count(args.candidates, k.dim(2)?)?,
            score: args.score,
            tie: args.tie,
            precision: args.precision,
            checked: args.checked,
        })
    }

    /// The options of the operator.
    pub(super) fn options(&self) -> Scan<'_> {
        Scan {
            prior: self.prior.as_deref(),
            score: self.score,
            tie: self.tie,
            protected: self.protected.as_ref(),
            checked: self.checked,
            precision: self.precision,
            ..Scan::new(&self.beta, &self.mask, self.candidates)
        }
    }
}

/// The data type of the energies and of the parameters that enter them.
pub(super) fn energy_dtype(q: &Tensor) -> DType {
    if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}
