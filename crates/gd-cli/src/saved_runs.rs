//! The runs of a command that trains several models. Each run is a file, written when it ends, so that a repeated command
//! continues with the runs that are missing.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use gd_model::io::files::write_file;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::terminal::note;

/// The content of a file: what determines a run, and the run.
#[derive(Debug, Serialize, Deserialize)]
struct Saved<K, R> {
    #[serde(flatten)]
    key: K,
    #[serde(flatten)]
    run: R,
}

/// The run in the file `path` if its key is `key` and it `is_complete`, or else the run that `new` makes, which is saved
/// there.
///
/// # Errors
/// Names a file that cannot be read or written; the error of `new`.
pub fn saved_or_new<K, R>(
    path: &Path,
    key: K,
    is_complete: impl Fn(&R) -> bool,
    new: impl FnOnce() -> Result<R>,
) -> Result<R>
where
    K: Serialize + DeserializeOwned + PartialEq,
    R: Serialize + DeserializeOwned,
{
    if path.exists() {
        let text = fs::read(path).with_context(|| path.display().to_string())?;
        match serde_json::from_slice::<Saved<K, R>>(&text) {
            Ok(saved) if saved.key == key && is_complete(&saved.run) => return Ok(saved.run),
            _ => note(format_args!("{}: a run of another configuration; it is repeated", path.display())),
        }
    }
    let saved = Saved { key, run: new()? };
    write_file(path, serde_json::to_string_pretty(&saved)?.as_bytes())?;
    Ok(saved.run)
}
