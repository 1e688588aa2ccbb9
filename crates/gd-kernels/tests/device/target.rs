//! The GPU of this build as the device of the suites.

use std::sync::OnceLock;

use candle_core::Device;
use gd_kernels::Result;
use gd_kernels::gpu::{Arch, Gpu, Launch, Slice, TensorMap};
use gd_testing::suite::{self, Verdict};

/// The backend of this build.
#[cfg(feature = "cuda")]
mod backend {
    pub(super) const NAME: &str = "cuda";
    pub(crate) use gd_kernels::cuda::Buffer;
    pub(super) use gd_kernels::cuda::Cuda as Device;

    pub(super) fn open() -> gd_kernels::Result<candle_core::Device> {
        gd_kernels::cuda::open(0)
    }
}

/// The backend of this build.
#[cfg(not(feature = "cuda"))]
mod backend {
    pub(super) const NAME: &str = "metal";
    pub(crate) use gd_kernels::metal::Buffer;
    pub(super) use gd_kernels::metal::Metal as Device;
    pub(super) use gd_kernels::metal::open;
}

pub(crate) use backend::Buffer;

/// Whether only the first problems of each suite are run.
pub(crate) fn sanitized() -> bool {
    std::env::var_os("GD_SANITIZE").is_some_and(|x| x == "1")
}

/// The first GPU.
pub(crate) fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| backend::open().unwrap_or_else(|e| panic!("these tests need a GPU: {e}")))
}

/// A GPU for the suites of tensors, which the emulator runs, too.
pub(crate) struct Target;

/// The targets of this build.
pub(crate) fn targets() -> [Target; 1] {
    [Target]
}

impl Target {
    /// The device of its tensors.
    pub(crate) fn device(&self) -> &'static Device {
        gpu()
    }

    /// Calls operators on such tensors.
    pub(crate) fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        f()
    }

    /// Its name in plans and in the support table.
    pub(crate) fn name(&self) -> &'static str {
        backend::NAME
    }

    /// Counts a case.
    pub(crate) fn count(&self) {
        gd_testing::log_cases("device", 1);
    }

    /// Checks that an allocation of more memory than the device has is an error that names it.
    pub(crate) fn check_memory(&self) {
        let e = backend::Device::new(gpu()).unwrap().allocate(1 << 42).map(|_| ()).expect_err("4 TiB");
        assert!(e.to_string().contains("4194304.0 MiB of GPU memory"), "{e}");
    }
}

/// Runs the cases of seeds `0..count`, or only the first ones, and counts them.
pub(crate) fn suite(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    let count = if sanitized() { count.min(12) } else { count };
    suite::run(name, count, case);
    gd_testing::log_cases("device", count as usize);
}

/// Runs the problems that the emulator runs for this kind of device.
pub(crate) fn suites(name: &str, [cuda, metal]: [u64; 2], shift: u64, check: fn(&TestGpu, u64) -> Verdict) {
    let count = if cfg!(feature = "cuda") { cuda } else { metal };
    suite(name, count, |seed| check(&TestGpu::new(seed + shift), seed));
}

/// The device, with the interface of the emulator.
pub(crate) struct TestGpu(backend::Device);

impl TestGpu {
    /// The device; unlike the emulator, it takes no seed for its schedule.
    pub(crate) fn new(_: u64) -> Self {
        Self(backend::Device::new(gpu()).unwrap())
    }

    /// Returns itself: whether the kernels for Hopper run depends on the device.
    #[must_use]
    pub(crate) fn on_hopper(self) -> Self {
        self
    }

    /// The same device, in the interface of the emulator a second one.
    pub(crate) fn twin(&self, seed: u64) -> Self {
        Self::new(seed)
    }
}

impl Gpu for TestGpu {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.0.arch()
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        // Filled so that elements which a kernel does not write are NaN, or -1 in integers.
        self.0.upload(&vec![0xff; bytes])
    }

    fn zeros(&self, bytes: usize) -> Result<Buffer> {
        self.0.zeros(bytes)
    }

    fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        self.0.upload(bytes)
    }

    fn download(&self, from: Slice<'_, Buffer>, bytes: usize) -> Result<Vec<u8>> {
        self.0.download(from, bytes)
    }

    fn launch(&self, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.0.launch(launch)
    }

    fn launch_mapped(&self, map: &TensorMap<'_, Buffer>, launch: &Launch<'_, Buffer>) -> Result<()> {
        self.0.launch_mapped(map, launch)
    }
}
