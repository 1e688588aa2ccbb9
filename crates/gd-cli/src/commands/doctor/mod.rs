//! `gd doctor`: describes the machine and checks that all parameters of a model get a gradient.

mod gpu;

use std::fmt;

use anyhow::{Result, bail};
use gd_model::analysis::gradient_check::{Fault, check};
use gd_model::analysis::variants::variants;
use gd_model::config::{Recipe, device};
use serde::Serialize;

use self::gpu::{Cuda, Metal};
use crate::context::Context;

/// List device, threads and CPU features, and check the gradients of a preset
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The gradient check builds the configuration with every mechanism, replaces zero-initialized matrices \
                  by small random values, runs one backward pass, and names every parameter whose gradient is absent, \
                  all zero or not finite. The exit code is 1 if there is one.\n\n\
                  Example:\n  gd doctor --config tiny --json"
)]
pub struct Args {
    /// Preset of models/, or a TOML or JSON configuration file, for the gradient check
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: String,
}

/// The result of the command.
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
    gradients: Vec<GradientCheck>,
}

/// The gradient check of one mechanism.
#[derive(Debug, Serialize)]
struct GradientCheck {
    mechanism: &'static str,
    /// Number of parameter tensors.
    parameters: usize,
    faults: Vec<Fault>,
}

impl GradientCheck {
    /// The parameters without a usable gradient, or `None` if all have one.
    fn failure(&self) -> Option<String> {
        let names: Vec<_> = self.faults.iter().map(|f| f.parameter.as_str()).collect();
        (!names.is_empty()).then(|| format!("{}: {}", self.mechanism, names.join(", ")))
    }
}

/// Runs the command.
///
/// # Errors
/// A configuration that is not valid, or a parameter without a usable gradient.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let base = Recipe::load(&args.config)?.model;
    let mut gradients = Vec::new();
    for v in variants().iter().filter(|v| v.applies(&base)) {
        let (parameters, faults) = check(&v.config(&base)?, ctx.seed(), &ctx.device)?;
        gradients.push(GradientCheck { mechanism: v.name, parameters, faults });
    }
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: device::name(&ctx.device),
        cuda_built_in: candle_core::utils::cuda_is_available(),
        cuda: Cuda::detect(),
        metal_built_in: candle_core::utils::metal_is_available(),
        metal: Metal::detect(),
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
    let failures: Vec<_> = report.gradients.iter().filter_map(GradientCheck::failure).collect();
    if !failures.is_empty() {
        bail!("{}: parameters without a usable gradient: {}", report.config, failures.join("; "));
    }
    Ok(())
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes_or_no = |b| if b { "yes" } else { "no" };
        let features = match &self.cpu_features[..] {
            [] => "none that the kernels use".into(),
            features => features.join(" "),
        };
        writeln!(f, "gd            {}", self.version)?;
        writeln!(f, "device        {}", self.device)?;
        match &self.cuda {
            Some(cuda) => writeln!(f, "CUDA built in {cuda}")?,
            None => writeln!(f, "CUDA built in {}", yes_or_no(self.cuda_built_in))?,
        }
        match &self.metal {
            Some(metal) => writeln!(f, "Metal         {metal}")?,
            None => writeln!(f, "Metal         {}", yes_or_no(self.metal_built_in))?,
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

/// The vector extensions of this CPU that the kernels can use.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    macro_rules! detect {
        ($($name:tt)*) => {
            [$(($name, std::arch::is_x86_feature_detected!($name))),*]
                .into_iter()
                .filter_map(|(name, detected)| detected.then_some(name))
                .collect()
        };
    }
    detect!("sse4.2" "avx" "f16c" "fma" "avx2" "avx512f" "avx512bw" "avx512vl" "avx512vnni" "avx512bf16")
}

/// The vector extensions of this CPU that the kernels can use.
#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    if std::arch::is_aarch64_feature_detected!("neon") { vec!["neon"] } else { Vec::new() }
}

/// The kernels use no vector extensions on other architectures.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    Vec::new()
}
