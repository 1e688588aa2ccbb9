//! Reading and atomic writing of single files. After an error, or a crash at any point, a file has either its old or its
//! new content.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Reads a UTF-8 text file.
///
/// # Errors
/// [`Error::Missing`], [`Error::Unreadable`], [`Error::Empty`] or [`Error::InvalidUtf8`].
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, "text file", e))?;
    if bytes.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file is empty" });
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })
}

/// Writes a temporary file in the folder of `path`, syncs it and renames it to `path`. Creates missing folders.
///
/// # Errors
/// [`Error::Unwritable`] with the path and the system's reason.
pub fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    stream_file(path, |out| out.write_all(content).map_err(|e| Error::write(path, e)))
}

/// As [`write_file`], with a content that `fill` writes in parts. Returns the result of `fill`.
///
/// # Errors
/// As [`write_file`], or the error of `fill`.
pub fn stream_file<R>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<R>) -> Result<R> {
    let (parent, name) = parent(path)?;
    let unwritable = |e| Error::write(path, e);
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix);
    set_mode(&mut builder, 0o666);
    let file = builder.tempfile_in(&parent).map_err(unwritable)?;
    let mut out = BufWriter::new(file);
    let result = fill(&mut out)?;
    let file = out.into_inner().map_err(|e| unwritable(e.into_error()))?;
    file.as_file().sync_all().map_err(unwritable)?;
    file.persist(path).map_err(|e| unwritable(e.error))?;
    sync(&parent)?;
    Ok(result)
}

/// Checks that [`write_file`] can write into `folder`, which may not exist yet, without changing anything.
///
/// # Errors
/// [`Error::Unwritable`] with the nearest existing folder and the system's reason.
pub fn check_writable(folder: &Path) -> Result<()> {
    // Missing folders will be created in the nearest existing one.
    let nearest = folder.ancestors().find(|p| p.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
    tempfile::tempdir_in(nearest).map(drop).map_err(|e| Error::write(nearest, e))
}

/// Syncs a file, or the entries of a folder, to the disk.
pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::write(path, e))
}

/// The folder of `path`, which is created if necessary, and the last component of `path`.
pub(super) fn parent(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().ok_or_else(|| Error::Invalid(format!("{path:?} names no file or folder")))?;
    let parent = match path.parent() {
        Some(p) if p != Path::new("") => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
    Ok((parent, name.to_string_lossy().into_owned()))
}

/// Sets the permissions of a temporary file, restricted by the umask. Without it, it would be readable by its owner only.
#[cfg_attr(not(unix), allow(unused_variables))]
pub(super) fn set_mode(builder: &mut tempfile::Builder, mode: u32) {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
}
