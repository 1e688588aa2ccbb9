//! Measurements of the contenders of one shape and pass. Every round runs all of them, so that other load on the
//! machine affects all of them equally.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor};
use gd_kernels::linear;
use gd_model::train::memory::Peak;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::contenders::{Contender, Inputs, Output, Runner};
use super::report::Line;
use super::shape::{Pass, Shape, median};
use crate::subprocess::json_of_process;

/// A contender that is faster than this runs several times per round.
const ROUND_SECONDS: f64 = 0.02;
/// A contender whose N x N matrices need more than this is skipped.
const MAX_MATRIX_BYTES: f64 = 12.0 * GIB;
const GIB: f64 = (1u64 << 30) as f64;
/// Rows of the matrices whose product measures the peak rate of the machine.
const GEMM_ROWS_CPU: usize = 1024;
const GEMM_ROWS_GPU: usize = 8192;
/// Number of values that one task sums.
const SUM_CHUNK_LEN: usize = 1 << 15;

/// The parameters of the measurements of one shape and pass.
pub(super) struct Setup<'a> {
    pub(super) shape: Shape,
    pub(super) pass: Pass,
    pub(super) repeats: usize,
    pub(super) dtype: DType,
    pub(super) seed: u64,
    pub(super) device: &'a Device,
}

/// A function whose time is measured.
struct Measured<'a> {
    device: &'a Device,
    run: Box<dyn Fn() -> Result<()> + 'a>,
    /// Number of runs per round.
    count: usize,
    /// Mean time of a run, for each round.
    seconds: Vec<f64>,
}

impl<'a> Measured<'a> {
    /// Runs the function for a warm-up and determines the number of runs per round.
    fn new(device: &'a Device, run: impl Fn() -> Result<()> + 'a) -> Result<Self> {
        let mut measured = Self { device, run: Box::new(run), count: 1, seconds: Vec::new() };
        let mut once = measured.round()?;
        // The first run includes the start of threads and the allocation of memory.
        if once < 5.0 * ROUND_SECONDS {
            once = once.min(measured.round()?);
        }
        measured.count = (ROUND_SECONDS / once).clamp(1.0, 1000.0) as usize;
        Ok(measured)
    }

    /// Measures one round. Returns the mean time of a run in seconds.
    fn round(&self) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..self.count {
            (self.run)()?;
        }
        self.device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / self.count as f64)
    }
}

/// A contender after its warm-up.
struct PreparedContender<'a> {
    contender: &'a Contender,
    measured: Measured<'a>,
    winners: Option<Vec<i32>>,
    rescored: Option<f64>,
}

/// Measures `contenders`, which must support the pass. Returns one line per contender in the same order.
pub(super) fn group(setup: &Setup, contenders: &[&Contender]) -> Result<Vec<Line>> {
    let &Setup { shape, pass, device, .. } = setup;
    let inputs = Inputs::new(shape, pass, setup.dtype, setup.seed, device)?;
    let reasons: Vec<Option<String>> = contenders.iter().map(|c| skip_reason(c, setup)).collect();
    let mut prepared = Vec::new();
    for (contender, _) in contenders.iter().zip(&reasons).filter(|(_, reason)| reason.is_none()) {
        let context = || format!("{} {pass} {shape}", contender.name);
        let (run, winners, rescored) = prepare(contender, &inputs).with_context(context)?;
        let measured = Measured::new(device, move || run().map(|_: Output| ())).with_context(context)?;
        prepared.push(PreparedContender { contender, measured, winners, rescored });
    }
    let (gemm, gemm_flops) = gemm(setup.dtype, device)?;
    let mut probes = vec![Measured::new(device, move || {
        black_box(gemm()?);
        Ok(())
    })?];
    // The read rate is that of the memory of the host.
    if pass == Pass::Decode && device.is_cpu() {
        let buffer = inputs.k.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        probes.push(Measured::new(device, move || {
            black_box(sum(black_box(&buffer)));
            Ok(())
        })?);
    }
    for _ in 0..setup.repeats {
        for measured in prepared.iter_mut().map(|p| &mut p.measured).chain(&mut probes) {
            let seconds = measured.round()?;
            measured.seconds.push(seconds);
        }
    }
    let gemm_gflops = gemm_flops / median(&probes[0].seconds) / 1e9;
    let keys = 4.0 * inputs.k.elem_count() as f64;
    let read_gbps = probes.get(1).map(|p| keys / median(&p.seconds) / 1e9);
    let baseline = prepared.iter().find(|p| p.contender.name == pass.baseline());
    let (baseline_s, baseline_winners) =
        (baseline.map(|b| median(&b.measured.seconds)), baseline.and_then(|b| b.winners.as_ref()));
    let mut lines = Vec::new();
    for (contender, skipped) in contenders.iter().zip(reasons) {
        let mut line = Line { skipped, ..Line::new(pass, shape, contender.name, gemm_gflops, read_gbps) };
        if let Some(p) = prepared.iter().find(|p| p.contender.name == contender.name) {
            line.set_time(contender.work, setup.dtype, &p.measured.seconds, baseline_s);
            if let (Some(winners), Some(expected)) = (&p.winners, baseline_winners) {
                line.rows = Some(expected.len());
                line.winners_differ = Some(winners.iter().zip(expected).filter(|(a, b)| a != b).count());
            }
            line.rescored = p.rescored;
            // The memory of the process does not include that of a GPU.
            line.peak_mib = if device.is_cpu() { peak_in_subprocess(contender, setup)? } else { None };
        }
        lines.push(line);
    }
    Ok(lines)
}

