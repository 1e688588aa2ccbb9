//! A case of a file: which tensors and parameters a mechanism gets, and under which names its results are written.
//!
//! A safetensors file may hold several cases. The tensors of the case `a.b` have names that begin with `a.b.`; those
//! that it shares with other cases begin with `a.` or have no prefix. The longest prefix counts. The JSON file beside
//! it has `params` for all cases, and under `cases` what holds for each of them:
//!
//! ```json
//! {"params": {"k": 4}, "cases": {"causal": {"mask": "causal"}}}
//! ```

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use candle_core::{Tensor, Var};
use gd_layer::mechanisms::{AttentionMechanism, Inputs};
use gd_model::io::safetensors::Tensors;
use serde_json::{Map, Value, json};

/// The upstream gradient of `out`.
const DOUT: &str = "dout";

/// A problem for a mechanism.
pub struct Case<'a> {
    name: &'a str,
    mechanism: AttentionMechanism,
    inputs: Inputs,
    variables: Vec<(&'static str, Var)>,
    dout: Option<Tensor>,
    /// The names of the tensors in both files.
    names: Vec<&'a str>,
}

impl<'a> Case<'a> {
    /// Takes the case `name` (empty for a file with a single one) of the mechanism `mechanism` from the tensors of the
    /// safetensors file and from the JSON file.
    ///
    /// # Errors
    /// A case, mask or parameter that does not exist or cannot be used.
    pub fn read(mechanism: &str, name: &'a str, tensors: &'a Tensors, file: &'a Value) -> Result<Self> {
        let case = described(name, tensors, file)?;
        let mechanism = configure(mechanism, name, &case, file)?;
        let info = mechanism.info();
        let find = |wanted: &str| prefixes(name).find_map(|prefix| tensors.get(&format!("{prefix}{wanted}")));
        let mut inputs = Inputs::new();
        let mut variables = Vec::new();
        for &(wanted, _) in info.inputs.iter().chain(info.learned) {
            let Some(tensor) = find(wanted) else { continue };
            let var = Var::from_tensor(tensor)?;
            inputs.insert(wanted, var.as_tensor().clone());
            variables.push((wanted, var));
        }
        for &(wanted, _) in info.constants {
            let tensor = if wanted == "mask" { mask(&case, tensors)?.or(find(wanted)) } else { find(wanted) };
            if let Some(tensor) = tensor {
                inputs.insert(wanted, tensor.clone());
            }
        }
        let listed = file.get("tensors").and_then(Value::as_object).into_iter().flatten();
        let names = listed.map(|(name, _)| name.as_str()).chain(tensors.keys().map(String::as_str)).collect();
        Ok(Self { name, mechanism, inputs, variables, dout: find(DOUT).cloned(), names })
    }

    /// Runs the mechanism. Returns its outputs and, if `backward` is set, the gradients of sum(out * dout), plus the
    /// mechanism's own loss where it has one, as `dX` for every input X. Without `dout`, it is 1.
    ///
    /// # Errors
    /// Inputs that do not fit the mechanism.
    pub fn run(&self, backward: bool) -> Result<Tensors> {
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
                let gradients = loss.backward()?;
                for (name, var) in &self.variables {
                    // The gradient of an input that does not enter the output is 0.
                    let gradient = gradients.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
                    results.insert(format!("{}d{name}", prefix(self.name)), gradient);
                }
            }
        }
        for (name, tensor) in outputs.tensors {
            results.insert(self.full_name(&name), tensor);
        }
        results.into_iter().map(|(name, t)| Ok((name, t.detach().contiguous()?))).collect()
    }

    /// The mechanism with its parameters.
    pub fn mechanism(&self) -> &AttentionMechanism {
        &self.mechanism
    }

    /// What follows `start` in the names of the tensors in both files, each once.
    pub(super) fn suffixes(&self, start: &str) -> BTreeSet<&'a str> {
        self.names.iter().filter_map(|name| name.strip_prefix(start)).collect()
    }

    /// The name under which the output `name` is written: with the prefix with which the files have it, or else that of
    /// the case.
    fn full_name(&self, name: &str) -> String {
        let stored =
            |prefix: String| Some(format!("{prefix}{name}")).filter(|full| self.names.contains(&&**full));
        prefixes(self.name).find_map(stored).unwrap_or_else(|| format!("{}{name}", prefix(self.name)))
    }
}

/// What precedes the names of the tensors that only this case has.
fn prefix(case: &str) -> String {
    if case.is_empty() { String::new() } else { format!("{case}.") }
}

/// The prefixes of the names of tensors of a case, longest first: `a.b.`, `a.` and none.
fn prefixes(case: &str) -> impl Iterator<Item = String> {
    let shorter = case.rmatch_indices('.').map(|(at, _)| case[..=at].to_owned());
    let own = Some(prefix(case)).filter(|own| !own.is_empty());
    own.into_iter().chain(shorter).chain([String::new()])
}

