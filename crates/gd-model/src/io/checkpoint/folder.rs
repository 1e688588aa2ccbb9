//! Atomic writing of folders.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;

use super::{CONFIG, FolderWriter, INDEX, System, WEIGHTS};
use crate::error::{Error, Result};
use crate::io::files::{check_writable, parent, set_mode, sync};

/// Writes a safetensors file with the metadata `format: pt` and syncs it. Not atomic.
///
/// # Errors
/// [`Error::Unwritable`].
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let (folder, name) = parent(path)?;
    FolderWriter::new(&System, &folder).tensors(&name, tensors)
}

/// Calls `fill` with a temporary folder beside `folder`, syncs it and renames it to `folder`. After an error, or a crash at
/// any point, `folder` has either its old or its new content.
///
/// Only a checkpoint folder or an empty folder is replaced.
///
/// # Errors
/// [`Error::Occupied`] if something else is at this path; [`Error::Unwritable`]; the error of `fill`.
pub fn write_folder(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let existing = folder.symlink_metadata().is_ok();
    if existing && !is_replaceable(folder) {
        return Err(Error::Occupied { path: folder.into() });
    }
    let (parent, name) = parent(folder)?;
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix);
    set_mode(&mut builder, 0o777);
    let new = builder.tempdir_in(&parent).map_err(|e| Error::write(&parent, e))?;
    fill(new.path())?;
    sync(new.path())?;
    if existing {
        exchange(new.path(), folder).map_err(|e| Error::write(folder, e))?;
        sync(&parent)?;
        // The old folder has the temporary name now. The save has succeeded even if it cannot be removed.
        if let Err(e) = new.close() {
            tracing::warn!("the replaced checkpoint could not be removed: {e}");
        }
        return Ok(());
    }
    fs::rename(new.path(), folder).map_err(|e| Error::write(folder, e))?;
    // It was renamed, so its destructor must not remove anything.
    let _ = new.keep();
    sync(&parent)
}

/// Checks that [`write_folder`] can write `folder`, without changing anything. Called before long computations.
///
/// # Errors
/// [`Error::Occupied`] or [`Error::Unwritable`].
pub fn check_replaceable(folder: &Path) -> Result<()> {
    if folder.symlink_metadata().is_ok() && !is_replaceable(folder) {
        return Err(Error::Occupied { path: folder.into() });
    }
    check_writable(folder.parent().unwrap_or(folder))
}

fn is_replaceable(folder: &Path) -> bool {
    let checkpoint =
        folder.join(CONFIG).is_file() && (folder.join(WEIGHTS).is_file() || folder.join(INDEX).is_file());
    checkpoint || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Exchanges two folders: atomically if the system supports it, otherwise by [`rename_around`].
fn exchange(new: &Path, old: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
    }
    rename_around(new, old)
}

/// Exchanges two folders by three renames. After a crash in between, both are complete, and the old one has the temporary
/// name.
fn rename_around(new: &Path, old: &Path) -> std::io::Result<()> {
    let mut aside = new.as_os_str().to_os_string();
    aside.push(".old");
    fs::rename(old, &aside)?;
    if let Err(e) = fs::rename(new, old) {
        fs::rename(&aside, old)?;
        return Err(e);
    }
    fs::rename(&aside, new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_exchanges_swap_folders_and_a_failure_changes_nothing() {
        for exchange in [exchange, rename_around] {
            let folder = tempfile::tempdir().unwrap();
            let (a, b) = (folder.path().join("a"), folder.path().join("b"));
            for path in [&a, &b] {
                fs::create_dir(path).unwrap();
                fs::write(path.join("who"), path.file_name().unwrap().as_encoded_bytes()).unwrap();
            }
            exchange(&a, &b).unwrap();
            assert_eq!(fs::read(a.join("who")).unwrap(), b"b");
            assert_eq!(fs::read(b.join("who")).unwrap(), b"a");
            assert!(exchange(&folder.path().join("none"), &b).is_err());
            assert_eq!(fs::read(b.join("who")).unwrap(), b"a");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }
}
