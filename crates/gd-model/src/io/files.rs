//! Reading and writing of single files. A file is replaced in one step: after an error, or a crash at any point, the
//! old content is still there.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Reads one UTF-8 text file that is not empty.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, "text file", e))?;
    if bytes.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file is empty" });
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })
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

/// Fails where [`write_file`] into `folder` would, and leaves nothing behind.
pub fn check_writable(folder: &Path) -> Result<()> {
    // What does not exist will be made in the nearest folder that does.
    let nearest = folder.ancestors().find(|p| p.symlink_metadata().is_ok()).unwrap_or(Path::new("."));
    tempfile::tempdir_in(nearest).map(drop).map_err(|e| Error::write(nearest, e))
}

/// Makes what was written at `path`, a file or a folder's entries, survive a power failure.
pub(super) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::write(path, e))
}

/// The folder that `path` is in, made if need be, and the last part of its name.
pub(super) fn parent(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().ok_or_else(|| Error::Invalid(format!("{path:?} names no file or folder")))?;
    let parent = match path.parent() {
        Some(p) if p != Path::new("") => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    fs::create_dir_all(&parent).map_err(|e| Error::write(&parent, e))?;
    Ok((parent, name.to_string_lossy().into_owned()))
}

/// Temporary files are private to the user; a checkpoint has the permissions of any other file.
#[cfg_attr(not(unix), allow(unused_variables))]
pub(super) fn set_mode(builder: &mut tempfile::Builder, mode: u32) {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
}
