//! Safetensors files: reading, and atomic writing.

mod read;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, TensorInfo, View};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use self::read::Header;
use super::files::stream_file;
use crate::error::{Error, Result};

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// The dtypes that weights may have.
const WEIGHT_DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];

/// The weights of a checkpoint.
#[derive(Debug, Default)]
pub struct Weights {
    /// The tensors in f32, f16, bf16 and f64.
    pub tensors: Tensors,
    /// The names and dtypes of all other tensors, which are not read: masks, counters, quantised weights.
    pub other_dtypes: BTreeMap<String, String>,
    /// The tensors that the index of a checkpoint lists and that are not in their shard, with the path of the shard.
    pub absent: BTreeMap<String, PathBuf>,
}

impl Weights {
    /// Checks that the shards hold all tensors that the index lists.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] with the first incomplete shard and all tensors that it lacks.
    pub fn require_complete(&self) -> Result<()> {
        let Some(path) = self.absent.values().min() else { return Ok(()) };
        let names = self.absent.iter().filter(|(_, shard)| *shard == path).map(|(name, _)| name.clone());
        Err(Error::MissingTensors { path: path.clone(), names: names.collect() })
    }
}

/// The maximal size of a header that is parsed to find the reason why a file was refused.
const MAX_HEADER_BYTES: usize = 1 << 20;

/// Reads all tensors of the safetensors file at `path` onto `device`.
///
/// # Errors
/// - [`Error::Missing`] or [`Error::Unreadable`].
/// - [`Error::Truncated`] for a file that ends before the size that its header announces.
/// - [`Error::Foreign`] for a file of another format.
pub fn load(path: &Path, device: &Device) -> Result<Tensors> {
    Header::read(path)?.load(device, |_| true)
}

/// Reads the weights of the safetensors file at `path` onto `device`. Tensors of other dtypes are listed, not read.
///
/// # Errors
/// As [`load`].
pub fn load_weights(path: &Path, device: &Device) -> Result<Weights> {
    let header = Header::read(path)?;
    let is_weight = |dtype| WEIGHT_DTYPES.contains(&dtype);
    let others = header.tensors().into_iter().filter(|(_, info)| !is_weight(info.dtype));
    let other_dtypes = others.map(|(name, info)| (name, info.dtype.to_string())).collect();
    Ok(Weights { tensors: header.load(device, is_weight)?, other_dtypes, ..Weights::default() })
}

/// A name that the header of a valid file has twice.
fn duplicate(bytes: &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let header = rest.get(..usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    serde_json::from_slice::<Names>(header).ok()?.0
}

/// The first name that a JSON object has twice.
struct Names(Option<String>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Names;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Names, A::Error> {
                let (mut names, mut twice) = (HashSet::new(), None);
                while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                    if let Some(name) = names.replace(name) {
                        twice.get_or_insert(name);
                    }
                }
                Ok(Names(twice))
            }
        }
        deserializer.deserialize_map(Visit)
    }
}

/// Writes tensors to the safetensors file at `path`, without metadata. An existing file is replaced atomically.
///
/// # Errors
/// [`Error::Unwritable`] with the path and the system's reason.
pub fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    if let Some(folder) = folder {
        // The folder must exist; `stream_file` would create it.
        fs::read_dir(folder).map_err(|e| Error::write(path, e))?;
    }
    stream_file(path, |out| stream(path, out, tensors, None))
}

/// Writes named tensors to `out`, one tensor at a time, so that memory holds no second copy of all. The bytes are those
/// that the safetensors crate writes. `path` is for messages.
pub(super) fn stream(
    path: &Path,
    out: &mut dyn Write,
    tensors: &Tensors,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let mut order: Vec<(&String, &Tensor)> = tensors.iter().collect();
    // By descending alignment, so that no tensor needs padding, then by name.
    order.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype()));
    let mut at = 0;
    let infos = order.iter().map(|(name, tensor)| {
        let start = at;
        at += tensor.data_len();
        let info =
            TensorInfo { dtype: tensor.dtype(), shape: tensor.dims().to_vec(), data_offsets: (start, at) };
        ((*name).clone(), info)
    });
    let invalid = |e: &dyn std::fmt::Display| Error::Invalid(format!("{}: {e}", path.display()));
    let metadata = Metadata::new(metadata, infos.collect()).map_err(|e| invalid(&e))?;
    let mut header = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let unwritable = |e| Error::write(path, e);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(unwritable)?;
    out.write_all(&header).map_err(unwritable)?;
    for (_, tensor) in order {
        // A tensor may lie on a device or have strides.
        let tensor = tensor.to_device(&Device::Cpu)?.contiguous()?;
        out.write_all(&View::data(&tensor)).map_err(unwritable)?;
    }
    Ok(())
}

