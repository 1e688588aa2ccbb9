//! The GPU operators with their real kernels on the emulated device, against the f64 reference: generated problems,
//! several schedules, poisoned memory, and seeded faults that the problems must detect. Then operators on tensors,
//! layers, models and training with the emulated device in place of a GPU, against the CPU path.

#[path = "../../suites/beacon.rs"]
mod beacon;
#[path = "../../suites/cache.rs"]
mod cache;
#[path = "../../suites/certified.rs"]
mod certified;
#[path = "../../suites/decode.rs"]
mod decode;
mod faults;
mod generation;
#[path = "../../suites/gradients.rs"]
mod gradients;
#[path = "../../suites/graph.rs"]
mod graph;
#[path = "../../suites/hopper.rs"]
mod hopper;
mod in_flight;
mod kernels;
mod layers;
mod metal_bindings;
mod model_training;
#[path = "../../suites/overflow.rs"]
mod overflow;
mod params;
mod plans;
#[path = "../../suites/prefill.rs"]
mod prefill;
#[path = "../../suites/quantize.rs"]
mod quantize;
#[path = "../../suites/repeats.rs"]
mod repeats;
mod rounds;
#[path = "../../suites/scan.rs"]
mod scan;
mod schedules;
#[path = "../../suites/select.rs"]
mod select;
mod target;
#[path = "../../suites/tensors.rs"]
mod tensors;
#[path = "../../suites/training.rs"]
mod training;

pub(crate) use target::{Target, sanitized, suite, suites, targets};
