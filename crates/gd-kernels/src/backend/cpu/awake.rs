//! Keeps the threads of rayon's pool awake during a pass of many short parallel loops.
//!
//! A thread of the pool that finds no work goes to sleep after a few tens of microseconds. A decoding step has more than a
//! hundred parallel loops with about as much serial work between some of them, so that many loops would begin with waking the
//! other threads, which takes as long as a part of the loop.

use std::hint;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rayon::Yield;

/// Rounds without work from which on a thread offers its core to other threads in every round. Programs that wait without
/// that lose most of their speed on a machine that has more to do.
const SPINNING_ROUNDS: u32 = 200;
/// Rounds without work after which a thread stops looking for it: about a millisecond. The bound also ends the wait of a thread
/// that began to look for work while it was to wait for a loop of the same pass.
const MAX_IDLE_ROUNDS: u32 = 3000;

/// A pass, during which the other threads of the pool look for work without a pause.
pub(crate) struct Awake {
    runs: Arc<AtomicBool>,
}

impl Awake {
    /// Begins a pass on this thread of the pool, which ends when the result is dropped.
    pub(crate) fn new() -> Self {
        let runs = Arc::new(AtomicBool::new(true));
        if rayon::current_num_threads() > 1 {
            let (own, runs) = (rayon::current_thread_index(), runs.clone());
            rayon::spawn_broadcast(move |thread| {
                if Some(thread.index()) != own {
                    execute_work(&runs);
                }
            });
        }
        Self { runs }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.runs.store(false, Ordering::Release);
    }
}

/// Executes the work of the pool until the pass ends, or for [`MAX_IDLE_ROUNDS`] without work.
fn execute_work(pass_runs: &AtomicBool) {
    let mut idle_rounds = 0;
    while idle_rounds < MAX_IDLE_ROUNDS && pass_runs.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            idle_rounds = 0;
            continue;
        }
        idle_rounds += 1;
        match idle_rounds < SPINNING_ROUNDS {
            true => hint::spin_loop(),
            false => thread::yield_now(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic;
    use std::sync::atomic::AtomicUsize;

    use candle_core::Device;

    use super::*;
    use crate::backend::cpu::parallel::par_items;
    use crate::on_pool;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    /// The only thread of a pool, so that no other one executes the job.
    #[test]
    fn a_thread_executes_work_until_the_pass_ends() {
        let runs = AtomicBool::new(true);
        pool(1).scope(|scope| {
            scope.spawn(|_| runs.store(false, Ordering::Release));
            execute_work(&runs);
            assert!(!runs.load(Ordering::Acquire));
        });
    }

    #[test]
    fn a_thread_without_work_stops_looking_for_it() {
        for threads in [1, 2] {
            pool(threads).install(|| execute_work(&AtomicBool::new(true)));
        }
    }

    /// Passes with loops within loops, from several threads at once, one of which panics each time.
    #[test]
    fn passes_of_several_threads_end() {
        let pool = pool(3);
        let pass = || {
            let sum = AtomicUsize::new(0);
            for _ in 0..20 {
                par_items((0..8).collect(), &|_, i: usize| {
                    par_items((0..4).collect(), &|_, j: usize| {
                        sum.fetch_add(i * j, Ordering::Relaxed);
                    });
                });
            }
            sum.into_inner()
        };
        let failing = || par_items((0..8).collect(), &|_, i: usize| assert!(i < 5, "task {i}"));
        thread::scope(|scope| {
            for caller in 0..4 {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..10 {
                        match caller {
                            0 => {
                                let run = || pool.install(|| on_pool(&Device::Cpu, failing));
                                assert!(panic::catch_unwind(panic::AssertUnwindSafe(run)).is_err());
                            }
                            _ => assert_eq!(pool.install(|| on_pool(&Device::Cpu, pass)), 20 * 28 * 6),
                        }
                    }
                });
            }
        });
    }
}