/// Why a contender cannot run, or `None` if it can.
fn skip_reason(c: &Contender, setup: &Setup) -> Option<String> {
    let bytes = setup.pass.matrix_bytes(setup.shape);
    if c.stores_matrix && bytes > MAX_MATRIX_BYTES {
        return Some(format!("too large ({:.0} GiB of N x N matrices)", bytes / GIB));
    }
    (!c.runs_on(setup.device)).then(|| format!("runs only on {}", c.only_on.join(" and ")))
}

/// The runner of a contender, the keys that it selects, and the share of pairs that it scores in full precision.
type Prepared = (Runner, Option<Vec<i32>>, Option<f64>);

/// Prepares a contender and runs it once.
fn prepare(contender: &Contender, inputs: &Inputs) -> Result<Prepared> {
    let run = (contender.prepare)(inputs)?;
    let out = run()?;
    let winners = out.winners.map(|w| w.flatten_all()?.to_vec1::<i32>()).transpose()?;
    let rescored = out.rescored.map(|r| r.share()).transpose()?;
    Ok((run, winners, rescored))
}

/// A product of two square matrices, and its number of floating-point operations.
fn gemm(dtype: DType, device: &Device) -> Result<(impl Fn() -> Result<Tensor>, f64)> {
    let n = if device.is_cpu() { GEMM_ROWS_CPU } else { GEMM_ROWS_GPU };
    let matrix = |step: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..n * n).map(|i| (i * step % 1009) as f32 / 1009.0 - 0.5).collect();
        Ok(Tensor::from_vec(values, (n, n), device)?.to_dtype(dtype)?)
    };
    let (a, b) = (matrix(31)?, matrix(57)?);
    Ok((move || Ok(linear(&a, &b, None)?), 2.0 * (n as f64).powi(3)))
}

/// Sums a buffer at the rate at which it can be read.
fn sum(buffer: &[f32]) -> f32 {
    let chunk_sum = |chunk: &[f32]| {
        pulp::Arch::new().dispatch(|| {
            // Independent partial sums, so that no addition waits for the previous one.
            let mut sums = [0f32; 64];
            let blocks = chunk.chunks_exact(sums.len());
            let rest: f32 = blocks.remainder().iter().sum();
            for block in blocks {
                for (s, x) in sums.iter_mut().zip(block) {
                    *s += x;
                }
            }
            sums.iter().sum::<f32>() + rest
        })
    };
    buffer.par_chunks(SUM_CHUNK_LEN).map(chunk_sum).sum()
}

/// The output of a measuring subprocess.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PeakReport {
    /// `None` if the system does not report it.
    mib: Option<f64>,
}

/// Measures the memory that a first run needs in addition to the memory in use before it, in this process.
pub(super) fn peak(setup: &Setup, contender: &Contender) -> Result<PeakReport> {
    let inputs = Inputs::new(setup.shape, setup.pass, setup.dtype, setup.seed, setup.device)?;
    let run = (contender.prepare)(&inputs)?;
    let peak = Peak::start();
    run()?;
    Ok(PeakReport { mib: peak.and_then(Peak::above_start) })
}

/// As [`peak`] in a separate process, because memory that an earlier run has allocated would hide the peak.
fn peak_in_subprocess(contender: &Contender, setup: &Setup) -> Result<Option<f64>> {
    let (shape, pass) = (setup.shape.to_string(), setup.pass.to_string());
    let args = ["bench", "attention", "--peak", "--only", contender.name, "--shapes", &shape];
    let args = [&args[..], &["--pass", &pass, "--dtype", setup.dtype.as_str()]].concat();
    let report: PeakReport = json_of_process(&args, setup.device, setup.seed)
        .with_context(|| format!("{} {pass} {shape}", contender.name))?;
    Ok(report.mib)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::contenders::CONTENDERS;

    #[test]
    fn the_sum_includes_all_numbers() {
        for n in [0, 1, 63, 64, SUM_CHUNK_LEN + 65] {
            assert_eq!(sum(&vec![1.0; n]), n as f32);
        }
    }

    #[test]
    fn contenders_with_too_large_matrices_are_skipped() {
        let setup = |shape: &str, pass| Setup {
            shape: shape.parse().expect("a shape"),
            pass,
            repeats: 1,
            dtype: DType::F32,
            seed: 0,
            device: &Device::Cpu,
        };
        let softmax = CONTENDERS.iter().find(|c| c.name == "candle softmax").expect("a contender");
        assert_eq!(skip_reason(softmax, &setup("1x8x4096x64", Pass::Fwdbwd)), None);
        let reason = skip_reason(softmax, &setup("1x8x32768x64", Pass::Fwd)).unwrap_or_default();
        assert!(reason.contains("too large (128 GiB"), "{reason}");
        assert_eq!(skip_reason(softmax, &setup("1x8x32768x64", Pass::Decode)), None);
        assert_eq!(skip_reason(&CONTENDERS[0], &setup("1x8x32768x64", Pass::Fwd)), None);
    }
}
