//! The gd program: everything it does is in [`gd_cli::commands`].
#![forbid(unsafe_code)]

/// Stack of a thread: what the system gives the main thread of a program.
const STACK: usize = 8 << 20;

/// The whole program runs on a thread of the pool that its operators run on. From any other thread each parallel
/// loop would wake the pool and wait for it, which costs a small model more than the loop.
fn main() -> std::process::ExitCode {
    if let Err(e) = rayon::ThreadPoolBuilder::new().stack_size(STACK).build_global() {
        eprintln!("error: cannot start threads: {e}");
        return std::process::ExitCode::FAILURE;
    }
    rayon::scope(|_| gd_cli::commands::main())
}
