//! The case `rows`: weights of single rows of scores, `rows.z` `[R, M]`, without queries and keys.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor, Var};
use gd_layer::mechanisms::{AttentionMechanism, Computation, EntmaxRows, Inputs, Outputs, Run, entmax};
use gd_model::io::safetensors::Tensors;

use super::case::Case;

/// The name of the case.
pub(super) const ROWS: &str = "rows";

/// The weights `rows.p` of the rows with the normalisation of the mechanism, and `rows.null`, the weight of no key.
/// Sparsemax adds its threshold `rows.tau` and Jacobian `rows.jac`. Entmax has an alpha at the end of every name, as in
/// `rows.p.1.5`, those of the files, and adds `rows.tau` and, with the upstream gradient `rows.dp`, `rows.dz` and
/// `rows.dalpha`.
pub(super) fn run(case: &Case, tensors: &Tensors) -> Result<Tensors> {
    let z = tensors.get("rows.z").context("the tensor `rows.z` is missing")?;
    if z.rank() != 2 {
        bail!("rows.z {:?}: [rows, keys] expected", z.dims());
    }
    let mut results = Tensors::new();
    let mut insert = |name: &str, tensor: Tensor| results.insert(format!("rows.{name}"), tensor.detach());
    match case.mechanism() {
        AttentionMechanism::Sparsemax(_) => {
            let rows = EntmaxCase::new(z, 2.0)?;
            insert("p", rows.result.weights.clone());
            insert("tau", rows.result.threshold.squeeze(1)?);
            insert("jac", rows.jacobian()?);
        }
        AttentionMechanism::Entmax(_) => {
            for alpha in case.source().suffixes("rows.p.") {
                let value =
                    alpha.parse().with_context(|| format!("the name rows.p.{alpha} ends with no number"))?;
                let rows = EntmaxCase::new(z, value)?;
                insert(&format!("p.{alpha}"), rows.result.weights.clone());
                insert(&format!("tau.{alpha}"), rows.result.threshold.squeeze(1)?);
                if let Some(dp) = tensors.get("rows.dp") {
                    let [dz, dalpha] = rows.gradients(dp)?;
                    insert(&format!("dz.{alpha}"), dz);
                    insert(&format!("dalpha.{alpha}"), dalpha.squeeze(1)?);
                }
            }
        }
        mechanism => {
            let Computation::Stages(stages) = mechanism.computation() else {
                bail!("{} has no rows: it does not normalise scores", mechanism.name());
            };
            let mut run = Run { inputs: &Inputs::new(), outputs: Outputs::default() };
            let weights = stages.normalise.normalise(z, &all_keys(z)?, &mut run)?;
            insert("p", weights.weights);
            if let Some(null) = weights.null {
                insert("null", null.squeeze(1)?);
            }
        }
    }
    Ok(results)
}

/// The set of all keys of rows `[R, M]`.
fn all_keys(z: &Tensor) -> Result<Tensor> {
    Ok(Tensor::ones(z.shape(), DType::U8, z.device())?)
}

/// Rows with entmax, and what they were computed from.
struct EntmaxCase {
    z: Var,
    alpha: Var,
    result: EntmaxRows,
}

impl EntmaxCase {
    fn new(z: &Tensor, alpha: f64) -> Result<Self> {
        let z = Var::from_tensor(z)?;
        let alpha = Var::from_tensor(&(Tensor::ones((z.dim(0)?, 1), z.dtype(), z.device())? * alpha)?)?;
        let result = entmax(&z, &all_keys(&z)?, &alpha)?;
        Ok(Self { z, alpha, result })
    }

    /// The gradients of sum(p * dp) with respect to z and alpha.
    fn gradients(&self, dp: &Tensor) -> Result<[Tensor; 2]> {
        let gradients = (&self.result.weights * dp)?.sum_all()?.backward()?;
        let of = |var: &Var| gradients.get(var).cloned().context("no gradient");
        Ok([of(&self.z)?, of(&self.alpha)?])
    }

    /// dp_i / dz_j of every row `[R, M, M]`.
    fn jacobian(&self) -> Result<Tensor> {
        let columns = self.z.dim(1)?;
        let of_column = |column: usize| {
            let dp = Tensor::zeros_like(&self.z)?;
            let one = Tensor::ones((self.z.dim(0)?, 1), self.z.dtype(), self.z.device())?;
            let dp = dp.slice_assign(&[0..self.z.dim(0)?, column..column + 1], &one)?;
            Ok(self.gradients(&dp)?[0].clone())
        };
        Ok(Tensor::stack(&(0..columns).map(of_column).collect::<Result<Vec<_>>>()?, 1)?)
    }
}
