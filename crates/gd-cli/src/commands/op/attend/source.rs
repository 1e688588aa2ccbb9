//! Where the tensors and parameters of a case stand in the two files.
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
use candle_core::Tensor;
use gd_model::io::safetensors::Tensors;
use serde_json::{Map, Value};

/// A case of a file.
pub(super) struct Source<'a> {
    /// The name of the case; empty for a file with a single one.
    pub(super) name: &'a str,
    tensors: &'a Tensors,
    /// The entry of the case in the JSON file; empty for a case that only the tensors have.
    case: Map<String, Value>,
    params: &'a Value,
    /// The names of the tensors in both files.
    names: Vec<&'a str>,
}

impl<'a> Source<'a> {
    /// The case `name` of the tensors of a safetensors file and of a JSON file.
    ///
    /// # Errors
    /// A case that neither file has.
    pub(super) fn new(name: &'a str, tensors: &'a Tensors, file: &'a Value) -> Result<Self> {
        let case = described(name, tensors, file)?;
        let listed = file.get("tensors").and_then(Value::as_object).into_iter().flatten();
        let names = listed.map(|(name, _)| name.as_str()).chain(tensors.keys().map(String::as_str)).collect();
        Ok(Self { name, tensors, case, params: file.get("params").unwrap_or(file), names })
    }

    /// The tensor `wanted` of the case.
    pub(super) fn find(&self, wanted: &str) -> Option<&'a Tensor> {
        prefixes(self.name).find_map(|prefix| self.tensors.get(&format!("{prefix}{wanted}")))
    }

    /// The value of a parameter: that of the case itself, or else what `params` has under the name of the case.
    pub(super) fn own_parameter(&self, parameter: &str) -> Option<&Value> {
        let named = self.params.get(self.name).and_then(|of_case| of_case.get(parameter));
        self.case.get(parameter).or(named)
    }

    /// The value of a parameter in `params`, which holds for all cases.
    pub(super) fn shared_parameter(&self, parameter: &str) -> Option<&Value> {
        self.params.get(parameter)
    }

    /// The mask that the case names, from the tensor `mask.NAME`; none for the mask `none`, which hides no key.
    pub(super) fn mask(&self) -> Result<Option<&'a Tensor>> {
        match self.case.get("mask").and_then(Value::as_str) {
            None => Ok(self.find("mask")),
            Some("none") => Ok(None),
            Some(name) => {
                let tensor = self.tensors.get(&format!("mask.{name}"));
                Ok(Some(tensor.with_context(|| format!("the tensor `mask.{name}` is missing"))?))
            }
        }
    }

    /// What follows `start` in the names of the tensors in both files, each once.
    pub(super) fn suffixes(&self, start: &str) -> BTreeSet<&'a str> {
        self.names.iter().filter_map(|name| name.strip_prefix(start)).collect()
    }

    /// The name under which the output `name` is written: with the prefix with which the files have it, or else that of
    /// the case.
    pub(super) fn full_name(&self, name: &str) -> String {
        let stored =
            |prefix: String| Some(format!("{prefix}{name}")).filter(|full| self.names.contains(&&**full));
        prefixes(self.name).find_map(stored).unwrap_or_else(|| self.own_name(name))
    }

    /// `name` with the prefix of the case.
    pub(super) fn own_name(&self, name: &str) -> String {
        format!("{}{name}", prefix(self.name))
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

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

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
            [Source::new("ties.none", &tensors, &file)?, Source::new("none", &tensors, &file)?];
        let q = |source: &Source| Ok::<_, anyhow::Error>(source.find("q").context("q")?.to_scalar::<f64>()?);
        assert_eq!((q(&ties)?, q(&none)?), (1.0, 0.0));
        assert_eq!(
            ["out", "scores", "null"].map(|name| ties.full_name(name)),
            ["ties.none.out", "scores", "ties.none.null"]
        );
        Ok(())
    }
}
