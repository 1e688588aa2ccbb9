//! The operators on a GPU, by the suites of `crates/gd-testing/suites`: each operator against the f64 reference,
//! candle's graph on the device against the CPU, and repetitions that must give equal bits.
//!
//! With the feature `cuda` or `metal` it needs such a GPU, and fails without one (`scripts/hardware/nvidia_gpu.sh`,
//! `scripts/hardware/apple_gpu.sh`). `GD_SANITIZE=1` runs only the first problems of each suite, under a tool that
//! checks accesses.
#![cfg(any(feature = "cuda", feature = "metal"))]

#[path = "../../../gd-testing/suites/beacon.rs"]
mod beacon;
#[path = "../../../gd-testing/suites/cache.rs"]
mod cache;
#[cfg(feature = "cuda")]
#[path = "../../../gd-testing/suites/certified.rs"]
mod certified;
#[path = "../../../gd-testing/suites/decode.rs"]
mod decode;
#[path = "../../../gd-testing/suites/gradients.rs"]
mod gradients;
#[path = "../../../gd-testing/suites/graph.rs"]
mod graph;
#[path = "../../../gd-testing/suites/hopper.rs"]
mod hopper;
#[path = "../../../gd-testing/suites/overflow.rs"]
mod overflow;
#[cfg(feature = "cuda")]
#[path = "../../../gd-testing/suites/prefill.rs"]
mod prefill;
#[cfg(feature = "cuda")]
#[path = "../../../gd-testing/suites/quantize.rs"]
mod quantize;
#[path = "../../../gd-testing/suites/repeats.rs"]
mod repeats;
#[path = "../../../gd-testing/suites/scan.rs"]
mod scan;
#[path = "../../../gd-testing/suites/select.rs"]
mod select;
mod target;
#[path = "../../../gd-testing/suites/tensors.rs"]
mod tensors;
#[path = "../../../gd-testing/suites/training.rs"]
mod training;

pub(crate) use target::{Target, sanitized, suite, suites, targets};
