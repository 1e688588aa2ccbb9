//! The attention mechanisms of gd-layer.

use gd_layer::mechanisms::{AttentionMechanism, Inputs, NAMES};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::array::Arguments;
use crate::error::invalid;
use crate::gradients::{Gradients, Outcome};
use crate::options::setting;

/// The names of all mechanisms.
#[pyfunction]
pub(crate) fn mechanisms() -> Vec<&'static str> {
    NAMES.to_vec()
}

/// The outputs of a mechanism, `extra_loss` among them if it has one. Arguments: the inputs of the mechanism.
#[pyfunction]
pub(crate) fn attend(
    py: Python<'_>,
    mechanism: &Bound<'_, PyAny>,
    arrays: &Bound<'_, PyDict>,
    wrt: Vec<String>,
) -> PyResult<Outcome> {
    let mechanism = named(mechanism)?;
    let arguments = Arguments::borrow(arrays, &wrt)?;
    let mut inputs = Inputs::new();
    for (name, tensor) in arguments.iter() {
        inputs.insert(name, tensor.clone());
    }
    let outputs = py.detach(|| mechanism.attend(&inputs)).map_err(invalid)?;
    let extra_loss = outputs.extra_loss.map(|loss| ("extra_loss".to_owned(), loss));
    Gradients::outcome(arguments, outputs.tensors.into_iter().chain(extra_loss))
}

/// A mechanism from its name, or from its name and parameters as a configuration has them.
fn named(mechanism: &Bound<'_, PyAny>) -> PyResult<AttentionMechanism> {
    match mechanism.cast::<PyString>() {
        Ok(name) => {
            let name = name.to_string();
            AttentionMechanism::named(&name)
                .ok_or_else(|| invalid(format!("mechanism {name:?} is not one of {}", NAMES.join(", "))))
        }
        Err(_) => setting("mechanism", mechanism),
    }
}
