//! Files and folders that are put in place in one step: after an error, or a crash at any point, what was
//! there before is still there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use super::{CONFIG, Filling, INDEX, System, WEIGHTS};
use crate::error::{Error, Result};

/// Makes what was written at `path`, a file or a folder's entries, survive a power failure.
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::write(path, e))
}

/// Writes named tensors as safetensors with metadata `format: pt`, and syncs the file. Not atomic by itself.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let (folder, name) = parent(path)?;
    Filling::new(&System, &folder).tensors(&name, tensors)
}

/// The folder that `path` is in, made if need be, and the last part of its name.
fn parent(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().ok_or_else(|| Error::Invalid(format!("{path:?} names no file or folder")))?;
    let parent = match path.parent() {
        Some(p) if p != Path::new("") => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
    Ok((parent, name.to_string_lossy().into_owned()))
}

/// Writes a file beside `path`, syncs it and renames it into place.
pub fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    stream_file(path, |out| out.write_all(content).map_err(|e| Error::write(path, e)))
}

/// As [`write_file`], with a content that `fill` writes piece by piece; returns what `fill` does.
pub fn stream_file<R>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<R>) -> Result<R> {
    let (parent, name) = parent(path)?;
    let unwritable = |e| Error::write(path, e);
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix);
    ordinary(&mut builder, 0o666);
    let file = builder.tempfile_in(&parent).map_err(unwritable)?;
    let mut out = BufWriter::new(file);
    let result = fill(&mut out)?;
    let file = out.into_inner().map_err(|e| unwritable(e.into_error()))?;
    file.as_file().sync_all().map_err(unwritable)?;
    file.persist(path).map_err(|e| unwritable(e.error))?;
    sync(&parent)?;
    Ok(result)
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
    ordinary(&mut builder, 0o777);
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

/// Fails where [`write_file`] into `folder` would, and leaves nothing behind.
pub fn check_writable(folder: &Path) -> Result<()> {
    // What does not exist will be made in the nearest folder that does.
    let nearest = folder.ancestors().find(|p| p.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
    tempfile::tempdir_in(nearest).map(drop).map_err(|e| Error::write(nearest, e))
}

/// Temporary files are private to the user; a checkpoint has the permissions of any other file.
#[cfg_attr(not(unix), allow(unused_variables))]
fn ordinary(builder: &mut tempfile::Builder, mode: u32) {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
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
