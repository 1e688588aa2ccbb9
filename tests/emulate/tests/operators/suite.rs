//! How a suite of generated problems is run, on the emulator and on a device alike.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// What is wrong with a result.
pub(crate) type Verdict = Result<(), String>;

/// Ends a check with a text unless a condition holds; NaN in a comparison does not hold.
macro_rules! ensure {
    ($held:expr, $($text:tt)*) => {
        let held: bool = $held;
        if !held {
            return Err(format!($($text)*));
        }
    };
}
pub(crate) use ensure;

/// Runs the cases of seeds `0..count` on all cores, and fails if one is wrong. After five nothing more is begun.
pub(crate) fn run(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    let (next, wrong) = (AtomicU64::new(0), AtomicUsize::new(0));
    let started = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count || wrong.load(Ordering::Relaxed) >= 5 {
                        break;
                    }
                    if let Err(e) = case(seed) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                        println!("{name}, seed {seed}: {e}");
                    }
                }
            });
        }
    });
    assert_eq!(wrong.load(Ordering::Relaxed), 0, "{name}: see above");
    println!("{name}: {count} problems in {:.1} s", started.elapsed().as_secs_f64());
}
