//! `gd beacon-report`: what the barrier does to a minority, from a file of scores and labels.

mod figure;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Device, Tensor};
use comfy_table::presets::UTF8_FULL_CONDENSED;
use gd_model::analysis::beacon_report::{Protection, Report, Scores, report};
use gd_model::config::parse;
use gd_model::io::safetensors::{self, Tensors};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Context, op, usage};
use crate::plot;
use crate::table::plain_table;

/// Report what conditional protection does to a minority of candidates
#[derive(Debug, clap::Args)]
#[command(
    after_help = "X holds raw_logits [R, C] (floats) and label [R] (integers): C - 1 classes, and a last candidate that \
                  stands for all of them alike. P is a JSON object with the barrier's values (barrier_floor, \
                  rescue_margin, barrier_strength, entropy_trigger, trigger_slack), detect_floor (default: the barrier's) \
                  and minority_index, the values at the top or in `preset`. Y gets protected_logits [R, C] (F64), \
                  activated [R] (U8) and selected [R] (I64). Metrics: accuracy, balanced accuracy, and on the rows of \
                  the minority survival (softmax weight of at least detect_floor), rank among the first two, recall, \
                  collapse, rescue and false rescue, each of the softmax blend (baseline) and after the barrier \
                  (proposed); activation rates, and gamma, the protected score less the best other.\n\n\
                  Example:\n  gd beacon-report --in tests/fixtures/beacon/rescue-first.safetensors --params tests/fixtures/beacon/rescue-first.json --figure gamma.svg"
)]
pub struct Args {
    /// The safetensors file with scores and labels
    #[arg(long = "in", value_name = "X")]
    pub input: PathBuf,
    /// The JSON file with the barrier and the protected candidate
    #[arg(long, value_name = "P")]
    pub params: PathBuf,
    /// The safetensors file to write, with the scores after the barrier
    #[arg(long = "out", value_name = "Y")]
    pub output: Option<PathBuf>,
    /// The picture to write: gamma before and after, PNG where the name ends so, else SVG
    #[arg(long, value_name = "FILE")]
    pub figure: Option<PathBuf>,
}

/// What P holds beside the barrier.
#[derive(Deserialize)]
struct Params {
    minority_index: usize,
    detect_floor: Option<f64>,
    preset: Option<Preset>,
}

#[derive(Deserialize)]
struct Preset {
    detect_floor: Option<f64>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file, tensor or value that cannot be used; then no file is written.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let (scores, protection) = (scores(&args.input, ctx)?, protection(&args.params)?);
    let report = report(&scores, &protection).with_context(|| args.input.display().to_string())?;
    if let Some(path) = &args.output {
        safetensors::write(path, &tensors(&report, scores.candidates)?)?;
    }
    if let Some(path) = &args.figure {
        plot::save(path, &figure::figure(&report))?;
    }
    if ctx.json {
        let metrics: Map<String, Value> =
            report.metrics.into_iter().map(|(name, x)| (name, json!(x))).collect();
        return ctx.print(Value::Object(metrics));
    }
    let mut table = plain_table(UTF8_FULL_CONDENSED, &["metric", "value"]);
    for (name, value) in &report.metrics {
        table.add_row(vec![name.clone(), value.map_or("no row".into(), |x| format!("{x:.6}"))]);
    }
    ctx.print(table)
}

fn scores(path: &Path, ctx: &Context) -> Result<Scores> {
    let tensors = safetensors::read(path, &ctx.device)?;
    let tensor = |name: &str| {
        let held = || tensors.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        tensors
            .get(name)
            .with_context(|| format!("{}: no tensor `{name}` (the file holds: {})", path.display(), held()))
    };
    let (raw, label) = (tensor("raw_logits")?, tensor("label")?);
    let fits = raw.rank() == 2 && label.dims() == [raw.dim(0)?];
    if !fits || !raw.dtype().is_float() || label.dtype().is_float() {
        bail!(
            "{}: `raw_logits` is {:?} {:?} and `label` {:?} {:?}; floats [R, C] and integers [R] expected",
            path.display(),
            raw.dtype(),
            raw.dims(),
            label.dtype(),
            label.dims()
        );
    }
    Ok(Scores {
        raw: raw.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?,
        candidates: raw.dim(1)?,
        labels: label.to_dtype(DType::I64)?.to_vec1()?,
    })
}

fn protection(path: &Path) -> Result<Protection> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
    let tree: Value = serde_json::from_str(&text).with_context(|| name.clone())?;
    let barrier = op::barrier_of(tree.clone()).map_err(|e| usage(format!("{name}: {e}")))?;
    let params: Params =
        parse(tree).map_err(|problems| anyhow::anyhow!("{name}: {}", problems.join("; ")))?;
    let detect_floor = params.preset.and_then(|p| p.detect_floor).or(params.detect_floor);
    Ok(Protection {
        barrier,
        detect_floor: detect_floor.unwrap_or(barrier.floor),
        minority: params.minority_index,
    })
}

fn tensors(report: &Report, candidates: usize) -> Result<Tensors> {
    let (lifts, cpu) = (&report.lifts, &candle_core::Device::Cpu);
    let scores: Vec<f64> = lifts.iter().flat_map(|l| l.scores.iter().copied()).collect();
    let activated: Vec<u8> = lifts.iter().map(|l| u8::from(l.activated)).collect();
    let selected: Vec<i64> = lifts.iter().map(|l| l.selected as i64).collect();
    Ok(Tensors::from([
        ("protected_logits".into(), Tensor::from_vec(scores, (lifts.len(), candidates), cpu)?),
        ("activated".into(), Tensor::new(activated, cpu)?),
        ("selected".into(), Tensor::new(selected, cpu)?),
    ]))
}
