//! `gd beacon-report`: the effect of conditional protection on a minority, from a file of scores and labels.

mod figure;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Device, Tensor};
use gd_model::analysis::beacon_report::{Protection, Report, Scores, report};
use gd_model::config::parse;
use gd_model::io::safetensors::{self, Tensors};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::op::barrier;
use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{TERMINAL, plain_table};

/// Report the effect of conditional protection on a minority of candidates
#[derive(Debug, clap::Args)]
#[command(
    after_help = "X contains raw_logits [R, C] (floats) and label [R] (integers). There are C - 1 classes; the last \
                  candidate represents all of them equally. P is a JSON object with the parameters of the barrier \
                  (barrier_floor, rescue_margin, barrier_strength, entropy_trigger, trigger_slack), detect_floor \
                  (default: barrier_floor) and minority_index, at the top level or in `preset`. Y receives \
                  protected_logits [R, C] (F64), activated [R] (U8) and selected [R] (I64).\n\n\
                  The metrics are accuracy and balanced accuracy; on the rows of the minority survival (softmax weight \
                  of at least detect_floor), rank among the top 2, recall, collapse, rescue and false rescue. Each is \
                  given for the softmax blend (baseline) and after the barrier (proposed). Further metrics are the \
                  activation rates and gamma, the score of the protected candidate minus the highest other score.\n\n\
                  Example:\n  gd beacon-report --in tests/fixtures/beacon/rescue-first.safetensors --params tests/fixtures/beacon/rescue-first.json --figure gamma.svg"
)]
pub struct Args {
    /// Safetensors file with scores and labels
    #[arg(long = "in", value_name = "X")]
    pub input: PathBuf,
    /// JSON file with the barrier and the protected candidate
    #[arg(long, value_name = "P")]
    pub params: PathBuf,
    /// Safetensors file to write, with the scores after the barrier
    #[arg(long = "out", value_name = "Y")]
    pub output: Option<PathBuf>,
    /// Plot of gamma before and after the barrier: PNG if the name ends in .png, a page if it ends in .html, else SVG
    #[arg(long, value_name = "FILE")]
    pub figure: Option<PathBuf>,
}

/// The content of P besides the barrier.
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
/// Names the flag, file, tensor or value that is not valid; no file is written then.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let (scores, protection) = (read_scores(&args.input, ctx)?, read_protection(&args.params)?);
    let report = report(&scores, &protection).with_context(|| args.input.display().to_string())?;
    if let Some(path) = &args.output {
        safetensors::write(path, &result_tensors(&report, scores.candidates)?)?;
    }
    if let Some(path) = &args.figure {
        plot::save(path, &figure::panels(&report)[..])?;
    }
    if ctx.json {
        let metrics: Map<String, Value> =
            report.metrics.into_iter().map(|(name, x)| (name, json!(x))).collect();
        return ctx.print(Value::Object(metrics));
    }
    let mut table = plain_table(TERMINAL, &["metric", "value"]);
    for (name, value) in &report.metrics {
        table.add_row(vec![name.clone(), value.map_or("no row".into(), |x| format!("{x:.6}"))]);
    }
    ctx.print(table)
}

fn read_scores(path: &Path, ctx: &Context) -> Result<Scores> {
    let tensors = safetensors::load(path, &ctx.device)?;
    let tensor = |name: &str| {
        let names = || tensors.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        tensors.get(name).with_context(|| {
            format!("{}: no tensor `{name}` (the file contains: {})", path.display(), names())
        })
    };
    let (raw, label) = (tensor("raw_logits")?, tensor("label")?);
    let valid_shape = raw.rank() == 2 && label.dims() == [raw.dim(0)?];
    if !valid_shape || !raw.dtype().is_float() || label.dtype().is_float() {
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

fn read_protection(path: &Path) -> Result<Protection> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).with_context(|| name.clone())?;
    let json: Value = serde_json::from_str(&text).with_context(|| name.clone())?;
    let barrier = barrier::from_json(json.clone()).map_err(|e| usage(format!("{name}: {e}")))?;
    let params: Params =
        parse(json).map_err(|problems| gd_model::Error::Config { source_name: name.clone(), problems })?;
    let detect_floor = params.preset.and_then(|p| p.detect_floor).or(params.detect_floor);
    Ok(Protection {
        barrier,
        detect_floor: detect_floor.unwrap_or(barrier.floor),
        minority: params.minority_index,
    })
}

/// The tensors of Y.
fn result_tensors(report: &Report, candidates: usize) -> Result<Tensors> {
    let lifts = &report.lifts;
    let scores: Vec<f64> = lifts.iter().flat_map(|l| l.scores.iter().copied()).collect();
    let activated: Vec<u8> = lifts.iter().map(|l| u8::from(l.activated)).collect();
    let selected: Vec<i64> = lifts.iter().map(|l| l.selected as i64).collect();
    Ok(Tensors::from([
        ("protected_logits".into(), Tensor::from_vec(scores, (lifts.len(), candidates), &Device::Cpu)?),
        ("activated".into(), Tensor::new(activated, &Device::Cpu)?),
        ("selected".into(), Tensor::new(selected, &Device::Cpu)?),
    ]))
}
