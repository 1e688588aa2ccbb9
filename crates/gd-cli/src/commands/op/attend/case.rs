//! A case of a file for an attention mechanism: which tensors and parameters it gets, and its results.

use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use gd_layer::mechanisms::{AttentionMechanism, Inputs};
use gd_model::io::safetensors::Tensors;
use serde_json::{Map, Value, json};

use super::gradients::gradients;
use super::source::Source;

/// The upstream gradient of `out`.
const DOUT: &str = "dout";

/// A problem for a mechanism.
pub(super) struct Case<'a> {
    source: Source<'a>,
    mechanism: AttentionMechanism,
    inputs: Inputs,
    variables: Vec<(&'static str, Var)>,
    dout: Option<Tensor>,
}

impl<'a> Case<'a> {
    /// Takes the tensors and parameters of a mechanism from a case.
    ///
    /// # Errors
    /// A mechanism, mask or parameter that does not exist or cannot be used.
    pub(super) fn read(mechanism: AttentionMechanism, source: Source<'a>) -> Result<Self> {
        let mechanism = configure(mechanism, &source)?;
        let info = mechanism.info();
        let mut inputs = Inputs::new();
        let mut variables = Vec::new();
        for &(wanted, _) in info.inputs.iter().chain(info.learned) {
            let Some(tensor) = source.find(wanted) else { continue };
            let var = Var::from_tensor(tensor)?;
            inputs.insert(wanted, var.as_tensor().clone());
            variables.push((wanted, var));
        }
        for &(wanted, _) in info.constants {
            let tensor = if wanted == "mask" { source.mask()? } else { source.find(wanted) };
            if let Some(tensor) = tensor {
                inputs.insert(wanted, tensor.clone());
            }
        }
        let dout = source.find(DOUT).cloned();
        Ok(Self { source, mechanism, inputs, variables, dout })
    }

    /// Runs the mechanism. Returns its outputs and, if `backward` is set, the gradients of sum(out * dout), plus the
    /// mechanism's own loss where it has one, as `dX` for every input X. Without `dout`, it is 1.
    ///
    /// # Errors
    /// Inputs that do not fit the mechanism.
    pub(super) fn run(&self, backward: bool) -> Result<Tensors> {
        let outputs = self.mechanism.attend(&self.inputs)?;
        let mut results = Tensors::new();
        if backward {
            let weighted = match (outputs.tensors.get("out"), &self.dout) {
                (Some(out), Some(dout)) => Some((out * dout).context("dout does not fit out")?.sum_all()?),
                (Some(out), None) => Some(out.sum_all()?),
                (None, _) => None,
            };
            let loss = match (weighted, &outputs.extra_loss) {
                (Some(a), Some(b)) => Some((a + b)?),
                (a, b) => a.or_else(|| b.clone()),
            };
            if let Some(loss) = loss {
                results = gradients(&self.source, &loss, &self.variables)?;
            }
        }
        for (name, tensor) in outputs.tensors {
            results.insert(self.source.full_name(&name), tensor);
        }
        results.into_iter().map(|(name, t)| Ok((name, t.detach().contiguous()?))).collect()
    }

    /// The mechanism with its parameters.
    pub(super) fn mechanism(&self) -> &AttentionMechanism {
        &self.mechanism
    }

    /// The files.
    pub(super) fn source(&self) -> &Source<'a> {
        &self.source
    }
}

/// The mechanism with the parameters of the case. Of several values, that of the case itself counts, then those that
/// `params` has under the name of the case, then those of `params`. Keys that are no parameters are descriptions.
fn configure(default: AttentionMechanism, source: &Source) -> Result<AttentionMechanism> {
    let mechanism = default.name();
    let mut config = Map::from_iter([("name".to_owned(), json!(mechanism))]);
    for &(parameter, _) in default.info().parameters {
        let own = source.own_parameter(parameter).cloned();
        let own = own.or_else(|| by_case(mechanism, parameter, source.name));
        let value = own.or_else(|| source.shared_parameter(parameter).cloned());
        let value = value.or_else(|| by_other_name(mechanism, parameter, source));
        config.extend(value.map(|value| (parameter.to_owned(), value)));
    }
    let text = Value::Object(config);
    serde_json::from_value(text.clone()).with_context(|| format!("the parameters {text}"))
}

/// The value of a parameter that the files express by the name of the case.
fn by_case(mechanism: &str, parameter: &str, case: &str) -> Option<Value> {
    match (mechanism, parameter, case) {
        ("patterns", "pattern", name) => Some(json!(name)),
        ("entmax", "alpha", "learned") => Some(json!("learned")),
        ("gated", "gate", "elementwise" | "headwise") => Some(json!(case)),
        ("monotonic", "noisy", "quiet" | "noisy") => Some(json!(case == "noisy")),
        ("monotonic", "hard", "quiet" | "noisy" | "hard") | ("mocha", "hard", "hard") => {
            Some(json!(case == "hard"))
        }
        ("energy_transformer", "diag", "diag" | "nodiag") => Some(json!(case == "diag")),
        ("resan", "direction", "forward" | "backward") => Some(json!(case)),
        _ => None,
    }
}

/// The value of a parameter that files may have under another name, where it is a number and no description.
fn by_other_name(mechanism: &str, parameter: &str, source: &Source) -> Option<Value> {
    match (mechanism, parameter) {
        ("nsa", "w") => source.shared_parameter("window").filter(|value| value.is_u64()).cloned(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::super::mechanism_named;
    use super::*;

    #[test]
    fn a_case_overrides_the_parameters_of_the_file() -> Result<()> {
        let scalar = |value: f64| Tensor::new(value, &Device::Cpu);
        let tensors = Tensors::from([("q".into(), scalar(0.0)?), ("mask.own".into(), scalar(1.0)?)]);
        let file = json!({
            "params": { "k": 4, "ties": "words", "window": 7, "wide": { "k": 6 } },
            "cases": { "own": { "mask": "own", "k": 5 }, "wide": {}, "plain": {}, "masked": { "mask": "other" } },
        });
        let read = |mechanism: &str, case| {
            Case::read(mechanism_named(mechanism)?, Source::new(case, &tensors, &file)?)
        };
        let parameter = |mechanism: &str, case, name| -> Result<Value> {
            Ok(serde_json::to_value(read(mechanism, case)?.mechanism())?[name].clone())
        };
        let k = |case| parameter("topk", case, "k");
        assert_eq!([k("own")?, k("wide")?, k("plain")?], [5, 6, 4]);
        assert_eq!(parameter("nsa", "plain", "w")?, 7);
        let error = |mechanism: &str, case| format!("{:#}", read(mechanism, case).err().unwrap());
        assert!(error("topk", "other").contains("own") && error("topk", "other").contains("masked"));
        assert!(error("topk", "masked").contains("mask.other"));
        assert!(error("topq", "own").contains("explicit_sparse"));
        Ok(())
    }
}
