//! What `gd op attend` runs beside attention mechanisms: diagnostics and rules of rejection of `gd-model`.

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor, Var};
use gd_model::analysis::max_margin::{Choices, max_margin};
use gd_model::eval::selective_prediction::{SelectiveNet, aurc, chow, selectivenet_loss};
use gd_model::io::safetensors::Tensors;
use serde_json::{Value, json};

use super::gradients::gradients;
use super::source::Source;

/// An operation that is no attention mechanism.
pub(super) struct Beside {
    pub(super) name: &'static str,
    pub(super) formula: &'static str,
    pub(super) steps: &'static str,
    pub(super) tensors: &'static [&'static str],
    pub(super) parameters: &'static [(&'static str, &'static str)],
    pub(super) memory: &'static str,
    pub(super) source: &'static str,
    run: fn(&Source, bool) -> Result<Run>,
}

/// The results of an operation, and the parameters that it had.
pub(super) struct Run {
    pub(super) results: Tensors,
    pub(super) parameters: Value,
}

/// All of them.
pub(super) const TABLE: &[Beside] = &[
    Beside {
        name: "max_margin",
        formula: "p* = argmin |p|^2 / 2 with (k_opt - k_t).p >= 1 for every other token t of every sequence",
        steps: "differences of keys > point of least norm in their hull > direction",
        tensors: &["keys [S,T,D]", "opt [S]", "p [D], optional"],
        parameters: &[],
        memory: "S x T x D",
        source: "Tarzanagh et al. 2023",
        run: run_max_margin,
    },
    Beside {
        name: "reject",
        formula: "Chow: reject if max p < 1 - cost; SelectiveNet: alpha (mean(loss g) / phi + lam max(0, coverage - phi)^2) \
                  + (1 - alpha) mean(aux), phi = mean g; AURC: mean error rate of the i most confident",
        steps: "what the tensors of the case are for",
        tensors: &[
            "p [n,C], for Chow's rule",
            "loss, aux, g [n], for the loss of SelectiveNet",
            "conf [n], err [n], for the area under the risk-coverage curve",
        ],
        parameters: &[
            ("cost", "cost of a rejection, 0 to 1"),
            ("coverage", "coverage that SelectiveNet is asked for"),
            ("lam", "weight of a missing coverage"),
            ("alpha", "share of the selective loss"),
        ],
        memory: "n x C",
        source: "Chow 1970; Geifman and El-Yaniv 2017 and 2019",
        run: run_reject,
    },
];

impl Beside {
    /// The entry of this name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|entry| entry.name == name)
    }

    /// Runs it on a case.
    pub(super) fn run(&self, source: &Source, backward: bool) -> Result<Run> {
        (self.run)(source, backward)
    }
}

/// The tensor `name` of the case.
fn required<'a>(source: &Source<'a>, name: &str) -> Result<&'a Tensor> {
    source.find(name).with_context(|| format!("the tensor `{}` is missing", source.own_name(name)))
}

fn wide(t: &Tensor) -> Result<Tensor> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
}

/// Writes `feasible` [1] and, if a direction exists, `p_star`, `margin`, `active` and, with `p`, `cos`.
fn run_max_margin(source: &Source, _: bool) -> Result<Run> {
    let (keys, opt) = (required(source, "keys")?, required(source, "opt")?);
    let chosen = opt.to_dtype(DType::I64)?.to_vec1::<i64>().context("opt: [S] expected")?;
    let chosen =
        chosen.into_iter().map(|t| usize::try_from(t).with_context(|| format!("opt has the token {t}")));
    let choices = Choices {
        keys: wide(keys)?.to_vec3().context("keys: [S,T,D] expected")?,
        chosen: chosen.collect::<Result<_>>()?,
    };
    let (device, dtype) = (keys.device(), keys.dtype());
    let mut results = Tensors::new();
    let mut insert = |name: &str, tensor: Tensor| results.insert(source.own_name(name), tensor);
    let solution = max_margin(&choices)?;
    insert("feasible", Tensor::new(&[u8::from(solution.is_some())], device)?);
    if let Some(solution) = solution {
        let numbers = |x: &[f64]| Tensor::new(x, device)?.to_dtype(dtype);
        insert("p_star", numbers(&solution.direction)?);
        insert("margin", numbers(&[solution.margin])?);
        if let Some(p) = source.find("p") {
            let p = wide(p)?.to_vec1::<f64>().context("p: [D] expected")?;
            if p.len() != solution.direction.len() {
                bail!(
                    "p [{}]: as many numbers as keys have, {}, expected",
                    p.len(),
                    solution.direction.len()
                );
            }
            insert("cos", numbers(&[solution.cosine(&p)])?);
        }
        let active: Vec<Vec<u8>> =
            solution.active.iter().map(|row| row.iter().map(|a| u8::from(*a)).collect()).collect();
        insert("active", Tensor::new(active, device)?);
    }
    Ok(Run { results, parameters: json!({}) })
}

/// Runs Chow's rule, the loss of SelectiveNet and the area under the risk-coverage curve, each if the case has its tensors.
fn run_reject(source: &Source, backward: bool) -> Result<Run> {
    let number = |name: &str, default: f64| match source.own_parameter(name).or(source.shared_parameter(name))
    {
        None => Ok(default),
        Some(value) => value.as_f64().with_context(|| format!("{name} {value}: a number expected")),
    };
    let default = SelectiveNet::default();
    let (cost, coverage) = (number("cost", 0.5)?, number("coverage", default.coverage)?);
    let options = SelectiveNet {
        coverage,
        penalty: number("lam", default.penalty)?,
        alpha: number("alpha", default.alpha)?,
    };
    let mut results = Tensors::new();
    if let Some(p) = source.find("p") {
        let decisions = chow(p, cost)?;
        results.insert(source.own_name("reject"), decisions.reject);
        results.insert(source.own_name("pred"), decisions.predicted);
    }
    if source.find("loss").is_some() {
        results.extend(selectivenet(source, options, backward)?);
    }
    if let Some(confidence) = source.find("conf") {
        let error = wide(required(source, "err")?)?.flatten_all()?.to_vec1::<f64>()?;
        let error: Vec<bool> = error.into_iter().map(|e| e != 0.0).collect();
        let area = aurc(&wide(confidence)?.flatten_all()?.to_vec1::<f64>()?, &error)?;
        let area = Tensor::new(&[area], confidence.device())?.to_dtype(confidence.dtype())?;
        results.insert(source.own_name("aurc"), area);
    }
    if results.is_empty() {
        bail!("the case {:?} has none of the tensors `p`, `loss` and `conf`", source.name);
    }
    let parameters =
        json!({ "cost": cost, "coverage": coverage, "lam": options.penalty, "alpha": options.alpha });
    Ok(Run { results, parameters })
}

fn selectivenet(source: &Source, options: SelectiveNet, backward: bool) -> Result<Tensors> {
    let variable =
        |name: &'static str| Ok::<_, anyhow::Error>((name, Var::from_tensor(required(source, name)?)?));
    let variables = [variable("loss")?, variable("aux")?, variable("g")?];
    let [loss, auxiliary, gate] = &variables;
    let selective = selectivenet_loss(&loss.1, &auxiliary.1, &gate.1, options)?;
    let mut results = if backward { gradients(source, &selective.loss, &variables)? } else { Tensors::new() };
    for (name, t) in [("L", selective.loss), ("phi", selective.coverage), ("risk", selective.risk)] {
        results.insert(source.own_name(name), t.detach().reshape(1)?);
    }
    Ok(results)
}
