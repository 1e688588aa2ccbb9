//! Operators, layers and models on tensors of the CPU with an emulated GPU in its place: the code path of a CUDA or
//! Metal build, against the CPU's own.
//!
//! The suites of operators are those that `crates/gd-kernels/tests/device` runs on a real GPU.

mod ahead;
#[path = "../../../../crates/gd-kernels/tests/device/cache.rs"]
mod cache;
mod generation;
#[path = "../../../../crates/gd-kernels/tests/device/gradients.rs"]
mod gradients;
#[path = "../../../../crates/gd-kernels/tests/device/graph.rs"]
mod graph;
mod layers;
#[path = "../../../../crates/gd-kernels/tests/device/prefill.rs"]
mod prefill;
#[path = "../../../../crates/gd-kernels/tests/problems/mod.rs"]
mod problems;
#[path = "../../../../crates/gd-kernels/tests/device/repeats.rs"]
mod repeats;
mod training;

use std::sync::Arc;

use candle_core::Device;
use gd_emulate::Emulator;
use gd_kernels::gpu::emulate;

/// Problems are small here.
pub(crate) fn sanitized() -> bool {
    true
}

/// An emulated GPU.
pub(crate) struct Target {
    gpu: Arc<Emulator>,
    name: &'static str,
}

/// An NVIDIA GPU with the portable kernels, one with Hopper's, and an Apple GPU.
pub(crate) fn targets() -> [Target; 3] {
    [("cuda", Emulator::new(1)), ("cuda", Emulator::new(2).on_hopper()), ("metal", Emulator::metal(3))]
        .map(|(name, gpu)| Target { gpu: Arc::new(gpu), name })
}

impl Target {
    /// Where its tensors lie.
    pub(crate) fn device(&self) -> &'static Device {
        &Device::Cpu
    }

    /// Calls operators on such tensors.
    pub(crate) fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        emulate(&self.gpu, f)
    }

    /// Its name in plans and in the support table.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// A case has run, and not on the CPU.
    pub(crate) fn count(&self) {
        assert!(self.gpu.launches() > 0, "no kernel has run on {}", self.name);
        gd_support::log_cases("emulated-tensors", 1);
    }

    /// The emulator takes its memory from the host, which has no fixed limit.
    pub(crate) fn check_memory(&self) {}
}
