//! `gd doctor`: what this machine offers, and whether every parameter learns.

use std::fmt;

use anyhow::{Result, bail};
use gd_model::analysis::gradient_check::{Fault, check};
use gd_model::analysis::variants::VARIANTS;
use gd_model::config::Recipe;
use gd_model::config::device;
use serde::Serialize;

use super::Context;

/// List device, threads and CPU features, and check the gradients of a preset
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The gradient check builds the configuration with every mechanism, gives matrices that start at \
                  zero small random values, runs one backward pass, and names every parameter whose gradient is \
                  absent, all zero or not finite; the exit code is 1 if there is one.\n\n\
                  Example:\n  gd doctor --config tiny --json"
)]
pub struct Args {
    /// A preset of models/ or a TOML or JSON file with a configuration, for the gradient check
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: String,
}

/// What the command reports.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: String,
    cuda_built_in: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    cuda: Option<Cuda>,
    metal_built_in: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    metal: Option<Metal>,
    architecture: &'static str,
    threads: usize,
    cpu_features: Vec<&'static str>,
    operators: Vec<String>,
    config: String,
    gradients: Vec<Check>,
}

/// What a build with CUDA finds.
#[derive(Debug, Serialize)]
struct Cuda {
    /// A hash of the code of all kernels in the program.
    kernels: &'static str,
    gpus: Vec<Gpu>,
    /// Why there is none, or why one does not open.
    missing: Option<String>,
}

/// A GPU.
#[derive(Debug, Serialize)]
struct Gpu {
    device: String,
    name: String,
    compute_capability: String,
    memory_mib: usize,
    free_mib: usize,
}

#[cfg(feature = "cuda")]
impl Cuda {
    fn find() -> Option<Self> {
        use gd_kernels::cuda::{count, describe, kernel_hash, open};
        let mut gpus = Vec::new();
        let mut look = || -> gd_kernels::Result<()> {
            for number in 0..count()? {
                let gpu = describe(&open(number)?)?;
                let (major, minor) = gpu.compute_capability;
                gpus.push(Gpu {
                    device: format!("cuda:{number}"),
                    name: gpu.name,
                    compute_capability: format!("{major}.{minor}"),
                    memory_mib: gpu.memory >> 20,
                    free_mib: gpu.free >> 20,
                });
            }
            Ok(())
        };
        let missing = look().err().map(|e| e.to_string());
        Some(Self { kernels: kernel_hash(), gpus, missing })
    }
}

#[cfg(not(feature = "cuda"))]
impl Cuda {
    fn find() -> Option<Self> {
        None
    }
}

/// What a build with Metal finds.
#[derive(Debug, Serialize)]
struct Metal {
    /// A hash of the source of all kernels in the program.
    kernels: &'static str,
    /// Name and memory of the GPU, or why it does not open.
    gpu: String,
}

#[cfg(feature = "metal")]
impl Metal {
    fn find() -> Option<Self> {
        use gd_kernels::metal::{describe, kernel_hash, open};
        let gpu = match open().and_then(|device| describe(&device)) {
            Ok(gpu) => {
                format!(
                    "{}, {} MiB to use, {} MiB of them taken",
                    gpu.name,
                    gpu.memory >> 20,
                    gpu.taken >> 20
                )
            }
            Err(e) => e.to_string(),
        };
        Some(Self { kernels: kernel_hash(), gpu })
    }
}

#[cfg(not(feature = "metal"))]
impl Metal {
    fn find() -> Option<Self> {
        None
    }
}

impl fmt::Display for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "yes, kernels {}", self.kernels)?;
        for gpu in &self.gpus {
            let Gpu { device, name, compute_capability, memory_mib, free_mib } = gpu;
            write!(
                f,
                "\n              {device}: {name}, compute capability {compute_capability}, {memory_mib} MiB, \
                 {free_mib} MiB free"
            )?;
        }
        self.missing.as_ref().map_or(Ok(()), |why| write!(f, "\n              {why}"))
    }
}

/// The gradient check of one mechanism.
#[derive(Debug, Serialize)]
struct Check {
    mechanism: &'static str,
    /// Parameter tensors.
    parameters: usize,
    faults: Vec<Fault>,
}

/// Runs the command.
///
/// # Errors
/// A configuration that cannot be used, or a parameter that does not learn.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let base = Recipe::load(&args.config)?.model;
    let mut gradients = Vec::new();
    for v in VARIANTS.iter().filter(|v| v.applies(&base)) {
        let (parameters, faults) = check(&v.config(&base)?, ctx.seed.unwrap_or(0), &ctx.device)?;
        gradients.push(Check { mechanism: v.name, parameters, faults });
    }
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: device::name(&ctx.device),
        cuda_built_in: candle_core::utils::cuda_is_available(),
        cuda: Cuda::find(),
        metal_built_in: candle_core::utils::metal_is_available(),
        metal: Metal::find(),
        architecture: std::env::consts::ARCH,
        threads: rayon::current_num_threads(),
        cpu_features: cpu_features(),
        operators: gd_kernels::support_table().lines().map(str::to_owned).collect(),
        config: args.config,
        gradients,
    };
    if ctx.json {
        ctx.print(serde_json::to_string_pretty(&report)?)?;
    } else {
        ctx.print(&report)?;
    }
    let silent = |c: &Check| {
        let names: Vec<_> = c.faults.iter().map(|f| f.parameter.as_str()).collect();
        (!names.is_empty()).then(|| format!("{}: {}", c.mechanism, names.join(", ")))
    };
    let silent: Vec<_> = report.gradients.iter().filter_map(silent).collect();
    if !silent.is_empty() {
        bail!("{}: parameters without a useful gradient: {}", report.config, silent.join("; "));
    }
    Ok(())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |b| if b { "yes" } else { "no" };
        let features = match &self.cpu_features[..] {
            [] => "none of those used".into(),
            features => features.join(" "),
        };
        writeln!(f, "gd            {}", self.version)?;
        writeln!(f, "device        {}", self.device)?;
        match &self.cuda {
            Some(cuda) => writeln!(f, "CUDA built in {cuda}")?,
            None => writeln!(f, "CUDA built in {}", yes(self.cuda_built_in))?,
        }
        match &self.metal {
            Some(Metal { kernels, gpu }) => {
                writeln!(f, "Metal         yes, kernels {kernels}\n              {gpu}")?
            }
            None => writeln!(f, "Metal         {}", yes(self.metal_built_in))?,
        }
        writeln!(f, "architecture  {}", self.architecture)?;
        writeln!(f, "threads       {}", self.threads)?;
        writeln!(f, "CPU features  {features}")?;
        writeln!(f, "operators     {}", self.operators.join("\n              "))?;
        write!(f, "gradients     of configuration {}", self.config)?;
        for c in &self.gradients {
            let learning = c.parameters - c.faults.len();
            write!(f, "\n  {:<15} {learning} of {} parameters learn", c.mechanism, c.parameters)?;
            for fault in &c.faults {
                write!(f, "\n    {}: {}", fault.parameter, fault.gradient)?;
            }
        }
        Ok(())
    }
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
