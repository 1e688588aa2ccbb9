//! The operators of gd-kernels.

use std::collections::BTreeMap;

use candle_core::Tensor;
use gd_kernels::{AverageState, Candidates, Rescored, Scan, Select, Selected};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::json;

use crate::array::{Arguments, Array};
use crate::error::invalid;
use crate::gradients::{Gradients, Outcome};
use crate::mask::Mask;
use crate::options::Options;

fn scan_options<'a>(
    arguments: &'a Arguments,
    mask: &'a Mask,
    options: &Options<'_, '_>,
) -> PyResult<Scan<'a>> {
    let defaults = Scan::new(arguments.get("beta")?, &mask.mask, options.value("candidates", 1)?);
    Ok(Scan {
        prior: arguments.optional("prior"),
        protected: arguments.optional("protected"),
        score: options.setting("score", defaults.score)?,
        tie: options.setting("tie", defaults.tie)?,
        precision: options.setting("precision", defaults.precision)?,
        checked: options.value("checked", defaults.checked)?,
        ..defaults
    })
}

fn select_options<'a>(arguments: &'a Arguments, options: &Options<'_, '_>) -> PyResult<Select<'a>> {
    let defaults = Select::new(arguments.get("beta")?);
    Ok(Select {
        prior: arguments.optional("prior"),
        threshold: arguments.optional("threshold"),
        alpha: arguments.optional("alpha"),
        rounds: arguments.optional("rounds"),
        score: options.setting("score", defaults.score)?,
        tie: options.setting("tie", defaults.tie)?,
        gate: options.setting("gate", defaults.gate)?,
        exclude_below: options.value("exclude_below", defaults.exclude_below)?,
        picks: options.value("picks", defaults.picks)?,
        estimator: options.setting("estimator", defaults.estimator)?,
        temperature: options.value("temperature", defaults.temperature)?,
        preserve_floor: options.value("preserve_floor", defaults.preserve_floor)?,
        gradient: options.setting("gradient", defaults.gradient)?,
        value_floor: options.value("value_floor", defaults.value_floor)?,
        hardness: options.value("hardness", defaults.hardness)?,
        barrier: options.setting("barrier", defaults.barrier)?,
        coherence: options.setting("coherence", defaults.coherence)?,
        beta: defaults.beta,
    })
}

/// The defaults of the options of `scan` and `select`, as JSON.
#[pyfunction]
pub(crate) fn defaults() -> PyResult<String> {
    let beta = Tensor::zeros(1, candle_core::DType::F32, &candle_core::Device::Cpu).map_err(invalid)?;
    let mask = gd_kernels::Mask::none();
    let (scan, select) = (Scan::new(&beta, &mask, 1), Select::new(&beta));
    let scan = json!({
        "score": scan.score, "tie": scan.tie, "precision": scan.precision, "checked": scan.checked,
    });
    let select = json!({
        "score": select.score, "tie": select.tie, "gate": select.gate, "exclude_below": select.exclude_below,
        "picks": select.picks, "estimator": select.estimator, "temperature": select.temperature,
        "preserve_floor": select.preserve_floor, "gradient": select.gradient, "value_floor": select.value_floor,
        "hardness": select.hardness, "barrier": select.barrier, "coherence": select.coherence,
    });
    Ok(json!({ "scan": scan, "select": select }).to_string())
}

/// The arrays `index`, `energy` and, with protected keys, `protected`, and the share of the pairs that were scored in full
/// precision. Arguments: q, k, beta, prior, protected.
#[pyfunction]
pub(crate) fn scan(
    py: Python<'_>,
    arrays: &Bound<'_, PyDict>,
    mask: &Mask,
    options: &Bound<'_, PyDict>,
) -> PyResult<(BTreeMap<String, Array>, f64)> {
    let arguments = Arguments::borrow(arrays, &[])?;
    let (q, k) = (arguments.get("q")?, arguments.get("k")?);
    let options = scan_options(&arguments, mask, &Options(options))?;
    let candidates = py.detach(|| gd_kernels::scan(q, k, &options)).map_err(invalid)?;
    let share = candidates.rescored.share().map_err(invalid)?;
    let results = [("index", candidates.index), ("energy", candidates.energy)];
    let results = results.into_iter().chain(candidates.protected.map(|flags| ("protected", flags)));
    Ok((Gradients::outcome(arguments, results)?.0, share))
}

