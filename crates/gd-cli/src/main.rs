//! The program `gd`.

/// Stack size of the threads of the pool, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

/// Runs the whole program on a thread of the rayon pool. The operators are parallel loops on that pool, and to start
/// one from a thread outside it costs a wake-up and a wait, which is more than the loop costs for a small model.
fn main() -> std::process::ExitCode {
    configure_candle();
    if let Err(e) = rayon::ThreadPoolBuilder::new().stack_size(STACK_BYTES).build_global() {
        gd_cli::terminal::note(format_args!("error: cannot start threads: {e}"));
        return std::process::ExitCode::FAILURE;
    }
    rayon::scope(|_| gd_cli::commands::main())
}

/// Sets variables that candle reads, unless they are set. candle adds large tensors on threads of its own, which wait for the
/// next ones in a loop, on the cores that the operators of this program need. And where `RAYON_NUM_THREADS` is not set, it
/// reads `/proc/cpuinfo` for every matrix product.
fn configure_candle() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, value) in [("CANDLE_NUM_THREADS", 1), ("RAYON_NUM_THREADS", threads)] {
        if std::env::var_os(name).is_none() {
            // SAFETY: the program has no other thread yet.
            #[allow(unsafe_code)]
            unsafe {
                std::env::set_var(name, value.to_string());
            }
        }
    }
}
