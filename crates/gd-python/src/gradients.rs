//! The results of a function together with the graph behind them, from which gradients are computed.

use std::collections::BTreeMap;

use candle_core::Tensor;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::array::{Arguments, Array};
use crate::error::invalid;

/// The arrays that a function returns, by name, and what their gradients need if one was asked for.
pub(crate) type Outcome = (BTreeMap<String, Array>, Option<Gradients>);

/// The graph of one call of a function.
#[pyclass(frozen, module = "gd_attention._native")]
pub(crate) struct Gradients {
    // Dropped before the arguments, whose memory they read.
    results: BTreeMap<String, Tensor>,
    arguments: Arguments,
}

impl Gradients {
    /// The outcome of a call with these arguments. Gradients were asked for if an argument is a variable.
    pub(crate) fn outcome(
        arguments: Arguments,
        results: impl IntoIterator<Item = (impl Into<String>, Tensor)>,
    ) -> PyResult<Outcome> {
        let results: BTreeMap<String, Tensor> =
            results.into_iter().map(|(name, tensor)| (name.into(), tensor)).collect();
        let export = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), arguments.export(tensor)?));
        let arrays = results.iter().map(export).collect::<PyResult<_>>()?;
        let differentiable = results.values().any(Tensor::track_op);
        Ok((arrays, differentiable.then_some(Self { results, arguments })))
    }
}

#[pymethods]
impl Gradients {
    /// The gradients of the arguments for those of the results, both by name. Results that are not named count as constants.
    fn backward(&self, py: Python<'_>, gradients: &Bound<'_, PyDict>) -> PyResult<BTreeMap<String, Array>> {
        let gradients = Arguments::borrow(gradients, &[])?;
        py.detach(|| {
            let mut objective: Option<Tensor> = None;
            for (name, gradient) in gradients.iter() {
                let result = self.results.get(name).filter(|result| result.track_op());
                let result =
                    result.ok_or_else(|| invalid(format!("{name} is not a result with a gradient")))?;
                let product = (result * gradient).and_then(|product| product.sum_all()).map_err(invalid)?;
                objective = Some(match objective {
                    None => product,
                    Some(sum) => (sum + product).map_err(invalid)?,
                });
            }
            let objective = objective.ok_or_else(|| invalid("no gradient of a result is given"))?;
            self.arguments.gradients(&objective.backward().map_err(invalid)?)
        })
    }
}
