//! How it is measured: everything of one shape and pass in turn, round after round, so that a busy
//! moment of the machine falls on all alike.

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use candle_core::{DType, Device, Tensor};
use gd_kernels::fused::vectorize;
use gd_model::config::device;
use gd_model::train::memory::Peak;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::contenders::{Contender, Inputs, Output, Runner};
use super::report::Line;
use super::shape::{Pass, Shape, median};

/// What is quicker than this is run several times a round.
const ROUND: f64 = 0.02;
/// A contender that would store more than this in N x N matrices is left out.
const TOO_LARGE: f64 = 12.0 * GIB;
const GIB: f64 = (1u64 << 30) as f64;
/// Rows of the matrices whose product tells the machine's rate, on the CPU and elsewhere.
const GEMM: (usize, usize) = (1024, 8192);
/// Numbers of the buffer that one task adds up.
const CHUNK: usize = 1 << 15;

/// One shape and pass, and how to measure it.
pub(super) struct Setup<'a> {
    pub(super) shape: Shape,
    pub(super) pass: Pass,
    pub(super) repeats: usize,
    pub(super) dtype: DType,
    pub(super) seed: u64,
    pub(super) device: &'a Device,
}

/// What is run in a round.
struct Item<'a> {
    device: &'a Device,
    run: Box<dyn Fn() -> Result<()> + 'a>,
    /// Runs in a round.
    count: usize,
    /// Seconds of one run, the mean of each round.
    seconds: Vec<f64>,
}

impl<'a> Item<'a> {
    /// Warms up, and finds out how often it fits in a round.
    fn new(device: &'a Device, run: impl Fn() -> Result<()> + 'a) -> Result<Self> {
        let mut item = Self { device, run: Box::new(run), count: 1, seconds: Vec::new() };
        let mut once = item.round()?;
        // The first run also starts threads and fetches memory.
        if once < 5.0 * ROUND {
            once = once.min(item.round()?);
        }
        item.count = (ROUND / once).clamp(1.0, 1000.0) as usize;
        Ok(item)
    }

    /// Seconds of one run.
    fn round(&self) -> Result<f64> {
        let start = Instant::now();
        for _ in 0..self.count {
            (self.run)()?;
        }
        self.device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / self.count as f64)
    }
}

/// A contender whose warm-up is done.
struct Ready<'a> {
    contender: &'a Contender,
    item: Item<'a>,
    winners: Option<Vec<i32>>,
    rescored: Option<f64>,
}

/// Measures `contenders`, each of which has this pass. One line each, in their order.
pub(super) fn group(setup: &Setup, contenders: &[&Contender]) -> Result<Vec<Line>> {
    let &Setup { shape, pass, device, .. } = setup;
    let inputs = Inputs::new(shape, pass, setup.dtype, setup.seed, device)?;
    let reasons: Vec<Option<String>> = contenders.iter().map(|c| obstacle(c, setup)).collect();
    let mut ready = Vec::new();
    for (contender, _) in contenders.iter().zip(&reasons).filter(|(_, reason)| reason.is_none()) {
        let at = || format!("{} {pass} {shape}", contender.name);
        let (run, winners, rescored) = start(contender, &inputs).with_context(at)?;
        let item = Item::new(device, move || run().map(|_: Output| ())).with_context(at)?;
        ready.push(Ready { contender, item, winners, rescored });
    }
    let (gemm, gemm_flops) = gemm(setup.dtype, device)?;
    let mut probes = vec![Item::new(device, move || {
        black_box(gemm()?);
        Ok(())
    })?];
    // The plain read rate is one of this machine's memory.
    if pass == Pass::Decode && device.is_cpu() {
        let buffer = inputs.k.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        probes.push(Item::new(device, move || {
            black_box(total(black_box(&buffer)));
            Ok(())
        })?);
    }
    for _ in 0..setup.repeats {
        for item in ready.iter_mut().map(|r| &mut r.item).chain(&mut probes) {
            let seconds = item.round()?;
            item.seconds.push(seconds);
        }
    }
    let gemm_gflops = gemm_flops / median(&probes[0].seconds) / 1e9;
    let keys = 4.0 * inputs.k.elem_count() as f64;
    let read_gbps = probes.get(1).map(|p| keys / median(&p.seconds) / 1e9);
    let base = ready.iter().find(|r| r.contender.name == pass.base());
    let (base_s, base_winners) =
        (base.map(|b| median(&b.item.seconds)), base.and_then(|b| b.winners.as_ref()));
    let mut lines = Vec::new();
    for (contender, skipped) in contenders.iter().zip(reasons) {
        let mut line = Line { skipped, ..Line::new(pass, shape, contender.name, gemm_gflops, read_gbps) };
        if let Some(r) = ready.iter().find(|r| r.contender.name == contender.name) {
            line.timed(contender.work, setup.dtype, &r.item.seconds, base_s);
            if let (Some(ours), Some(base)) = (&r.winners, base_winners) {
                line.rows = Some(base.len());
                line.winners_differ = Some(ours.iter().zip(base).filter(|(a, b)| a != b).count());
            }
            line.rescored = r.rescored;
            // On another device the memory of the process says nothing.
            line.peak_mib = if device.is_cpu() { peak_apart(contender, setup)? } else { None };
        }
        lines.push(line);
    }
    Ok(lines)
}

