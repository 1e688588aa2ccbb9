//! Counts of test cases.

use std::fs::OpenOptions;
use std::io::Write;

/// Reports that `count` cases of the suite `name` have passed: on stdout, and as a line `name count` appended to the
/// file that `GD_CASE_LOG` names, from which `.ci/run` takes its totals. Call it after the last assertion.
///
/// # Panics
/// When that file cannot be written, since a missing count would hide a suite that did not run.
pub fn log_cases(name: &str, count: usize) {
    println!("cases {name}: {count} run");
    if let Some(path) = std::env::var_os("GD_CASE_LOG") {
        // One write of one line: tests on several threads and processes do not mix their lines.
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{name} {count}\n").as_bytes()));
        if let Err(e) = written {
            panic!("GD_CASE_LOG={}: {e}", path.display());
        }
    }
}

/// The number of cases that a suite runs: that of the environment variable `variable`, or else `default`.
///
/// # Panics
/// When the variable holds no number, since the suite would run fewer cases than it was asked for.
pub fn case_count(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{variable}={text:?} is not a number of cases")),
        Err(_) => default,
    }
}
