//! The gd program: everything it does is in [`gd_model::commands`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    gd_model::commands::main()
}
