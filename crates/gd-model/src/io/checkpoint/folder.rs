//! Files and folders that are put in place in one step: after an error, or a crash at any point, what was
//! there before is still there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;

use super::{CONFIG, Filling, INDEX, System, WEIGHTS};
use crate::error::{Error, Result};
use crate::io::files::{check_writable, parent, set_mode, sync};

/// Writes named tensors as safetensors with metadata `format: pt`, and syncs the file. Not atomic by itself.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let (folder, name) = parent(path)?;
    Filling::new(&System, &folder).tensors(&name, tensors)
}

/// Has `fill` write into a new folder beside `folder`, syncs it and puts it in place in one step. After an
/// error, or a crash at any point, `folder` is what it was before.
///
/// Only a checkpoint folder or an empty one is replaced; anything else at this path is an error.
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
        // What is under the temporary name now is the old folder. It has been replaced: that it cannot be
        // removed is no failure of the save.
        if let Err(e) = new.close() {
            tracing::warn!("the replaced checkpoint could not be removed: {e}");
        }
        return Ok(());
    }
    fs::rename(new.path(), folder).map_err(|e| Error::write(folder, e))?;
    // Its name is gone, so there is nothing left to remove.
    let _ = new.keep();
    sync(&parent)
}

/// Fails where [`write_folder`] would, and leaves nothing behind: for the time before a long computation.
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

/// Swaps two folders: in one step where the system can, else by renaming three times.
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

/// Swaps two folders through a third name. A crash in between leaves both complete, the old one under the
/// third name.
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
    fn both_ways_to_exchange_swap_and_survive_failure() {
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
