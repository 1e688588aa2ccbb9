//! Every operator of the GPU, its real sources executed on the host, against the f64 reference: generated
//! problems, several schedules, poisoned memory, and seeded faults that must be seen.

#[path = "../../../../crates/gd-kernels/tests/problems/mod.rs"]
mod problems;

mod beacon;
mod decode;
mod device;
mod faults;
mod plans;
mod quantize;
mod rounds;
mod scan;
mod schedules;
mod select;
mod suite;

pub(crate) use suite::{Verdict, ensure};

/// Runs the cases of seeds `0..count` and counts them.
pub(crate) fn suite(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    suite::run(name, count, case);
    gd_support::log_cases("emulated", count as usize);
}
