//! Checkpoint folders in the Hugging Face layout: written whole or not at all, read with every reason named.
//!
//! | file | content |
//! |---|---|
//! | `config.json` | the model's shape |
//! | `model.safetensors` | the weights, metadata `format: pt`; or shards with `model.safetensors.index.json` |
//! | `tokenizer.json` | the tokenizer |
//! | `generation_config.json` | sampling defaults |
//! | `README.md` | the model card |

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use safetensors::tensor::{SafeTensorError, SafeTensors};

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The configuration in a checkpoint folder.
pub const CONFIG: &str = "config.json";
/// The weights in a checkpoint folder.
pub const WEIGHTS: &str = "model.safetensors";
/// The list of shards, where the weights are in several files.
pub const INDEX: &str = "model.safetensors.index.json";
/// The tokenizer in a checkpoint folder.
pub const TOKENIZER: &str = "tokenizer.json";
/// The sampling defaults in a checkpoint folder.
pub const GENERATION: &str = "generation_config.json";
/// The model card in a checkpoint folder.
pub const CARD: &str = "README.md";

/// What a checkpoint folder holds.
#[derive(Clone, Copy, Debug)]
pub struct Checkpoint<'a> {
    /// `config.json`.
    pub config: &'a serde_json::Value,
    /// The weights by name.
    pub tensors: &'a BTreeMap<String, Tensor>,
    /// `tokenizer.json`.
    pub tokenizer: &'a Tokenizer,
    /// `generation_config.json`.
    pub generation: &'a serde_json::Value,
    /// `README.md`; [`model_card`] makes one.
    pub card: &'a str,
    /// Further files by plain name.
    pub extra: &'a BTreeMap<String, Vec<u8>>,
}

/// Writes a checkpoint folder. An existing checkpoint at `folder` stays until the new one is complete.
pub fn save(folder: &Path, checkpoint: &Checkpoint) -> Result<()> {
    let reserved = [CONFIG, WEIGHTS, INDEX, TOKENIZER, GENERATION, CARD];
    for name in checkpoint.extra.keys() {
        if !is_plain_name(name) || reserved.contains(&name.as_str()) {
            return Err(Error::Invalid(format!("{name:?} cannot be the name of an extra checkpoint file")));
        }
    }
    write_folder(folder, |new| {
        create(&new.join(CONFIG), &pretty(checkpoint.config))?;
        create(&new.join(GENERATION), &pretty(checkpoint.generation))?;
        create(&new.join(TOKENIZER), checkpoint.tokenizer.to_json()?.as_bytes())?;
        create(&new.join(CARD), checkpoint.card.as_bytes())?;
        for (name, content) in checkpoint.extra {
            create(&new.join(name), content)?;
        }
        write_tensors(&new.join(WEIGHTS), checkpoint.tensors)
    })
}

/// Fills the model card template: `{{key}}` becomes the value. A key that the template lacks, or lacks a
/// value, is an error.
pub fn model_card(values: &[(&str, String)]) -> Result<String> {
    let mut card = include_str!("../../../models/MODEL_CARD.md").to_string();
    for (key, value) in values {
        let place = format!("{{{{{key}}}}}");
        if !card.contains(&place) {
            return Err(Error::Invalid(format!("the model card has no place for {key:?}")));
        }
        card = card.replace(&place, value);
    }
    match card.split_once("{{").and_then(|(_, rest)| rest.split_once("}}")) {
        Some((key, _)) => Err(Error::Invalid(format!("the model card needs a value for {key:?}"))),
        None => Ok(card),
    }
}

/// Writes named tensors as safetensors with metadata `format: pt`, and syncs the file. Not atomic by itself.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    // Tensors on a device, or with strides, are brought into one piece here, where that can fail.
    let tensors = tensors
        .iter()
        .map(|(name, t)| Ok((name, t.to_device(&Device::Cpu)?.contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|e| match e {
        SafeTensorError::IoError(e) => Error::write(path, e),
        e => Error::Invalid(format!("{}: {e}", path.display())),
    })?;
    sync(path)
}

/// Reads all tensors of a checkpoint folder, of a safetensors file, or of the shards of an index file.
pub fn load_tensors(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let kind = fs::metadata(path).map_err(|e| Error::read(path, "checkpoint", e))?;
    if !kind.is_dir() {
        let index = path.extension().is_some_and(|e| e == "json");
        return if index { load_shards(path, device) } else { load_file(path, device) };
    }
    let (weights, index) = (path.join(WEIGHTS), path.join(INDEX));
    if !weights.exists() && index.exists() {
        return load_shards(&index, device);
    }
    load_file(&weights, device)
}

/// Fails with all the names that `tensors`, read from `path`, lacks.
pub fn require<'a>(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    names: impl IntoIterator<Item = &'a str>,
) -> Result<()> {
    let names: Vec<String> =
        names.into_iter().filter(|n| !tensors.contains_key(*n)).map(str::to_string).collect();
    if names.is_empty() { Ok(()) } else { Err(Error::MissingTensors { path: path.into(), names }) }
}

