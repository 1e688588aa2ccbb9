//! The bits of a result do not depend on the order in which threads and blocks run.

use gd_emulate::Emulator;

use crate::{Verdict, ensure};

/// Runs problems with three schedules each: all that is read back from the device must be the same.
fn same_bits(name: &str, check: fn(&Emulator, u64) -> Verdict) {
    crate::suite(&format!("{name}, three schedules"), 9, |seed| {
        let seed = seed + 700;
        let digest = |schedule: u64| {
            let gpu = Emulator::new(schedule);
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
    same_bits("decode", crate::decode::check);
    same_bits("decode, 8-bit keys", crate::decode::check_certified);
}

#[test]
fn of_selections_and_their_gradients() {
    same_bits("select", crate::select::check);
    same_bits("select, one key a query", crate::select::check_single);
}

#[test]
fn of_convolutions_and_averages() {
    same_bits("conv", crate::beacon::check_conv);
    same_bits("average", crate::beacon::check_average);
}

#[test]
fn other_bits_have_another_digest() {
    use gd_kernels::gpu::Gpu;
    let digest = |x: u8| {
        let gpu = Emulator::new(1);
        let buffer = gpu.upload(&[x]).unwrap();
        gpu.download((&buffer).into(), 1).unwrap();
        gpu.digest()
    };
    assert_ne!(digest(1), digest(2));
    assert_eq!(digest(1), digest(1));
}
