//! Reading and atomic writing of single files. After an error, or a crash at any point, a file has either its old or its
//! new content.

use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Opens a file for reading. A pipe, a socket or a device is refused: it may have no end, or wait for a writer for ever.
///
/// # Errors
/// The system's reason.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let kind = path.metadata()?.file_type();
    // Reading a folder gives the error of the system.
    if !kind.is_file() && !kind.is_dir() {
        return Err(io::Error::other("it is a pipe, a socket or a device, not a file"));
    }
    File::open(path)
}

/// Opens a file for reading, see [`read_file`]. `what` names what is expected there.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`].
pub fn open_file(path: &Path, what: &'static str) -> Result<File> {
    open_regular(path).map_err(|e| Error::read(path, what, e))
}

/// Reads a file. A pipe, a socket or a device is refused. `what` names what is expected there.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`].
pub fn read_file(path: &Path, what: &'static str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open_regular(path).and_then(|mut file| file.read_to_end(&mut bytes));
    read.map_err(|e| Error::read(path, what, e))?;
    Ok(bytes)
}

/// Reads a UTF-8 text file. A byte-order mark at its start is no part of the text.
///
/// # Errors
/// [`Error::Missing`], [`Error::Unreadable`], [`Error::Empty`], [`Error::InvalidUtf8`], or [`Error::Foreign`] for text in
/// UTF-16 or UTF-32.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = read_file(path, "text file")?;
    if bytes.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file is empty" });
    }
    let mark_bytes = byte_order_mark(path, &bytes)?;
    let mut text = decode_utf8(path, bytes, 0)?;
    text.drain(..mark_bytes);
    Ok(text)
}

/// The text of bytes that start at the byte `offset` of a file.
///
/// # Errors
/// [`Error::InvalidUtf8`].
pub(crate) fn decode_utf8(path: &Path, bytes: Vec<u8>, offset: usize) -> Result<String> {
    String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: path.into(), offset: offset + e.utf8_error().valid_up_to() })
}

/// The length of the byte-order mark of UTF-8 at the start of a text, of which `head` is the beginning; 0 if there is
/// none.
///
/// # Errors
/// [`Error::Foreign`] for text in UTF-16 or UTF-32, by its mark or because every other byte is 0.
pub(crate) fn byte_order_mark(path: &Path, head: &[u8]) -> Result<usize> {
    let refused = |encoding: &str| {
        let tool = encoding.trim_end_matches(" without a byte-order mark");
        let reason = format!("it is {encoding}; convert it, for example with iconv -f {tool} -t UTF-8");
        Err(Error::Foreign { path: path.into(), kind: "UTF-8 text", reason })
    };
    match head {
        [0xef, 0xbb, 0xbf, ..] => Ok(UTF8_MARK_BYTES),
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => refused("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => refused("UTF-16"),
        _ => match head.get(..UNMARKED_BYTES).map(|head| [0, 1].map(|at| zeros(head, at))) {
            Some([false, true]) => refused("UTF-16LE without a byte-order mark"),
            Some([true, false]) => refused("UTF-16BE without a byte-order mark"),
            _ => Ok(0),
        },
    }
}

/// The length of the byte-order mark of UTF-8.
const UTF8_MARK_BYTES: usize = 3;
/// The number of bytes by which UTF-16 without a byte-order mark is recognised.
const UNMARKED_BYTES: usize = 8;

/// Whether every second byte from `at` on is 0.
fn zeros(bytes: &[u8], at: usize) -> bool {
    bytes.iter().skip(at).step_by(2).all(|&b| b == 0)
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

/// Creates a folder and those above it that are missing, and syncs the entry of each new one.
///
/// # Errors
/// [`Error::Unwritable`].
pub(crate) fn create_folders(folder: &Path) -> Result<()> {
    if folder == Path::new("") || folder.is_dir() {
        return Ok(());
    }
    let parent = folder.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    // A disk that has failed does not even show the working folder.
    if parent != folder {
        create_folders(parent)?;
    }
    match fs::create_dir(folder) {
        Ok(()) => sync_entry(parent),
        // Another process may have created it in between.
        Err(_) if folder.is_dir() => Ok(()),
        Err(e) => Err(Error::write(folder, e)),
    }
}

/// Syncs a new or renamed entry of a folder that may belong to another user. Where the system does not let it be opened or
/// synced, nothing can be done.
pub(crate) fn sync_entry(folder: &Path) -> Result<()> {
    match File::open(folder).and_then(|f| f.sync_all()) {
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::PermissionDenied | ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            tracing::debug!("{}: cannot be synced: {e}", folder.display());
            Ok(())
        }
        result => result.map_err(|e| Error::write(folder, e)),
    }
}

/// The folder of `path`, which is created if necessary, and the last component of `path`.
pub(super) fn parent(path: &Path) -> Result<(PathBuf, String)> {
    let name = path.file_name().ok_or_else(|| Error::Invalid(format!("{path:?} names no file or folder")))?;
    let parent = match path.parent() {
        Some(p) if p != Path::new("") => p.to_path_buf(),
        _ => PathBuf::from("."),
    };
    create_folders(&parent)?;
    Ok((parent, name.to_string_lossy().into_owned()))
}

/// Sets the permissions of a temporary file, restricted by the umask. Without it, it would be readable by its owner only.
#[cfg_attr(not(unix), allow(unused_variables))]
pub(super) fn set_mode(builder: &mut tempfile::Builder, mode: u32) {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
}
