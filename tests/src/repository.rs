//! The rules that every file of the repository keeps. Patterns are spelled in two pieces, so that
//! this file does not break the rules it states.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A broken rule, printed as `file:line: rule`.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation {
    /// The file, relative to the root.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.rule)
    }
}

/// Files whose text is ours to check.
const TEXT: [&str; 13] =
    ["rs", "cu", "cuh", "metal", "h", "md", "toml", "sh", "py", "yml", "yaml", "json", "run"];
/// Source files: these open with a comment and stay short.
const SOURCE: [&str; 5] = ["rs", "cu", "cuh", "metal", "h"];
/// What git ignores, and git itself.
const SKIPPED: [&str; 4] = ["target", "out", "runs", ".git"];
/// The same, at the root alone: texts and models that scripts have fetched.
const FETCHED: &str = "data";

/// Unfinished or silenced work.
const UNFINISHED: [&str; 6] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("db", "g!("),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("#[ig", "nore"),
];
/// Places that exist on one machine only.
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
/// Where code that the compiler does not check is allowed: the operators, what executes their kernels in tests,
/// and the mapping of files.
const UNCHECKED: [&str; 3] = ["crates/gd-kernels/", "tests/emulate/", "crates/gd-model/src/data/map.rs"];
/// Such code.
const UNSAFE: [&str; 4] = [
    concat!("uns", "afe {"),
    concat!("uns", "afe fn"),
    concat!("uns", "afe impl"),
    concat!("uns", "afe extern"),
];

/// Folders, and the names that files below them must not use: the layers point downwards only.
const UPWARD: [(&str, &[&str]); 5] = [
    ("crates/gd-kernels/", &["gd_layer", "gd_model", "gd-layer =", "gd-model =", "gd-layer.", "gd-model."]),
    ("crates/gd-layer/", &["gd_model", "gd-model =", "gd-model."]),
    // The reference shares no code with what it judges.
    ("crates/gd-kernels/src/reference", &["crate::ops", "crate::backend", "crate::cache"]),
    ("crates/gd-kernels/src/ops", &["crate::reference"]),
    ("tests/support/", &["gd_kernels", "gd_layer", "gd_model"]),
];

/// The repository's root, found from this package's folder.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// Checks every text file below `root`; returns the files seen and the violations found.
///
/// # Errors
/// Names the folder or file that cannot be read.
pub fn check(root: &Path) -> Result<(usize, Vec<Violation>)> {
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.retain(|path| !path.starts_with(root.join(FETCHED)));
    files.sort();
    let mut found = Vec::new();
    for path in &files {
        let name = path.strip_prefix(root)?.to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(path).with_context(|| name.clone())?;
        found.extend(check_text(&name, &text));
        if name == "README.md" {
            found.extend(dead_paths(root, &name, &text));
        }
    }
    Ok((files.len(), found))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let at = || folder.display().to_string();
    for entry in fs::read_dir(folder).with_context(at)? {
        let path = entry.with_context(at)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                collect(&path, files)?;
            }
        } else if TEXT.contains(&extension(&name)) {
            files.push(path);
        }
    }
    Ok(())
}

/// The part after the last dot, or the whole name without one.
fn extension(name: &str) -> &str {
    let base = name.rsplit('/').next().unwrap_or(name);
    base.rsplit('.').next().unwrap_or(base)
}

/// Checks one file's text; `file` is its path from the root.
pub fn check_text(file: &str, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut report =
        |line: usize, rule: String| found.push(Violation { file: file.to_owned(), line: line + 1, rule });
    let kind = extension(file);
    if SOURCE.contains(&kind) {
        let first = text.lines().next().unwrap_or_default();
        let opens = if kind == "rs" {
            first.starts_with("//!")
        } else {
            first.starts_with("//") || first.starts_with("/*")
        };
        if !opens {
            report(0, "the first line is no header comment".into());
        }
    }
    let limit = if file.starts_with("kernels/") { 800 } else { 600 };
    let lines = text.lines().count();
    if lines > limit && kind != "json" {
        report(limit, format!("{lines} lines, more than {limit}"));
    }
    let upward =
        UPWARD.iter().filter(|(folder, _)| file.starts_with(folder)).flat_map(|(_, names)| names.iter());
    let model_module = file.starts_with("crates/gd-model/src/")
        && !file.starts_with("crates/gd-model/src/commands")
        && !file.ends_with("/main.rs");
    let upward: Vec<&str> = upward.copied().chain(model_module.then_some("crate::commands")).collect();
    for (n, line) in text.lines().enumerate() {
        let mut forbid = |words: &[&str], why: &str| {
            for word in words.iter().filter(|w| line.contains(**w)) {
                report(n, format!("`{word}`: {why}"));
            }
        };
        forbid(&UNFINISHED, "unfinished or silenced work");
        forbid(&MACHINE, "a path of one machine");
        forbid(&REGISTRIES, "a registry host");
        forbid(&upward, "an upward import");
        if kind == "rs" && !UNCHECKED.iter().any(|place| file.starts_with(place)) {
            forbid(&UNSAFE, "unchecked code outside the places for it");
        }
    }
    found
}

/// The paths in backticks that `text` names and that do not exist below `root`.
fn dead_paths(root: &Path, file: &str, text: &str) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut fenced = false;
    for (n, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            for path in line.split('`').skip(1).step_by(2).filter(|p| looks_like_a_path(p)) {
                if !root.join(path).exists() {
                    found.push(Violation {
                        file: file.to_owned(),
                        line: n + 1,
                        rule: format!("`{path}` does not exist"),
                    });
                }
            }
        }
    }
    found
}

/// `crates/gd-model`, `.ci/run` or `README.md`, but not `out/tiny` (written by a command),
/// `q/k` (too short to be one of ours) or `gd train`.
fn looks_like_a_path(s: &str) -> bool {
    let plain = !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-/".contains(c));
    let written = SKIPPED.iter().any(|folder| s.split('/').next() == Some(folder));
    let first = s.split('/').next().unwrap_or_default();
    let file = ["md", "rs", "toml"].contains(&extension(s)) && s.contains('.');
    plain && !written && (file || (s.contains('/') && first.len() > 1))
}
