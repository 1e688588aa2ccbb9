//! The emulator as the device of the suites.

use std::sync::Arc;

use candle_core::Device;
use gd_kernels::gpu::emulate;
use gd_testing::suite::{self, Verdict};
pub(crate) use gd_testing::{Buffer, Emulator as TestGpu};

/// Whether the suites of tensors run small problems, as under a sanitizer. Always, since the emulator is slow.
pub(crate) fn sanitized() -> bool {
    true
}

/// Runs the cases of seeds `0..count` and counts them.
pub(crate) fn suite(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    suite::run(name, count, case);
    gd_testing::log_cases("emulated", count as usize);
}

/// Runs a suite on CUDA and on Metal with these numbers of problems; schedules are seeded from `shift` on.
pub(crate) fn suites(
    name: &str,
    [cuda, metal]: [u64; 2],
    shift: u64,
    check: impl Fn(&TestGpu, u64) -> Verdict + Sync,
) {
    suite(name, cuda, |seed| check(&TestGpu::new(seed + shift), seed));
    suite::run(&format!("{name}, Metal"), metal, |seed| check(&TestGpu::metal(seed + shift), seed));
    gd_testing::log_cases("emulated-metal", metal as usize);
}

/// An emulated GPU in place of a real one, for operators on tensors.
pub(crate) struct Target {
    gpu: Arc<TestGpu>,
    name: &'static str,
}

/// An NVIDIA GPU with the portable kernels, one with Hopper's, and an Apple GPU.
pub(crate) fn targets() -> [Target; 3] {
    [("cuda", TestGpu::new(1)), ("cuda", TestGpu::new(2).on_hopper()), ("metal", TestGpu::metal(3))]
        .map(|(name, gpu)| Target { gpu: Arc::new(gpu), name })
}

impl Target {
    /// The device of its tensors.
    pub(crate) fn device(&self) -> &'static Device {
        &Device::Cpu
    }

    /// Runs `f`, in which operators on CPU tensors launch emulated kernels.
    pub(crate) fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        emulate(&self.gpu, f)
    }

    /// Its name in plans and in the support table.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Counts a case.
    ///
    /// # Panics
    /// When no kernel has been launched.
    pub(crate) fn count(&self) {
        assert!(self.gpu.launches() > 0, "no kernel has run on {}", self.name);
        gd_testing::log_cases("emulated-tensors", 1);
    }

    /// The emulator takes its memory from the host, which has no fixed limit.
    pub(crate) fn check_memory(&self) {}
}