/// The error of a file of `actual` bytes that the safetensors crate refused, from its first bytes, which end with the header.
fn diagnose(path: &Path, bytes: &[u8], actual: u64, error: &SafeTensorError) -> Error {
    const OTHER_FORMATS: [(&[u8], &str); 6] = [
        (b"PK\x03\x04", "it is a zip archive, as PyTorch's .bin and .pt files are"),
        (b"\x80\x02\x8a\x0a", "it is a pickle, as PyTorch's older .bin and .pt files are"),
        (b"GGUF", "it is a GGUF file"),
        (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself"),
        (b"\x1f\x8b", "it is compressed with gzip"),
        (b"<", "it looks like HTML or XML"),
    ];
    if let Some((_, reason)) = OTHER_FORMATS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return foreign(path, "safetensors", (*reason).into());
    }
    // Layout: length of the header (u64), header (JSON), data.
    let (Some(length), true) = (bytes.first_chunk::<8>(), bytes.get(8).is_none_or(|&b| b == b'{')) else {
        return if bytes.len() < 8 {
            Error::Truncated { path: path.into(), needed: 8, actual }
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
        Some(needed) if needed > actual => Error::Truncated { path: path.into(), needed, actual },
        _ => foreign(path, "safetensors", error.to_string()),
    }
}

/// The size of a safetensors file in bytes according to its header of `header` bytes.
fn announced(bytes: &[u8], header: u64) -> Option<u64> {
    let start = 8 + usize::try_from(header).ok().filter(|bytes| *bytes <= MAX_HEADER_BYTES)?;
    let json: serde_json::Value = serde_json::from_slice(bytes.get(8..start)?).ok()?;
    let end = |t: &serde_json::Value| t.get("data_offsets")?.get(1)?.as_u64();
    let data = json.as_object()?.values().filter_map(end).max().unwrap_or(0);
    data.checked_add(start as u64)
}

fn foreign(path: &Path, kind: &'static str, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_read_back_and_a_failed_write_leaves_nothing() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let x = Tensor::new(&[[1i32, -2], [3, 4]], &Device::Cpu)?;
        write(&path, &Tensors::from([("x".into(), x.clone())]))?;
        let back = load(&path, &Device::Cpu)?;
        assert_eq!(back["x"].to_vec2::<i32>()?, x.to_vec2::<i32>()?);

        let below_a_file = path.join("y.safetensors");
        assert!(write(&below_a_file, &back).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        Ok(())
    }

    /// One of them is read by several tasks, and ends within the last one.
    #[test]
    fn tensors_of_all_dtypes_read_back() -> Result<()> {
        use candle_core::DType::{BF16, F16, F32, F64, I64, U8};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let large = Tensor::arange(0u32, 2_500_001, &Device::Cpu)?;
        let small = Tensor::arange(0u32, 77, &Device::Cpu)?.reshape((7, 11))?;
        let mut tensors = Tensors::from([("large".to_owned(), large.to_dtype(F32)?)]);
        for dtype in [BF16, F16, F32, F64, I64, U8] {
            tensors.insert(format!("{dtype:?}"), small.to_dtype(dtype)?);
        }
        tensors.insert("empty".into(), Tensor::zeros((0, 3), F16, &Device::Cpu)?);
        write(&path, &tensors)?;
        let back = load(&path, &Device::Cpu)?;
        assert_eq!(back.len(), tensors.len());
        for (name, tensor) in &tensors {
            let values = |t: &Tensor| t.to_dtype(F64)?.flatten_all()?.to_vec1::<f64>();
            let back = &back[name];
            assert_eq!((back.dtype(), back.dims()), (tensor.dtype(), tensor.dims()), "{name}");
            assert!(values(back)? == values(tensor)?, "{name}");
        }
        let weights = load_weights(&path, &Device::Cpu)?;
        assert_eq!(
            weights.other_dtypes,
            BTreeMap::from([("I64", "I64"), ("U8", "U8")].map(|(a, b)| (a.into(), b.into())))
        );
        assert_eq!(weights.tensors.len() + 2, tensors.len());
        Ok(())
    }

    #[test]
    fn tensors_of_the_same_name_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let tensor = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        for (header, refused) in
            [(format!(r#"{{"a":{tensor},"a":{tensor}}}"#), true), (format!(r#"{{"a":{tensor}}}"#), false)]
        {
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[7]].concat();
            fs::write(&path, &bytes).unwrap();
            let error = load(&path, &Device::Cpu).err().map(|e| e.to_string());
            assert_eq!(
                error.as_deref().is_some_and(|e| e.contains(r#"several tensors "a""#)),
                refused,
                "{error:?}"
            );
        }
    }

    #[test]
    fn damaged_files_are_named() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(
            &path,
            &Tensors::from([("x".into(), Tensor::zeros(64, candle_core::DType::F32, &Device::Cpu)?)]),
        )?;
        let whole = fs::read(&path).unwrap();
        for len in [0, 4, 20, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            let e = load(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(e.contains("x.safetensors"), "{len}: {e}");
        }
        Ok(())
    }
}
