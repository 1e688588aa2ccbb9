//! Every operator of the GPU, its real sources executed on the host, against the f64 reference: generated
//! problems, several schedules, poisoned memory, and seeded faults that must be seen.

#[path = "../../../../crates/gd-kernels/tests/problems/mod.rs"]
mod problems;

mod beacon;
mod certified;
mod decode;
mod device;
mod faults;
mod hopper;
mod plans;
mod quantize;
mod rounds;
mod scan;
mod schedules;
mod select;
mod suite;
mod training;

pub(crate) use suite::{Verdict, ensure};

use gd_emulate::Emulator;

/// Runs the cases of seeds `0..count` and counts them.
pub(crate) fn suite(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    suite::run(name, count, case);
    gd_support::log_cases("emulated", count as usize);
}

/// The same on both devices: so many problems on CUDA, so many on Metal, schedules from `shift` on.
pub(crate) fn suites(
    name: &str,
    [cuda, metal]: [u64; 2],
    shift: u64,
    check: impl Fn(&Emulator, u64) -> Verdict + Sync,
) {
    suite(name, cuda, |seed| check(&Emulator::new(seed + shift), seed));
    suite::run(&format!("{name}, Metal"), metal, |seed| check(&Emulator::metal(seed + shift), seed));
    gd_support::log_cases("emulated-metal", metal as usize);
}
