//! The gd program: everything it does is in [`gd_model::commands`].
#![forbid(unsafe_code)]

// Tensors come and go in sizes for which the system's allocator asks the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    gd_model::commands::main()
}
