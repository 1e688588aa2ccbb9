//! Rules about single lines and about the length of files. Patterns are written in two parts, so that this file keeps
//! the rules that it states.

use super::{Violation, extension};

/// Extensions of source files, which begin with a comment and have a limited length.
const SOURCE: [&str; 5] = ["rs", "cu", "cuh", "metal", "h"];
/// Maximum number of lines of a file, and of a file below kernels/.
const MAX_LINES: usize = 600;
const MAX_KERNEL_LINES: usize = 800;

/// Marks of unfinished or disabled work.
const UNFINISHED: [&str; 6] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("db", "g!("),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("#[ig", "nore"),
];
/// Paths that exist on one machine only.
const MACHINE: [&str; 5] = [
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/wo", "rk/"),
    concat!("/Us", "ers/"),
    concat!("/tm", "p/"),
];
/// Package registries, which only cargo's own files name.
const REGISTRIES: [&str; 5] = [
    concat!("crates", ".io"),
    concat!("py", "pi.org"),
    concat!("python", "hosted.org"),
    concat!("registry.npm", "js"),
    concat!("deb.deb", "ian.org"),
];
/// Where unsafe code is allowed: the operators, the emulator that executes their kernels, memory-mapped files, arrays of
/// Python, and the environment of the program.
const UNSAFE_ALLOWED: [&str; 5] = [
    "crates/gd-cli/src/main.rs",
    "crates/gd-kernels/",
    "crates/gd-testing/",
    "crates/gd-model/src/data/map.rs",
    "crates/gd-python/src/array.rs",
];
/// Unsafe code.
const UNSAFE: [&str; 4] = [
    concat!("uns", "afe {"),
    concat!("uns", "afe fn"),
    concat!("uns", "afe impl"),
    concat!("uns", "afe extern"),
];

/// Folders, and the crates that files below them must not name: crates depend on lower layers only.
const UPWARD: [(&str, &[&str]); 3] = [
    ("crates/gd-kernels/", &["gd_layer", "gd_model", "gd_cli", "gd-layer", "gd-model", "gd-cli"]),
    ("crates/gd-layer/", &["gd_model", "gd_cli", "gd-model", "gd-cli"]),
    ("crates/gd-model/", &["gd_cli", "gd-cli"]),
];

/// Checks one file's text; `file` is its path from the root.
pub fn check_text(file: &str, text: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut report = |line: usize, rule: String| {
        violations.push(Violation { file: file.to_owned(), line: line + 1, rule })
    };
    let kind = extension(file);
    if SOURCE.contains(&kind) && !opens_with_comment(kind, text) {
        report(0, "the first line is no header comment".into());
    }
    let limit = if file.starts_with("kernels/") { MAX_KERNEL_LINES } else { MAX_LINES };
    let lines = text.lines().count();
    if lines > limit && kind != "json" {
        report(limit, format!("{lines} lines, more than {limit}"));
    }
    // Documents may name the crates above, and so may the comments of a manifest.
    let upward: Vec<&str> = match kind {
        "rs" | "toml" => UPWARD
            .iter()
            .filter(|(folder, _)| file.starts_with(folder))
            .flat_map(|(_, names)| *names)
            .copied()
            .collect(),
        _ => Vec::new(),
    };
    for (n, line) in text.lines().enumerate() {
        let mut forbid = |line: &str, words: &[&str], why: &str| {
            for word in words.iter().filter(|w| line.contains(**w)) {
                report(n, format!("`{word}`: {why}"));
            }
        };
        forbid(line, &UNFINISHED, "unfinished or silenced work");
        forbid(line, &MACHINE, "a path of one machine");
        forbid(line, &REGISTRIES, "a registry host");
        forbid(without_comment(kind, line), &upward, "an upward import");
        if kind == "rs" && !UNSAFE_ALLOWED.iter().any(|place| file.starts_with(place)) {
            forbid(line, &UNSAFE, "unsafe code outside the places for it");
        }
    }
    violations
}

fn opens_with_comment(kind: &str, text: &str) -> bool {
    let first = text.lines().next().unwrap_or_default();
    match kind {
        "rs" => first.starts_with("//!"),
        _ => first.starts_with("//") || first.starts_with("/*"),
    }
}

/// A line up to its comment.
fn without_comment<'a>(kind: &str, line: &'a str) -> &'a str {
    let mark = if kind == "toml" { "#" } else { "//" };
    line.split(mark).next().unwrap_or_default()
}
