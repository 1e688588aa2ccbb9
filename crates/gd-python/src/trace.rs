//! Traces: reading, arrays, and the viewer.

use std::collections::BTreeMap;
use std::path::PathBuf;

use gd_cli::render::viewer;
use gd_model::trace::{self, export, hex};
use pyo3::prelude::*;

use crate::array::Array;
use crate::error::invalid;

/// A verified trace.
#[pyclass(frozen, module = "gd_attention._native")]
pub(crate) struct Trace {
    trace: trace::Trace,
    /// The head of its hash chain, hexadecimal.
    #[pyo3(get)]
    head: String,
}

#[pymethods]
impl Trace {
    /// Reads and verifies a trace.
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| {
            let trace = trace::Trace::read(&path)?;
            let head = hex(&trace::verify(&trace, None, None)?.seal.head);
            Ok(Self { trace, head })
        })
        .map_err(|e: gd_model::Error| invalid(e))
    }

    /// The header as JSON.
    fn header(&self) -> PyResult<String> {
        serde_json::to_string(&self.trace.header).map_err(invalid)
    }

    /// The characters that each token completes.
    fn texts(&self) -> PyResult<Vec<String>> {
        let records = self.trace.decoded().map_err(invalid)?;
        Ok(records.into_iter().map(|record| record.text).collect())
    }

    /// The arrays of the trace by name.
    fn arrays(&self, py: Python<'_>) -> PyResult<BTreeMap<&'static str, Array>> {
        let arrays = py.detach(|| export::arrays(&self.trace)).map_err(invalid)?;
        Ok(arrays.into_iter().map(|(name, tensor)| (name, Array::owned(tensor))).collect())
    }

    /// The page of the viewer.
    fn page(&self, py: Python<'_>) -> PyResult<String> {
        py.detach(|| viewer::page_of(std::slice::from_ref(&self.trace)))
            .map_err(|e| invalid(format!("{e:#}")))
    }
}
