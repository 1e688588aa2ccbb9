//! The native part of the Python package `gd_attention`: functions over arrays by name, which the package gives signatures
//! and documentation. Every function releases the interpreter while it computes.
#![doc = include_str!("../README.md")]

mod array;
mod error;
mod gradients;
mod mask;
mod mechanisms;
mod model;
mod operators;
mod options;
mod trace;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::array::Array;
    #[pymodule_export]
    use crate::gradients::Gradients;
    #[pymodule_export]
    use crate::mask::Mask;
    #[pymodule_export]
    use crate::mechanisms::{attend, mechanisms};
    #[pymodule_export]
    use crate::model::Model;
    #[pymodule_export]
    use crate::operators::{decode, defaults, running_average, scan, select};
    #[pymodule_export]
    use crate::trace::Trace;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
