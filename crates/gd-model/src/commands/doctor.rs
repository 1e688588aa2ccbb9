//! `gd doctor`: what this machine offers, and whether every parameter learns.

use anyhow::Result;
use serde::Serialize;

use super::Context;
use crate::device;

/// List device, threads and CPU features, and check the gradients of a preset
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd doctor --json")]
pub struct Args {}

/// What the command reports.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: String,
    cuda_built_in: bool,
    metal_built_in: bool,
    architecture: &'static str,
    threads: usize,
    cpu_features: Vec<&'static str>,
}

/// Runs the command.
///
/// # Errors
/// When stdout cannot be written.
pub fn run(_args: Args, ctx: &Context) -> Result<()> {
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: device::name(&ctx.device),
        cuda_built_in: candle_core::utils::cuda_is_available(),
        metal_built_in: candle_core::utils::metal_is_available(),
        architecture: std::env::consts::ARCH,
        threads: rayon::current_num_threads(),
        cpu_features: cpu_features(),
    };
    if ctx.json {
        return ctx.print(serde_json::to_string_pretty(&report)?);
    }
    let yes = |b| if b { "yes" } else { "no" };
    ctx.print(format_args!(
        "gd            {}\ndevice        {}\nCUDA built in {}\nMetal         {}\narchitecture  {}\nthreads       {}\nCPU features  {}",
        report.version,
        report.device,
        yes(report.cuda_built_in),
        yes(report.metal_built_in),
        report.architecture,
        report.threads,
        if report.cpu_features.is_empty() { "none of those used".into() } else { report.cpu_features.join(" ") },
    ))
}

/// The vector extensions that the CPU kernels can use, as found at run time.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    macro_rules! found {
        ($($name:tt)*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
                .into_iter()
                .filter_map(|(name, found)| found.then_some(name))
                .collect()
        };
    }
    found!("sse4.2" "avx" "f16c" "fma" "avx2" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16")
}

/// The vector extensions that the CPU kernels can use, as found at run time.
#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    if std::arch::is_aarch64_feature_detected!("neon") { vec!["neon"] } else { Vec::new() }
}

/// No vector extension is used on other architectures.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
