//! Files as memory: the one place of this crate where the compiler cannot check what is done.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a file for reading. It must not be written or cut while it is mapped: reads would then see other
/// bytes, or the process would be stopped by a signal. Token shards keep that rule: they appear by the
/// renaming of their finished folder and nothing here opens them for writing afterwards.
pub(super) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::read(path, "token shard", e))?;
    // SAFETY: the mapping is read-only and is handed out as bytes, for which any content is valid. That the
    // file does not change under it is the rule above, which no program can enforce.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::read(path, "token shard", e))
}
