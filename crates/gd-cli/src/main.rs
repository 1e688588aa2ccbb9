//! The program `gd`.
#![forbid(unsafe_code)]

/// Stack size of the threads of the pool, equal to the usual stack size of a main thread.
const STACK_BYTES: usize = 8 << 20;

/// Runs the whole program on a thread of the rayon pool. The operators are parallel loops on that pool, and to start
/// one from a thread outside it costs a wake-up and a wait, which is more than the loop costs for a small model.
fn main() -> std::process::ExitCode {
    if let Err(e) = rayon::ThreadPoolBuilder::new().stack_size(STACK_BYTES).build_global() {
        gd_cli::terminal::note(format_args!("error: cannot start threads: {e}"));
        return std::process::ExitCode::FAILURE;
    }
    rayon::scope(|_| gd_cli::commands::main())
}