/// The entry of the case in the JSON file; empty for a case that only the tensors have.
fn described(name: &str, tensors: &Tensors, file: &Value) -> Result<Map<String, Value>> {
    if !file.is_object() {
        bail!("the parameters are no JSON object");
    }
    let cases = file.get("cases").and_then(Value::as_object);
    if let Some(case) = cases.and_then(|cases| cases.get(name)) {
        return Ok(case.as_object().with_context(|| format!("the case {name:?} is no JSON object"))?.clone());
    }
    if name.is_empty() || tensors.keys().any(|tensor| tensor.starts_with(&prefix(name))) {
        return Ok(Map::new());
    }
    let all: Vec<&str> = cases.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
    bail!("no case {name:?}; there are {}", all.join(", "))
}

/// The mask that the case names, from the tensor `mask.NAME`; none for the mask `none`, which hides no key.
fn mask<'a>(case: &Map<String, Value>, tensors: &'a Tensors) -> Result<Option<&'a Tensor>> {
    match case.get("mask").and_then(Value::as_str) {
        None | Some("none") => Ok(None),
        Some(name) => {
            let tensor = tensors.get(&format!("mask.{name}"));
            Ok(Some(tensor.with_context(|| format!("the tensor `mask.{name}` is missing"))?))
        }
    }
}

/// The mechanism with the parameters of the case. Of several values, that of the case itself counts, then those that
/// `params` has under the name of the case, then those of `params`. Keys that are no parameters are descriptions.
fn configure(
    mechanism: &str,
    name: &str,
    case: &Map<String, Value>,
    file: &Value,
) -> Result<AttentionMechanism> {
    let default = AttentionMechanism::named(mechanism).with_context(|| {
        let names: Vec<&str> = gd_layer::mechanisms::TABLE.iter().map(|(name, _)| *name).collect();
        format!("no mechanism {mechanism:?}; there are {}", names.join(", "))
    })?;
    let params = file.get("params").unwrap_or(file);
    let mut config = Map::from_iter([("name".to_owned(), json!(mechanism))]);
    for &(parameter, _) in default.info().parameters {
        let named = params.get(name).and_then(|of_case| of_case.get(parameter));
        let value = case.get(parameter).or(named).cloned().or_else(|| by_case(mechanism, parameter, name));
        let value = value.or_else(|| params.get(parameter).cloned());
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
        ("monotonic", "noisy", "quiet" | "noisy") => Some(json!(case == "noisy")),
        ("monotonic", "hard", "quiet" | "noisy" | "hard") | ("mocha", "hard", "hard") => {
            Some(json!(case == "hard"))
        }
        ("energy_transformer", "diag", "diag" | "nodiag") => Some(json!(case == "diag")),
        ("resan", "direction", "forward" | "backward") => Some(json!(case)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn scalar(value: f64) -> Result<Tensor> {
        Ok(Tensor::new(value, &Device::Cpu)?)
    }

    #[test]
    fn the_longest_prefix_of_a_name_counts() -> Result<()> {
        assert_eq!(prefixes("a.b").collect::<Vec<_>>(), ["a.b.", "a.", ""]);
        assert_eq!(prefixes("").collect::<Vec<_>>(), [""]);
        let tensors = Tensors::from([
            ("q".into(), scalar(0.0)?),
            ("ties.q".into(), scalar(1.0)?),
            ("ties.none.out".into(), scalar(2.0)?),
            ("scores".into(), scalar(3.0)?),
        ]);
        let file = json!({ "cases": { "ties.none": {}, "none": {} } });
        let [ties, none] =
            [Case::read("topk", "ties.none", &tensors, &file)?, Case::read("topk", "none", &tensors, &file)?];
        assert_eq!(ties.inputs.get("q")?.to_scalar::<f64>()?, 1.0);
        assert_eq!(none.inputs.get("q")?.to_scalar::<f64>()?, 0.0);
        assert_eq!(
            ["out", "scores", "null"].map(|name| ties.full_name(name)),
            ["ties.none.out", "scores", "ties.none.null"]
        );
        Ok(())
    }

    #[test]
    fn a_case_overrides_the_parameters_of_the_file() -> Result<()> {
        let tensors = Tensors::from([("q".into(), scalar(0.0)?), ("mask.own".into(), scalar(1.0)?)]);
        let file = json!({
            "params": { "k": 4, "ties": "words", "wide": { "k": 6 } },
            "cases": { "own": { "mask": "own", "k": 5 }, "wide": {}, "plain": {}, "masked": { "mask": "other" } },
        });
        let k = |case: &str| -> Result<Value> {
            let case = Case::read("topk", case, &tensors, &file)?;
            Ok(serde_json::to_value(case.mechanism())?["k"].clone())
        };
        assert_eq!([k("own")?, k("wide")?, k("plain")?], [5, 6, 4]);
        let error = |mechanism: &str, case: &str| {
            format!("{:#}", Case::read(mechanism, case, &tensors, &file).err().unwrap())
        };
        assert!(error("topk", "other").contains("own") && error("topk", "other").contains("masked"));
        assert!(error("topk", "masked").contains("mask.other"));
        assert!(error("topq", "own").contains("explicit_sparse"));
        Ok(())
    }
}
