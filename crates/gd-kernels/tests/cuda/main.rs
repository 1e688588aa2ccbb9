//! The operators on a CUDA device: the suites of tests/emulate with the device in the place of the emulator,
//! each against the f64 reference; candle's graph on it against the CPU; and repetitions, equal to the bit.
//!
//! Needs a GPU, and fails without one. `GD_SANITIZE=1` runs a few problems of each suite, for compute-sanitizer.

// The suites name the emulator; here its name stands for the device below.
extern crate self as gd_emulate;

#[path = "../../../../tests/emulate/tests/operators/beacon.rs"]
mod beacon;
mod cache;
#[path = "../../../../tests/emulate/tests/operators/decode.rs"]
mod decode;
#[path = "../../../../tests/emulate/tests/operators/device.rs"]
mod device;
mod graph;
#[path = "../problems/mod.rs"]
mod problems;
#[path = "../../../../tests/emulate/tests/operators/quantize.rs"]
mod quantize;
mod repeats;
#[path = "../../../../tests/emulate/tests/operators/scan.rs"]
mod scan;
#[path = "../../../../tests/emulate/tests/operators/select.rs"]
mod select;
#[path = "../../../../tests/emulate/tests/operators/suite.rs"]
mod suite;

use std::sync::OnceLock;

use candle_core::Device;
use gd_kernels::Result;
pub use gd_kernels::cuda::Buffer;
use gd_kernels::cuda::{Cuda, open};
use gd_kernels::gpu::{Arch, Gpu, Launch, Slice};
pub(crate) use suite::{Verdict, ensure};

/// Whether only a few problems are run.
pub(crate) fn sanitized() -> bool {
    std::env::var_os("GD_SANITIZE").is_some_and(|x| x == "1")
}

/// The first GPU.
pub(crate) fn gpu() -> &'static Device {
    static GPU: OnceLock<Device> = OnceLock::new();
    GPU.get_or_init(|| open(0).unwrap_or_else(|e| panic!("these tests need a GPU: {e}")))
}

/// Runs the cases of seeds `0..count`, or the first few, and counts them.
pub(crate) fn suite(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    let count = if sanitized() { count.min(12) } else { count };
    suite::run(name, count, case);
    gd_support::log_cases("device", count as usize);
}

/// The device, under the emulator's name.
pub struct Emulator(Cuda);

impl Emulator {
    /// The device; it makes its own schedules.
    pub fn new(_: u64) -> Self {
        Self(Cuda::new(gpu()).unwrap())
    }
}

impl Gpu for Emulator {
    type Buffer = Buffer;

    fn arch(&self) -> Arch {
        self.0.arch()
    }

    fn allocate(&self, bytes: usize) -> Result<Buffer> {
        // What a kernel leaves unwritten is NaN, or -1 in integers.
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
}
