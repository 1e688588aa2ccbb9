//! `gd op select`: scan, selection, and optionally the gradients.

use anyhow::Result;
use candle_core::{Tensor, Var};
use gd_kernels::{Candidates, Estimator, Select, Selected, plan, scan, scan_all, select};
use gd_model::io::safetensors::Tensors;

use super::args::SelectArgs;
use super::inputs::Inputs;
use super::problem::{ScanProblem, energy_dtype};
use super::{barrier, checked, output};
use crate::context::Context;

/// The variables of the selection besides those of the scan.
struct SelectVars {
    v: Var,
    alpha: Var,
    threshold: Option<Var>,
    /// Weights of the refinement rounds `[Hq, R]`.
    rounds: Option<Var>,
}

impl SelectVars {
    fn new(inputs: &Inputs, q: &Tensor, args: &SelectArgs) -> Result<Self> {
        let (dtype, heads) = (energy_dtype(q), q.dim(1)?);
        let alpha = inputs.per_head("alpha", args.alpha, heads, dtype)?;
        let alpha = alpha.map_or_else(|| Tensor::full(0.5, heads, q.device())?.to_dtype(dtype), Ok)?;
        let var = |t: Option<Tensor>| t.map(|t| Var::from_tensor(&t)).transpose();
        Ok(Self {
            v: Var::from_tensor(inputs.operand("v")?)?,
            alpha: Var::from_tensor(&alpha)?,
            threshold: var(inputs.per_head("threshold", args.threshold, heads, dtype)?)?,
            rounds: var(inputs.rounds(args.refine, heads, dtype)?)?,
        })
    }
}

/// Runs the operator.
pub(super) fn run(args: &SelectArgs, ctx: &Context) -> Result<()> {
    let inputs = Inputs::read(&args.scan.input, &ctx.device)?;
    let barrier = args.barrier.as_deref().map(barrier::parse).transpose()?;
    let problem = ScanProblem::new(&inputs, &args.scan)?;
    let vars = SelectVars::new(&inputs, &problem.q, args)?;
    let options = problem.options();
    let plan = plan(&problem.q, &problem.k, &options)?;
    // The dense estimator needs all visible keys as candidates.
    let find = if args.estimator == Estimator::Dense { scan_all } else { scan };
    let candidates = find(&problem.q, &problem.k, &options)?;
    let select_options = Select {
        prior: problem.prior.as_deref(),
        score: args.scan.score,
        tie: args.scan.tie,
        threshold: vars.threshold.as_deref(),
        alpha: Some(&vars.alpha),
        gate: args.gate,
        estimator: args.estimator,
        temperature: args.temperature,
        preserve_floor: args.preserve_floor,
        value_floor: args.value_floor,
        hardness: args.hardness,
        barrier,
        rounds: vars.rounds.as_deref(),
        coherence: args.coherence_mode,
        ..Select::new(&problem.beta)
    };
    let selected = select(&problem.q, &problem.k, &vars.v, &candidates, &select_options)?;
    if args.scan.checked {
        check_values(&inputs, &vars.v, (&selected, &candidates), args)?;
    }
    let overflowed = candidates.overflowed()?;
    let mut out = Tensors::new();
    if args.backward {
        out.extend(gradients(&inputs, &problem, &vars, &selected.y)?);
    }
    out.extend(results(selected, candidates));
    output::finish("select", &args.scan.output, &plan, &out, (&out["index"], overflowed), ctx)
}

/// Refuses NaN and infinities in the value rows that are read, and in the upstream gradient.
fn check_values(
    inputs: &Inputs,
    v: &Tensor,
    (selected, candidates): (&Selected, &Candidates),
    args: &SelectArgs,
) -> Result<()> {
    let mixed = args.hardness < 1.0 || args.estimator == Estimator::Blend;
    if args.backward || mixed {
        checked::value_rows(v, &candidates.index)?;
    }
    for index in std::iter::once(&selected.index).chain(selected.later.iter().map(|round| &round.index)) {
        checked::value_rows(v, index)?;
    }
    if args.backward {
        checked::upstream_gradient(&inputs.dout(&selected.y)?)?;
    }
    Ok(())
}

/// The gradients of sum(y * dout) with respect to all variables.
fn gradients(inputs: &Inputs, problem: &ScanProblem, vars: &SelectVars, y: &Tensor) -> Result<Tensors> {
    let loss = (y * inputs.dout(y)?)?.sum_all()?;
    let grads = loss.backward()?;
    let variables = [
        ("dq", Some(&problem.q)),
        ("dk", Some(&problem.k)),
        ("dv", Some(&vars.v)),
        ("dbeta", Some(&problem.beta)),
        ("dalpha", Some(&vars.alpha)),
        ("dprior", problem.prior.as_ref()),
        ("dthreshold", vars.threshold.as_ref()),
        ("drounds", vars.rounds.as_ref()),
    ];
    let mut out = Tensors::new();
    for (name, var) in variables {
        let Some(var) = var else { continue };
        // The gradient of a variable that does not enter the output is 0.
        let grad = grads.get(var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
        out.insert(name.into(), grad);
    }
    Ok(out)
}

/// The tensors of the result by name.
fn results(selected: Selected, candidates: Candidates) -> Tensors {
    let mut out = Tensors::from(
        [
            ("out", selected.y),
            ("index", selected.index),
            ("energy", selected.energy),
            ("margin", selected.margin),
            ("gate", selected.gate),
            ("candidate_index", candidates.index),
            ("candidate_energy", candidates.energy),
        ]
        .map(|(name, tensor)| (name.into(), tensor)),
    );
    out.extend(selected.coherence.map(|u| ("coherence".into(), u)));
    out
}
