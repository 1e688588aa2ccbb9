//! Memory-mapped files: the only unsafe code of this crate.
#![allow(unsafe_code)]

use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::io::files::open_file;

/// Maps a file into memory for reading. The file must not be written or truncated while it is mapped: reads would return
/// other bytes, or the system would stop the process. Token shards fulfil this: their folder is renamed when it is
/// complete, and this crate does not write to it afterwards.
///
/// # Errors
/// Names the file that cannot be read.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = open_file(path, "token shard")?;
    // SAFETY: the mapping is read-only and is returned as bytes, for which any content is valid. That no other program
    // changes the file is the requirement above, which cannot be enforced.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::read(path, "token shard", e))
}
