//! The folder of a run: its lock, and what happens to the content that is there before.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use super::RECIPE;
use crate::error::{Error, Result};
use crate::io::checkpoint::{self, Disk, Store, System};
use crate::io::files::{check_writable, create_folders, sync_entry};
use crate::train::log;

/// The file whose lock a process holds that trains in the folder.
const LOCK: &str = ".lock";

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
    let begun = System.list(folder).is_ok_and(|all| {
        all.iter().all(ours) && [RECIPE, LOCK].iter().any(|name| all.iter().any(|other| other == name))
    });
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
        // A lock would create its file.
        Content::Result if folder.join(LOCK).exists() => lock(folder).map(drop)?,
        Content::Result => {}
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
    match content(folder)? {
        Content::Missing => return create_folders(folder),
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
    fs::create_dir(folder).map_err(|e| Error::write(folder, e))?;
    // The old name must not be lost with the power, nor the new folder.
    sync_entry(folder.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new(".")))
}

/// Locks the folder for this process. The lock ends with the process, however that ends. It is a lock of a file that is open
/// for writing, because network file systems cannot lock anything else. On a file system without locks there is a warning
/// instead.
///
/// # Errors
/// [`Error::RunLocked`] if another process holds the lock; [`Error::Unwritable`].
pub(super) fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| Error::write(&path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::RunLocked { path: folder.into() }),
        Err(TryLockError::Error(e)) => {
            tracing::warn!(
                "{}: cannot be locked ({e}); a second process that trains there would not be noticed",
                folder.display()
            );
        }
    }
    Ok(file)
}
