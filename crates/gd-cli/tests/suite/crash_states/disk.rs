//! A model of a disk that knows which operations are on it after a power failure.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::recorder::Operation;

/// A file by the operation that created it.
#[derive(Debug, Clone, Default)]
struct Content {
    live: Vec<u8>,
    /// What is on the disk at least.
    synced: Vec<u8>,
}

/// An operation on entries of folders.
#[derive(Debug, Clone)]
struct Entry {
    operation: Operation,
    /// The file that it creates.
    file: Option<usize>,
    synced: bool,
}

/// What of the operations that were not synced is on the disk after a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// All: only the program crashed.
    Nothing,
    /// None.
    Everything,
    /// The names are there, the contents are not.
    Contents,
    /// Some operations on entries in any order, and some content of every file, perhaps cut.
    Random,
}

/// Entries by path: a file by its number, or a folder.
type Tree = BTreeMap<PathBuf, Option<usize>>;

/// The disk after a number of operations.
#[derive(Debug, Clone, Default)]
pub(super) struct Disk {
    files: Vec<Content>,
    entries: Vec<Entry>,
    live: Tree,
}

impl Disk {
    /// A disk on which a folder with these files is synced.
    pub(super) fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let mut disk = Self::default();
        for (name, content) in files {
            disk.apply(&Operation::Create(name.into()));
            disk.apply(&Operation::Append(name.into(), content.clone()));
            disk.apply(&Operation::Sync(name.into()));
        }
        disk.apply(&Operation::Sync(PathBuf::new()));
        disk
    }

    pub(super) fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Append(path, bytes) => {
                if let Some(file) = self.file(path) {
                    file.live.extend(bytes);
                }
            }
            Operation::Truncate(path, length) => {
                if let Some(file) = self.file(path) {
                    file.live.resize(*length, 0);
                }
            }
            Operation::Sync(path) => self.sync(path),
            Operation::Create(path) if self.live.contains_key(path) => {}
            operation => {
                let file = matches!(operation, Operation::Create(_)).then(|| {
                    self.files.push(Content::default());
                    self.files.len() - 1
                });
                change(&mut self.live, operation, file);
                self.entries.push(Entry { operation: operation.clone(), file, synced: false });
            }
        }
    }

    fn file(&mut self, path: &Path) -> Option<&mut Content> {
        let number = (*self.live.get(path)?)?;
        self.files.get_mut(number)
    }

    fn sync(&mut self, path: &Path) {
        if let Some(file) = self.file(path) {
            file.synced = file.live.clone();
            return;
        }
        for entry in &mut self.entries {
            entry.synced |= folders(&entry.operation).into_iter().any(|folder| folder == path);
        }
    }

    /// Writes what is there after a power failure into `root`.
    pub(super) fn crash(&self, loss: Loss, rng: &mut ChaCha8Rng, root: &Path) -> Result<()> {
        let mut tree = Tree::new();
        for entry in &self.entries {
            let survives = match loss {
                Loss::Nothing | Loss::Contents => true,
                Loss::Everything => entry.synced,
                Loss::Random => entry.synced || rng.random_bool(0.5),
            };
            if survives {
                change(&mut tree, &entry.operation, entry.file);
            }
        }
        // Parents come before what is in them. An entry whose folder is lost is lost.
        for (path, file) in &tree {
            let parent = path.parent().unwrap_or(Path::new(""));
            if !root.join(parent).is_dir() {
                continue;
            }
            let Some(number) = file else {
                fs::create_dir(root.join(path))?;
                continue;
            };
            let Content { live, synced } = &self.files[*number];
            let content = match loss {
                Loss::Nothing => live.clone(),
                Loss::Everything | Loss::Contents => synced.clone(),
                Loss::Random => match rng.random_range(0..3) {
                    0 => live.clone(),
                    1 => synced.clone(),
                    _ => cut(live, synced, rng),
                },
            };
            fs::write(root.join(path), content)?;
        }
        Ok(())
    }
}

/// The synced content with a part of what was appended to it, or the content itself if it was not appended to.
fn cut(live: &[u8], synced: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    match live.starts_with(synced) {
        true => live[..rng.random_range(synced.len()..=live.len())].to_vec(),
        false => synced.to_vec(),
    }
}

/// The folders whose entries an operation changes.
fn folders(operation: &Operation) -> Vec<PathBuf> {
    let parent = |path: &Path| path.parent().unwrap_or(Path::new("")).to_path_buf();
    match operation {
        Operation::Create(path) | Operation::CreateFolder(path) | Operation::Remove(path) => {
            vec![parent(path)]
        }
        Operation::Rename(from, to) | Operation::Exchange(from, to) => vec![parent(from), parent(to)],
        Operation::Append(..) | Operation::Truncate(..) | Operation::Sync(_) => Vec::new(),
    }
}

/// Applies an operation on entries, as far as what it needs is there.
fn change(tree: &mut Tree, operation: &Operation, file: Option<usize>) {
    match operation {
        Operation::Create(path) => drop(tree.insert(path.clone(), file)),
        Operation::CreateFolder(path) => drop(tree.insert(path.clone(), None)),
        Operation::Remove(path) => drop(take(tree, path)),
        Operation::Rename(from, to) => {
            if tree.contains_key(from) {
                take(tree, to);
                let entries = take(tree, from);
                put(tree, to, entries);
            }
        }
        Operation::Exchange(from, to) => {
            if tree.contains_key(from) && tree.contains_key(to) {
                let (a, b) = (take(tree, from), take(tree, to));
                put(tree, to, a);
                put(tree, from, b);
            }
        }
        Operation::Append(..) | Operation::Truncate(..) | Operation::Sync(_) => {}
    }
}

/// Removes an entry with what is below it, and returns them by their paths below it.
fn take(tree: &mut Tree, path: &Path) -> Tree {
    let taken: Vec<PathBuf> = tree.keys().filter(|other| other.starts_with(path)).cloned().collect();
    let below = |full: PathBuf| {
        let entry = tree.remove(&full)?;
        Some((full.strip_prefix(path).ok()?.to_path_buf(), entry))
    };
    taken.into_iter().filter_map(below).collect()
}

fn put(tree: &mut Tree, path: &Path, entries: Tree) {
    for (below, entry) in entries {
        let full = if below == Path::new("") { path.to_path_buf() } else { path.join(below) };
        tree.insert(full, entry);
    }
}
