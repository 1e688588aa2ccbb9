//! `gd op`: one raw operator on the tensors of a file, for checks by any outside program.
//!
//! Shapes: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; `args.rs` documents the rest.

mod args;
mod inputs;

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use gd_kernels::{Candidates, Estimator, Scan, ScanPlan, Select, plan, scan, scan_all, select};
use gd_model::io::safetensors::{self, Tensors};
use serde_json::{Map, Value, json};

pub use args::{Args, MaskKind, Operator, ScanArgs, SelectArgs};
pub(super) use args::{open_unit, positive};
pub(super) use inputs::{Inputs, barrier_of};

use super::Context;

/// Runs the command.
///
/// # Errors
/// Names the flag, file, tensor or value that cannot be used; then no file is written.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.operator {
        Operator::Scan(args) => run_scan(&args, ctx),
        Operator::Select(args) => run_select(&args, ctx),
    }
}

/// The gradients are taken with respect to these; parameters that were neither given nor defaulted
/// are absent.
struct Variables {
    q: Var,
    k: Var,
    beta: Var,
    prior: Option<Var>,
}

/// The dtype of energies and of the parameters that shape them.
fn energy_dtype(q: &Tensor) -> DType {
    if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

fn variables(inputs: &Inputs, args: &ScanArgs) -> Result<Variables> {
    let (q, k) = (inputs.operand("q")?, inputs.operand("k")?);
    let dtype = energy_dtype(q);
    let beta = inputs.per_head("beta", args.beta, q.dim(1)?, dtype)?;
    let beta = beta.map_or_else(|| Tensor::ones(q.dim(1)?, dtype, q.device()), Ok)?;
    let prior = inputs.optional("prior").map(|b| Var::from_tensor(&b.to_dtype(dtype)?)).transpose()?;
    Ok(Variables { q: Var::from_tensor(q)?, k: Var::from_tensor(k)?, beta: Var::from_tensor(&beta)?, prior })
}

/// The candidates, `all` for every visible key, and the plan of the scan.
fn find_candidates(
    inputs: &Inputs,
    vars: &Variables,
    args: &ScanArgs,
    all: bool,
) -> Result<(ScanPlan, Candidates)> {
    let mask = inputs.mask(args.mask, args.kv_offset)?;
    let protected = inputs.protected()?;
    let scan_args = Scan {
        prior: vars.prior.as_deref(),
        score: args.score,
        tie: args.tie,
        protected: protected.as_ref(),
        checked: args.checked,
        precision: args.precision,
        ..Scan::new(&vars.beta, &mask, inputs::candidates(args.candidates, vars.k.dim(2)?)?)
    };
    let plan = plan(&vars.q, &vars.k, &scan_args)?;
    let find = if all { scan_all } else { scan };
    Ok((plan, find(&vars.q, &vars.k, &scan_args)?))
}

fn run_scan(args: &ScanArgs, ctx: &Context) -> Result<()> {
    let inputs = Inputs::read(&args.input, &ctx.device)?;
    let vars = variables(&inputs, args)?;
    let (plan, found) = find_candidates(&inputs, &vars, args, false)?;
    let mut out = Tensors::from([("index".into(), found.index), ("energy".into(), found.energy)]);
    out.extend(found.protected.map(|p| ("protected".into(), p)));
    finish("scan", args, &plan, &out, ctx)
}

fn run_select(args: &SelectArgs, ctx: &Context) -> Result<()> {
    let inputs = Inputs::read(&args.scan.input, &ctx.device)?;
    let barrier = args.barrier.as_deref().map(inputs::barrier).transpose()?;
    let vars = variables(&inputs, &args.scan)?;
    let v = Var::from_tensor(inputs.operand("v")?)?;
    let (dtype, heads) = (energy_dtype(&vars.q), vars.q.dim(1)?);
    let alpha = inputs.per_head("alpha", args.alpha, heads, dtype)?;
    let alpha = alpha.map_or_else(|| Tensor::full(0.5, heads, vars.q.device())?.to_dtype(dtype), Ok)?;
    let alpha = Var::from_tensor(&alpha)?;
    let var = |t: Option<Tensor>| t.map(|t| Var::from_tensor(&t)).transpose();
    let threshold = var(inputs.per_head("threshold", args.threshold, heads, dtype)?)?;
    let rounds = var(inputs.rounds(args.refine, heads, dtype)?)?;

    let (plan, found) = find_candidates(&inputs, &vars, &args.scan, args.estimator == Estimator::Dense)?;
    let select_args = Select {
        prior: vars.prior.as_deref(),
        score: args.scan.score,
        tie: args.scan.tie,
        threshold: threshold.as_deref(),
        alpha: Some(&alpha),
        gate: args.gate,
        estimator: args.estimator,
        temperature: args.temperature,
        preserve_floor: args.preserve_floor,
        value_floor: args.value_floor,
        hardness: args.hardness,
        barrier,
        rounds: rounds.as_deref(),
        coherence: args.coherence_mode,
        ..Select::new(&vars.beta)
    };
    let selected = select(&vars.q, &vars.k, &v, &found, &select_args)?;

    let mut out = Tensors::new();
    if args.backward {
        let loss = (&selected.y * inputs.dout(&selected.y)?)?.sum_all()?;
        let grads = loss.backward()?;
        let wanted = [
            ("dq", Some(&vars.q)),
            ("dk", Some(&vars.k)),
            ("dv", Some(&v)),
            ("dbeta", Some(&vars.beta)),
            ("dalpha", Some(&alpha)),
            ("dprior", vars.prior.as_ref()),
            ("dthreshold", threshold.as_ref()),
            ("drounds", rounds.as_ref()),
        ];
        for (name, var) in wanted {
            let Some(var) = var else { continue };
            // A parameter that plays no part in this output has gradient 0.
            let grad = grads.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
            out.insert(name.into(), grad);
        }
    }
    out.extend(selected.coherence.map(|u| ("coherence".into(), u)));
    let rest = [
        ("out", selected.y),
        ("index", selected.index),
        ("energy", selected.energy),
        ("margin", selected.margin),
        ("gate", selected.gate),
        ("candidate_index", found.index),
        ("candidate_energy", found.energy),
    ];
    out.extend(rest.map(|(name, tensor)| (name.into(), tensor)));
    finish("select", &args.scan, &plan, &out, ctx)
}

/// Writes the file, then reports it.
fn finish(operator: &str, args: &ScanArgs, plan: &ScanPlan, out: &Tensors, ctx: &Context) -> Result<()> {
    let out: Tensors =
        out.iter().map(|(name, t)| Ok((name.clone(), t.detach().contiguous()?))).collect::<Result<_>>()?;
    safetensors::write(&args.output, &out)?;
    // In `scan` a query abstains where not even its first candidate is a key.
    let first = match operator {
        "scan" => out["index"].narrow(3, 0, 1)?,
        _ => out["index"].clone(),
    };
    let first = first.flatten_all()?.to_vec1::<i32>()?;
    let abstained = first.iter().filter(|&&j| j < 0).count();
    if ctx.json {
        let tensors: Map<String, Value> = out
            .iter()
            .map(|(name, t)| {
                (name.clone(), json!({ "shape": t.dims(), "dtype": format!("{:?}", t.dtype()) }))
            })
            .collect();
        return ctx.print(json!({
            "operator": operator,
            "plan": plan.to_string(),
            "out": args.output,
            "queries": first.len(),
            "abstained": abstained,
            "tensors": tensors,
        }));
    }
    let names: Vec<_> = out.keys().map(String::as_str).collect();
    ctx.print(format_args!(
        "{operator} on {plan}: {abstained} of {} queries abstained; wrote {} to {}",
        first.len(),
        names.join(", "),
        args.output.display()
    ))
}
