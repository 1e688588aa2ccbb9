//! The folder of a run: its lock, and what happens to the content that is there before.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use super::RECIPE;
use crate::error::{Error, Result};
use crate::io::checkpoint::{self, Disk, Store, System};
use crate::io::files::check_writable;
use crate::train::log;

/// What is at the place of a new run.
enum Content {
    /// Nothing.
    Missing,
    /// A run or a model.
    Result,
    /// A run that ended before its first checkpoint, which may be overwritten.
    Begun,
    /// Something else, perhaps an empty folder.
    Other,
}

fn content(folder: &Path) -> Result<Content> {
    if folder.symlink_metadata().is_err() {
        return Ok(Content::Missing);
    }
    let has_result = folder.is_dir() && {
        let model = folder.join(checkpoint::CONFIG).exists();
        model || !Store::new(folder, System).steps()?.is_empty()
    };
    if has_result {
        return Ok(Content::Result);
    }
    let ours = |name: &String| {
        name.starts_with('.') || [RECIPE, log::FILE, log::TENSORBOARD].contains(&name.as_str())
    };
    let begun = folder.join(RECIPE).exists() && System.list(folder).is_ok_and(|all| all.iter().all(ours));
    Ok(if begun { Content::Begun } else { Content::Other })
}

/// Checks that a new run can be created in `folder`, without changing anything.
///
/// # Errors
/// - [`Error::Occupied`] if the folder holds something else than a run or a model.
/// - [`Error::RunLocked`] if another process trains there.
/// - [`Error::Unwritable`].
pub fn check_folder(folder: &Path) -> Result<()> {
    match content(folder)? {
        Content::Result => lock(folder).map(drop)?,
        Content::Other => checkpoint::check_replaceable(folder)?,
        Content::Missing | Content::Begun => {}
    }
    check_writable(folder)
}

/// Creates `folder`, or makes it free for a new run: a run or model that is there is renamed to the first free name
/// `FOLDER.N`.
///
/// # Errors
/// - [`Error::Occupied`] if the folder holds something else.
/// - [`Error::RunLocked`] if another process trains there.
pub(super) fn prepare_folder(folder: &Path) -> Result<()> {
    let unwritable = |e| Error::write(folder, e);
    match content(folder)? {
        Content::Missing => return fs::create_dir_all(folder).map_err(unwritable),
        Content::Begun => return Ok(()),
        Content::Other => return checkpoint::check_replaceable(folder),
        Content::Result => {}
    }
    // The folder must not be renamed while a process trains in it.
    let _lock = lock(folder)?;
    let name = |n: u32| {
        let mut name = folder.as_os_str().to_os_string();
        name.push(format!(".{n}"));
        PathBuf::from(name)
    };
    let free = (1..).map(name).find(|path| path.symlink_metadata().is_err());
    let aside = free.ok_or_else(|| Error::Occupied { path: folder.into() })?;
    fs::rename(folder, &aside).map_err(|e| Error::write(&aside, e))?;
    tracing::warn!("{}: the previous content is now {}", folder.display(), aside.display());
    fs::create_dir(folder).map_err(unwritable)
}

/// Locks the folder for this process. The lock ends with the process, however that ends.
///
/// # Errors
/// [`Error::RunLocked`] if another process holds the lock.
pub(super) fn lock(folder: &Path) -> Result<File> {
    let file = File::open(folder).map_err(|e| Error::read(folder, "folder", e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::RunLocked { path: folder.into() }),
        Err(TryLockError::Error(e)) => Err(Error::write(folder, e)),
    }
}
