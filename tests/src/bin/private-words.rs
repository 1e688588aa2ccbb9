//! Lists the names in crates/*/src that use a word the repository rules refuse, with the terms to use instead.
//!
//! `cargo run -p gd-tests --bin private-words [PATH_PREFIX..]`, such as `crates/gd-layer`; without one, all of them.
//! The exit code is 1 if there are any.

use std::process::ExitCode;

use gd_tests::repository::{private_words, root};

fn main() -> anyhow::Result<ExitCode> {
    let prefixes: Vec<String> = std::env::args().skip(1).collect();
    let mut violations = private_words(&root())?;
    violations.retain(|v| prefixes.is_empty() || prefixes.iter().any(|prefix| v.file.starts_with(prefix)));
    for violation in &violations {
        println!("{violation}");
    }
    println!("{} names", violations.len());
    Ok(if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