/// Why a contender cannot run here, if it cannot.
fn obstacle(c: &Contender, setup: &Setup) -> Option<String> {
    let bytes = setup.pass.square_bytes(setup.shape);
    if c.square && bytes > TOO_LARGE {
        return Some(format!("too large ({:.0} GiB of N x N matrices)", bytes / GIB));
    }
    (!c.runs_on(setup.device)).then(|| format!("runs on {} alone", c.only_on.join(" and ")))
}

/// A contender's runner, what it selects, and the share of pairs that it scored in full.
type Started = (Runner, Option<Vec<i32>>, Option<f64>);

fn start(contender: &Contender, inputs: &Inputs) -> Result<Started> {
    let run = (contender.prepare)(inputs)?;
    let out = run()?;
    let winners = out.winners.map(|w| w.flatten_all()?.to_vec1::<i32>()).transpose()?;
    let rescored = out.rescored.map(|r| r.share()).transpose()?;
    Ok((run, winners, rescored))
}

/// A product of two square matrices, and its operations.
fn gemm(dtype: DType, device: &Device) -> Result<(impl Fn() -> Result<Tensor>, f64)> {
    let n = if device.is_cpu() { GEMM.0 } else { GEMM.1 };
    let matrix = |step: usize| -> Result<Tensor> {
        let values: Vec<f32> = (0..n * n).map(|i| (i * step % 1009) as f32 / 1009.0 - 0.5).collect();
        Ok(Tensor::from_vec(values, (n, n), device)?.to_dtype(dtype)?)
    };
    let (a, b) = (matrix(31)?, matrix(57)?);
    Ok((move || Ok(a.matmul(&b)?), 2.0 * (n as f64).powi(3)))
}

/// The sum of a buffer, as fast as it can be read.
fn total(buffer: &[f32]) -> f32 {
    let part = |chunk: &[f32]| {
        vectorize(|| {
            // Enough sums side by side that no addition waits for another.
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
    buffer.par_chunks(CHUNK).map(part).sum()
}

/// What a measuring process prints.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PeakReport {
    /// None where the system does not tell.
    mib: Option<f64>,
}

/// The memory that a first run needs above what is there before it, in this process.
pub(super) fn peak(setup: &Setup, contender: &Contender) -> Result<PeakReport> {
    let inputs = Inputs::new(setup.shape, setup.pass, setup.dtype, setup.seed, setup.device)?;
    let run = (contender.prepare)(&inputs)?;
    let peak = Peak::start();
    run()?;
    Ok(PeakReport { mib: peak.and_then(Peak::above_start) })
}

/// The same in a process of its own, so that no peak hides in memory that another run left behind.
fn peak_apart(contender: &Contender, setup: &Setup) -> Result<Option<f64>> {
    let program = std::env::current_exe().context("the program does not find itself")?;
    let output = Command::new(program)
        .args(["bench", "attention", "--peak", "--only", contender.name])
        .args(["--shapes", &setup.shape.to_string(), "--pass", &setup.pass.to_string()])
        .args(["--device", &device::name(setup.device), "--seed", &setup.seed.to_string()])
        .args(["--dtype", setup.dtype.as_str()])
        .output()
        .context("the program cannot be started again")?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        let reason = reason.trim().trim_start_matches("error: ");
        bail!("{} {} {}: {}: {reason}", contender.name, setup.pass, setup.shape, output.status);
    }
    let report: PeakReport = serde_json::from_slice(&output.stdout).context("the measuring process")?;
    Ok(report.mib)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::contenders::CONTENDERS;

    #[test]
    fn the_sum_takes_every_number() {
        for n in [0, 1, 63, 64, CHUNK + 65] {
            assert_eq!(total(&vec![1.0; n]), n as f32);
        }
    }

    #[test]
    fn what_does_not_fit_is_left_out_with_its_size() {
        let setup = |shape: &str, pass| Setup {
            shape: shape.parse().expect("a shape"),
            pass,
            repeats: 1,
            dtype: DType::F32,
            seed: 0,
            device: &Device::Cpu,
        };
        let softmax = CONTENDERS.iter().find(|c| c.name == "candle softmax").expect("it is there");
        assert_eq!(obstacle(softmax, &setup("1x8x4096x64", Pass::Fwdbwd)), None);
        let reason = obstacle(softmax, &setup("1x8x32768x64", Pass::Fwd)).unwrap_or_default();
        assert!(reason.contains("too large (128 GiB"), "{reason}");
        assert_eq!(obstacle(softmax, &setup("1x8x32768x64", Pass::Decode)), None);
        assert_eq!(obstacle(&CONTENDERS[0], &setup("1x8x32768x64", Pass::Fwd)), None);
    }
}
