//! Runs a suite of generated problems.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The outcome of a check; the error describes the first difference.
pub type Verdict = Result<(), String>;

/// Returns from the enclosing function with the formatted error unless the condition is true. Write comparisons so that
/// they are false with NaN.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        let condition: bool = $condition;
        if !condition {
            return Err(format!($($text)*));
        }
    };
}

/// Runs the cases of seeds `0..count` on all cores; starts no further case after five failures.
///
/// # Panics
/// When a case fails; its seed and text are printed.
pub fn run(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
    let (next, failures) = (AtomicU64::new(0), AtomicUsize::new(0));
    let started = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count || failures.load(Ordering::Relaxed) >= 5 {
                        break;
                    }
                    if let Err(e) = case(seed) {
                        failures.fetch_add(1, Ordering::Relaxed);
                        println!("{name}, seed {seed}: {e}");
                    }
                }
            });
        }
    });
    assert_eq!(failures.load(Ordering::Relaxed), 0, "{name}: the failed cases are printed above");
    println!("{name}: {count} problems in {:.1} s", started.elapsed().as_secs_f64());
}
