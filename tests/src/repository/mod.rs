//! The rules that every file of the repository keeps.

mod documents;
pub mod imports;
mod lines;
mod order;
mod tokens;
mod words;

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use documents::{Command, commands};
pub use lines::check_text;
pub use order::{ORDERS, TERMS_ENFORCED};

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

/// Extensions of the files whose text is checked.
const TEXT: [&str; 13] =
    ["rs", "cu", "cuh", "metal", "h", "md", "toml", "sh", "py", "yml", "yaml", "json", "run"];
/// Folders that git ignores, and that of git itself.
const SKIPPED: [&str; 5] = ["target", "out", "runs", "book", ".git"];
/// The folder at the root into which scripts download texts and models.
const FETCHED: &str = "data";

/// The repository's root, found from this package's folder.
pub fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// A text file of the repository.
#[derive(Debug)]
pub struct TextFile {
    /// The path from the root, with `/` between folders.
    pub name: String,
    /// The contents.
    pub text: String,
}

/// Reads every text file below `root`, ordered by path. Links to folders are not followed.
///
/// # Errors
/// Names the folder or file that cannot be read.
pub fn text_files(root: &Path) -> Result<Vec<TextFile>> {
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.retain(|path| !path.starts_with(root.join(FETCHED)));
    paths.sort();
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(root)?.to_string_lossy().replace('\\', "/");
        let text = fs::read_to_string(path).with_context(|| name.clone())?;
        Ok(TextFile { name, text })
    };
    paths.iter().map(read).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let at = || folder.display().to_string();
    for entry in fs::read_dir(folder).with_context(at)? {
        let entry = entry.with_context(at)?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().with_context(at)?.is_dir() {
            if !SKIPPED.contains(&name.as_str()) {
                collect(&path, files)?;
            }
        } else if path.is_file() && TEXT.contains(&extension(&name)) {
            files.push(path);
        }
    }
    Ok(())
}

/// Checks every text file below `root`; returns the number of files and the violations.
///
/// # Errors
/// Names the folder or file that cannot be read.
pub fn check(root: &Path) -> Result<(usize, Vec<Violation>)> {
    let files = text_files(root)?;
    let texts: HashMap<&str, &str> = files.iter().map(|file| (&*file.name, &*file.text)).collect();
    let exports = |order: &imports::Order| {
        imports::exports(texts.get(&*format!("{}lib.rs", order.sources)).unwrap_or(&""))
    };
    let orders: Vec<_> = ORDERS.iter().map(|order| (order, exports(order))).collect();
    let mut violations = Vec::new();
    for TextFile { name, text } in &files {
        violations.extend(check_text(name, text));
        for (order, exports) in &orders {
            violations.extend(imports::check(order, exports, name, text));
        }
        if TERMS_ENFORCED.iter().any(|folder| name.starts_with(folder)) {
            violations.extend(words::check(name, text));
        }
        if extension(name) == "md" {
            violations.extend(documents::check(root, name, text));
        }
    }
    Ok((files.len(), violations))
}

/// The names in the crates' sources that use a refused word.
///
/// # Errors
/// Names the folder or file that cannot be read.
pub fn private_words(root: &Path) -> Result<Vec<Violation>> {
    let files = text_files(root)?;
    Ok(files.iter().flat_map(|file| words::check(&file.name, &file.text)).collect())
}

/// The part after the last dot, or the whole name without one.
fn extension(name: &str) -> &str {
    let base = name.rsplit('/').next().unwrap_or(name);
    base.rsplit('.').next().unwrap_or(base)
}
