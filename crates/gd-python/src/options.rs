//! Options by name, with the defaults of the Rust crates.

use pyo3::conversion::FromPyObjectOwned;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::invalid;

/// The options of a call, by name.
pub(crate) struct Options<'a, 'py>(pub(crate) &'a Bound<'py, PyDict>);

impl<'py> Options<'_, 'py> {
    /// The value of an option, or the default where it is absent.
    pub(crate) fn value<T: FromPyObjectOwned<'py>>(&self, name: &str, default: T) -> PyResult<T> {
        match self.0.get_item(name)? {
            Some(value) => value.extract().map_err(Into::into),
            None => Ok(default),
        }
    }

    /// The value of an option that is written as in a configuration, such as the name of an estimator.
    pub(crate) fn setting<T: DeserializeOwned>(&self, name: &str, default: T) -> PyResult<T> {
        match self.0.get_item(name)? {
            Some(value) => setting(name, &value),
            None => Ok(default),
        }
    }
}

/// A value of Python as the setting of a configuration.
pub(crate) fn setting<T: DeserializeOwned>(name: &str, value: &Bound<'_, PyAny>) -> PyResult<T> {
    let text: String = value.py().import("json")?.call_method1("dumps", (value,))?.extract()?;
    let value: serde_json::Result<Value> = serde_json::from_str(&text);
    value.and_then(serde_json::from_value).map_err(|e| invalid(format!("{name}: {e}")))
}