/// Reads a JSON file.
pub fn load_json(path: &Path) -> Result<serde_json::Value> {
    let bytes = fs::read(path).map_err(|e| Error::read(path, "JSON file", e))?;
    serde_json::from_slice(&bytes).map_err(|e| foreign(path, "JSON", e.to_string()))
}

fn load_file(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bytes = fs::read(path).map_err(|e| Error::read(path, "safetensors file", e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| diagnose(path, &bytes, &e))?;
    let load = |(name, view): (&str, safetensors::tensor::TensorView)| {
        let tensor = view.load(device).map_err(|e| foreign(path, "safetensors", format!("{name}: {e}")))?;
        Ok((name.to_string(), tensor))
    };
    file.iter().map(load).collect()
}

fn load_shards(index: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let bad = |reason: &str| foreign(index, "shard index", reason.into());
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
    let mut tensors = BTreeMap::new();
    for (shard, names) in shards {
        let path = index.with_file_name(shard);
        let mut loaded = load_file(&path, device)?;
        require(&path, &loaded, names.iter().copied())?;
        tensors.extend(names.into_iter().filter_map(|name| loaded.remove_entry(name)));
    }
    Ok(tensors)
}

/// Whether a name stays in its folder on every system.
fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', ':', '\0'])
}

/// Says what is wrong with a file that the safetensors reader refused.
fn diagnose(path: &Path, bytes: &[u8], error: &SafeTensorError) -> Error {
    const OTHERS: [(&[u8], &str); 5] = [
        (b"PK\x03\x04", "it is a zip archive, as PyTorch's .bin and .pt files are"),
        (b"GGUF", "it is a GGUF file"),
        (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
        (b"\x1f\x8b", "it is compressed with gzip"),
        (b"<", "it looks like HTML or XML"),
    ];
    if let Some((_, reason)) = OTHERS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return foreign(path, "safetensors", (*reason).into());
    }
    // Layout: 8 bytes header length, header (JSON), data. What is announced is what the header says.
    let found = bytes.len() as u64;
    let (Some(length), true) = (bytes.first_chunk::<8>(), bytes.get(8).is_none_or(|&b| b == b'{')) else {
        return if bytes.len() < 8 {
            Error::Truncated { path: path.into(), needed: 8, found }
        } else {
            foreign(path, "safetensors", error.to_string())
        };
    };
    let header = u64::from_le_bytes(*length);
    let needed = match error {
        SafeTensorError::InvalidHeaderLength => header.checked_add(8),
        SafeTensorError::MetadataIncompleteBuffer => announced(bytes, header),
        _ => None,
    };
    match needed {
        Some(needed) if needed > found => Error::Truncated { path: path.into(), needed, found },
        _ => foreign(path, "safetensors", error.to_string()),
    }
}

/// The size a safetensors file should have by its header.
fn announced(bytes: &[u8], header: u64) -> Option<u64> {
    let start = 8 + usize::try_from(header).ok()?;
    let json: serde_json::Value = serde_json::from_slice(bytes.get(8..start)?).ok()?;
    let end = |t: &serde_json::Value| t.get("data_offsets")?.get(1)?.as_u64();
    let data = json.as_object()?.values().filter_map(end).max().unwrap_or(0);
    Some(start as u64 + data)
}

fn foreign(path: &Path, kind: &'static str, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind, reason }
}

fn pretty(json: &serde_json::Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// Creates a file with this content and syncs it.
fn create(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|e| Error::write(path, e))
}

/// Makes what was written at `path`, a file or a folder's entries, survive a power failure.
fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::write(path, e))
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
    let (parent, name) = parent(path)?;
    let unwritable = |e| Error::write(path, e);
    let mut builder = tempfile::Builder::new();
    let prefix = format!(".{name}.");
    builder.prefix(&prefix);
    ordinary(&mut builder, 0o666);
    let mut file = builder.tempfile_in(&parent).map_err(unwritable)?;
    file.write_all(content).and_then(|()| file.as_file().sync_all()).map_err(unwritable)?;
    file.persist(path).map_err(|e| unwritable(e.error))?;
    sync(&parent)
}

/// Whether [`write_folder`] could write `folder` now: what a long run asks before it starts.
pub fn check_writable(folder: &Path) -> Result<()> {
    if folder.symlink_metadata().is_ok() && !is_replaceable(folder) {
        return Err(Error::Occupied { path: folder.into() });
    }
    let (parent, _) = parent(folder)?;
    tempfile::tempdir_in(&parent).map(drop).map_err(|e| Error::write(&parent, e))
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
