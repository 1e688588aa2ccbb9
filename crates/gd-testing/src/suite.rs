//! Runs a suite of generated problems, on the emulator and on a device alike.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The outcome of a check: a text that says what is wrong, if anything is.
pub type Verdict = Result<(), String>;

/// Returns an error with the text from the function around it unless the condition holds. A comparison with NaN does
/// not hold.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($text)*));
        }
    };
}

/// Runs the cases of seeds `0..count` on all cores and starts no more after five failures.
///
/// # Panics
/// When a case fails; its seed and text are printed.
pub fn run(name: &str, count: u64, case: impl Fn(u64) -> Verdict + Sync) {
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
