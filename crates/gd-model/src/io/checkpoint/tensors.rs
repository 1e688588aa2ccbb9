//! Named tensors to safetensors files and back, with every reason for a refusal named.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use safetensors::tensor::{Metadata, SafeTensorError, SafeTensors, TensorInfo, View};

use super::{INDEX, WEIGHTS};
use crate::error::{Error, Result};

/// The most bytes of a JSON file: its values take several times as much memory.
const MAX_JSON: u64 = 16 << 20;
/// The most bytes of a header that is looked into to say what is wrong with its file.
const MAX_DIAGNOSED: usize = 1 << 20;

/// Writes named tensors in the safetensors format with metadata `format: pt`, one tensor at a time, so that
/// memory holds no second copy of all. The bytes are those that the safetensors crate itself would give.
pub(super) fn stream(path: &Path, out: &mut dyn Write, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    // By falling alignment, so that none needs padding, then by name.
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype()));
    let mut at = 0;
    let infos = order.iter().map(|(name, tensor)| {
        let start = at;
        at += tensor.data_len();
        let info =
            TensorInfo { dtype: tensor.dtype(), shape: tensor.dims().to_vec(), data_offsets: (start, at) };
        ((*name).clone(), info)
    });
    let format = HashMap::from([("format".to_string(), "pt".to_string())]);
    let invalid = |e: &dyn std::fmt::Display| Error::Invalid(format!("{}: {e}", path.display()));
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(|e| invalid(&e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let unwritable = |e| Error::write(path, e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(unwritable)?;
    out.write_all(&header).map_err(unwritable)?;
    for (_, tensor) in order {
        // A tensor on a device, or with strides, is brought into one piece here, where that can fail.
        let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
        out.write_all(&View::data(&tensor)).map_err(unwritable)?;
    }
    Ok(())
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

/// Reads a JSON file of up to 16 MiB.
pub fn load_json(path: &Path) -> Result<serde_json::Value> {
    let size = fs::metadata(path).map_err(|e| Error::read(path, "JSON file", e))?.len();
    if size > MAX_JSON {
        return Err(foreign(path, "JSON", format!("{size} bytes; up to {MAX_JSON} are read")));
    }
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
pub(super) fn is_plain_name(name: &str) -> bool {
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
    let start = 8 + usize::try_from(header).ok().filter(|bytes| *bytes <= MAX_DIAGNOSED)?;
    let json: serde_json::Value = serde_json::from_slice(bytes.get(8..start)?).ok()?;
    let end = |t: &serde_json::Value| t.get("data_offsets")?.get(1)?.as_u64();
    let data = json.as_object()?.values().filter_map(end).max().unwrap_or(0);
    data.checked_add(start as u64)
}

pub(super) fn foreign(path: &Path, kind: &'static str, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind, reason }
}
