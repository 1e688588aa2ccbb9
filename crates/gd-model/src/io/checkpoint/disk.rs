//! The file operations of [`Store`](super::Store) as a trait, so that tests can let each of them fail and can discard what
//! was not synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::io::files::open_regular;

/// A file system.
pub trait Disk {
    /// Creates a file, or truncates an existing one, for writing.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>>;
    /// Creates a folder in an existing one.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Syncs the entries of a folder to the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Renames a file or folder atomically. An existing file of the new name is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file, or a folder with its content.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>>;
    /// The names of the files and folders in a folder.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
}

/// A file that is open for writing.
pub trait Output: Write {
    /// Syncs the content to the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// The file system of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct System;

impl Disk for System {
    fn create(&self, path: &Path) -> io::Result<Box<dyn Output>> {
        Ok(Box::new(File::create(path)?))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if path.symlink_metadata()?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(open_regular(path)?))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }
}

impl Output for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}