/// The results of a selection by name; those of later rounds and picks have their number in the name.
fn selected(selected: Selected) -> Vec<(String, Tensor)> {
    let Selected { y, index, energy, margin, gate, coherence, compared, later, picks } = selected;
    let named = [
        ("y", y),
        ("index", index),
        ("energy", energy),
        ("margin", margin),
        ("gate", gate),
        ("compared", compared),
    ];
    let mut results: Vec<(String, Tensor)> = named.map(|(name, tensor)| (name.to_owned(), tensor)).into();
    results.extend(coherence.map(|coherence| ("coherence".to_owned(), coherence)));
    for (n, round) in later.into_iter().enumerate() {
        results.extend([(format!("rounds.{n}.index"), round.index), (format!("rounds.{n}.y"), round.y)]);
    }
    for (n, pick) in picks.into_iter().enumerate() {
        results
            .extend([(format!("picks.{n}.index"), pick.index), (format!("picks.{n}.weight"), pick.weight)]);
    }
    results
}

/// The results of [`selected`]. Arguments: q, k, v, index, energy, protected, beta, prior, threshold, alpha, rounds.
#[pyfunction]
pub(crate) fn select(
    py: Python<'_>,
    arrays: &Bound<'_, PyDict>,
    wrt: Vec<String>,
    options: &Bound<'_, PyDict>,
) -> PyResult<Outcome> {
    let arguments = Arguments::borrow(arrays, &wrt)?;
    let candidates = Candidates {
        index: arguments.get("index")?.clone(),
        energy: arguments.get("energy")?.clone(),
        protected: arguments.optional("protected").cloned(),
        rescored: Rescored::ALL,
    };
    let [q, k, v] = ["q", "k", "v"].map(|name| arguments.get(name));
    let (q, k, v) = (q?, k?, v?);
    let options = select_options(&arguments, &Options(options))?;
    let results = py.detach(|| gd_kernels::select(q, k, v, &candidates, &options)).map_err(invalid)?;
    Gradients::outcome(arguments, selected(results))
}

/// The results of [`selected`]. Arguments: q, k, v, beta, prior, protected, threshold.
#[pyfunction]
pub(crate) fn decode(
    py: Python<'_>,
    arrays: &Bound<'_, PyDict>,
    mask: &Mask,
    options: &Bound<'_, PyDict>,
) -> PyResult<Outcome> {
    let arguments = Arguments::borrow(arrays, &[])?;
    let [q, k, v] = ["q", "k", "v"].map(|name| arguments.get(name));
    let (q, k, v) = (q?, k?, v?);
    let options = scan_options(&arguments, mask, &Options(options))?;
    let threshold = arguments.optional("threshold");
    let results = py.detach(|| gd_kernels::decode(q, k, v, &options, threshold)).map_err(invalid)?;
    Gradients::outcome(arguments, selected(results))
}

/// The averages `m`, and the state `mean` and `log_weight`. Arguments: decay, write, v, mean, log_weight.
#[pyfunction]
pub(crate) fn running_average(
    py: Python<'_>,
    arrays: &Bound<'_, PyDict>,
    wrt: Vec<String>,
) -> PyResult<Outcome> {
    let arguments = Arguments::borrow(arrays, &wrt)?;
    let [decay, write, v] = ["decay", "write", "v"].map(|name| arguments.get(name));
    let (decay, write, v) = (decay?, write?, v?);
    let state = match (arguments.optional("mean"), arguments.optional("log_weight")) {
        (Some(mean), Some(log_weight)) => {
            Some(AverageState { mean: mean.clone(), log_weight: log_weight.clone() })
        }
        _ => None,
    };
    let result = py.detach(|| gd_kernels::running_average(decay, write, v, state.as_ref()));
    let (m, state) = result.map_err(invalid)?;
    Gradients::outcome(arguments, [("m", m), ("mean", state.mean), ("log_weight", state.log_weight)])
}
