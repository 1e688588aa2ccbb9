//! The tensors and JSON files of a checkpoint folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use super::{INDEX, WEIGHTS};
use crate::error::{Error, Result};
use crate::io::files::read_file;
use crate::io::safetensors::{self, Weights};

/// The maximal size of a JSON file. Its values need several times as much memory.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Reads all tensors of a checkpoint folder, of a safetensors file, or of the shards of an index file (`.json`) onto
/// `device`, by name.
///
/// # Errors
/// As [`safetensors::load`]; [`Error::Foreign`] or [`Error::ShardName`] for a damaged index; [`Error::MissingTensors`] for a
/// shard without a tensor that the index lists.
pub fn load_tensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let load = |file: &Path| Ok(Weights { tensors: safetensors::load(file, device)?, ..Weights::default() });
    let weights = load_files(&weights_file(path)?, &load)?;
    weights.require_complete()?;
    Ok(weights.tensors)
}

/// Reads the weights of a checkpoint as [`load_tensors`] does. Tensors of other dtypes, and those that a shard lacks, are
/// listed.
///
/// # Errors
/// As [`load_tensors`], except that a tensor that a shard lacks is no error.
pub fn load_weights(path: &Path, device: &Device) -> Result<Weights> {
    load_files(&weights_file(path)?, &|file: &Path| safetensors::load_weights(file, device))
}

/// The file with the weights of a checkpoint folder: `model.safetensors`, else its index. A file stands for itself.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`].
pub fn weights_file(path: &Path) -> Result<PathBuf> {
    let kind = fs::metadata(path).map_err(|e| Error::read(path, "checkpoint", e))?;
    if !kind.is_dir() {
        return Ok(path.into());
    }
    let (weights, index) = (path.join(WEIGHTS), path.join(INDEX));
    Ok(if !weights.exists() && index.exists() { index } else { weights })
}

fn load_files(path: &Path, load: &dyn Fn(&Path) -> Result<Weights>) -> Result<Weights> {
    if path.extension().is_some_and(|e| e == "json") { load_shards(path, load) } else { load(path) }
}

/// Checks that `tensors`, read from `path`, contain all `names`.
///
/// # Errors
/// [`Error::MissingTensors`] with all missing names.
pub fn require<'a>(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<()> {
    let names: Vec<String> =
        names.into_iter().filter(|n| !tensors.contains_key(*n)).map(str::to_string).collect();
    if names.is_empty() { Ok(()) } else { Err(Error::MissingTensors { path: path.into(), names }) }
}

/// Reads a JSON file of up to 16 MiB.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] for a larger file or invalid JSON.
pub fn load_json(path: &Path) -> Result<serde_json::Value> {
    let size = fs::metadata(path).map_err(|e| Error::read(path, "JSON file", e))?.len();
    if size > MAX_JSON_BYTES {
        return Err(not_json(path, format!("{size} bytes; the maximum is {MAX_JSON_BYTES}")));
    }
    let bytes = read_file(path, "JSON file")?;
    serde_json::from_slice(&bytes).map_err(|e| not_json(path, e.to_string()))
}

fn load_shards(index: &Path, load: &dyn Fn(&Path) -> Result<Weights>) -> Result<Weights> {
    let bad =
        |reason: &str| Error::Foreign { path: index.into(), kind: "shard index", reason: reason.into() };
    let json = load_json(index)?;
    let map =
        json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| bad("it has no weight_map"))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().ok_or_else(|| bad("a shard name is not a string"))?;
        if !is_plain_name(shard) {
            return Err(Error::ShardName { path: index.into(), name: shard.into() });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    let mut weights = Weights::default();
    for (shard, names) in shards {
        let path = index.with_file_name(shard);
        let mut loaded = load(&path)?;
        for name in names {
            if let Some(tensor) = loaded.tensors.remove_entry(name) {
                weights.tensors.extend([tensor]);
            } else if let Some(dtype) = loaded.other_dtypes.remove_entry(name) {
                weights.other_dtypes.extend([dtype]);
            } else {
                weights.absent.insert(name.to_owned(), path.clone());
            }
        }
    }
    Ok(weights)
}

/// Whether a name is a plain file name on every operating system, without a path.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

fn not_json(path: &Path, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind: "JSON", reason }
}
