//! The bits of a result do not depend on the order in which threads and blocks run.

use crate::target::TestGpu;

use gd_testing::ensure;
use gd_testing::suite::Verdict;

/// Runs `counts` problems on CUDA and on Metal with three schedules each. All bytes read back from the device must be
/// the same.
fn same_bits(name: &str, counts: [u64; 2], check: fn(&TestGpu, u64) -> Verdict) {
    crate::suites(&format!("{name}, three schedules"), counts, 0, |gpu, seed| {
        let seed = seed + 700;
        let digest = |schedule: u64| {
            let gpu = gpu.twin(schedule);
            check(&gpu, seed)?;
            ensure!(gpu.launches() > 0, "nothing was launched");
            Ok(gpu.digest())
        };
        let first = digest(1)?;
        for schedule in 2..4 {
            ensure!(digest(schedule)? == first, "schedule {schedule} gives other bits for problem {seed}");
        }
        Ok(())
    });
}

#[test]
fn of_decoding() {
    same_bits("decode", [9, 9], crate::decode::check);
    same_bits("decode, 8-bit keys", [9, 0], crate::decode::check_certified);
}

#[test]
fn of_scans_with_8_bit_keys() {
    same_bits("scan, 8-bit keys", [9, 0], crate::certified::check);
    same_bits("scan, 8-bit keys, adverse", [8, 0], crate::certified::check_adverse);
}

#[test]
fn of_selections_and_their_gradients() {
    same_bits("select", [9, 9], crate::select::check);
    same_bits("select, one key a query", [9, 9], crate::select::check_single);
    same_bits("refinement rounds", [9, 9], crate::rounds::check);
}

#[test]
fn of_convolutions_and_averages() {
    same_bits("conv", [9, 9], crate::beacon::check_conv);
    same_bits("average", [9, 9], crate::beacon::check_average);
}

#[test]
fn of_training_steps() {
    same_bits("norm", [9, 9], crate::training::check_norm);
    same_bits("rotary", [6, 6], crate::training::check_rotary);
    same_bits("swiglu", [6, 6], crate::training::check_swiglu);
    same_bits("cross entropy", [6, 6], crate::training::check_cross_entropy);
    same_bits("adamw", [9, 9], crate::training::check_adamw);
}

#[test]
fn different_bits_have_different_digests() {
    use gd_kernels::gpu::Gpu;
    let digest = |x: u8| {
        let gpu = TestGpu::new(1);
        let buffer = gpu.upload(&[x]).unwrap();
        gpu.download((&buffer).into(), 1).unwrap();
        gpu.digest()
    };
    assert_ne!(digest(1), digest(2));
    assert_eq!(digest(1), digest(1));
}
