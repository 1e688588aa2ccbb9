//! Peak memory, in a process without other tests beside it.

use std::hint::black_box;

use gd_model::memory::Peak;

const MIB: usize = 1 << 20;

#[test]
fn a_peak_counts_what_was_freed_until_the_next_start() {
    // A system that does not tell has nothing to test.
    let Some(peak) = Peak::start() else { return };
    drop(black_box(vec![1u8; 64 * MIB]));
    let above = peak.above_start().unwrap_or(0.0);
    assert!((60.0..80.0).contains(&above), "{above} MiB");
    assert!(peak.mib().is_some_and(|m| m > above), "{peak:?}");
    let next = Peak::start().and_then(Peak::above_start).unwrap_or(f64::NAN);
    assert!(next < 10.0, "{next} MiB");
}
