//! The weights of a checkpoint under the names of Llama: names with the prefixes of wrappers, and tied projections.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::Value;

use crate::config::{EMBEDDING, HEAD};
use crate::error::{Error, Result};
use crate::io::safetensors::Weights;

const TIED: &str = "tie_word_embeddings";

/// The prefix of all parameters except the output projection.
const MODEL: &str = "model.";

/// What wrappers of modules add to the names of their parameters, at the start or between two components:
/// `torch.compile`, `DistributedDataParallel`, `FullyShardedDataParallel` and activation checkpointing.
const WRAPPERS: [&str; 4] = ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];

/// Renames the weights that were read from `path` to the names of Llama: without the components that wrappers add, and
/// with `model.` in front if the checkpoint is that of a model without its output projection.
///
/// # Errors
/// Names another prefix, or two tensors that get the same name.
pub(super) fn rename(path: &Path, weights: Weights) -> Result<Weights> {
    let Weights { tensors, other_dtypes, absent } = weights;
    let names = || tensors.keys().chain(other_dtypes.keys()).map(|name| unwrapped(name));
    let prefixes: BTreeSet<String> = names().filter_map(|name| prefix(&name).map(str::to_owned)).collect();
    let added = if prefixes.iter().eq([""]) { MODEL } else { "" };
    if let Some(other) = prefixes.last().filter(|_| added.is_empty() && !prefixes.contains(MODEL)) {
        let text = format!(
            "the names of the tensors have the prefix {other:?}; rename them so that they start with {MODEL:?}, as \
             model.layers.0.input_layernorm.weight"
        );
        return Err(Error::Invalid(format!("{}: {text}", path.display())));
    }
    let rename = |name: &str| {
        let name = unwrapped(name);
        if name == HEAD { name } else { format!("{added}{name}") }
    };
    Ok(Weights {
        tensors: renamed(path, tensors, rename)?,
        other_dtypes: renamed(path, other_dtypes, rename)?,
        absent: renamed(path, absent, rename)?,
    })
}

/// A name without the components that wrappers add.
fn unwrapped(name: &str) -> String {
    name.split('.').filter(|component| !WRAPPERS.contains(component)).collect::<Vec<_>>().join(".")
}

/// What precedes `layers.N.` in the name of a parameter of a layer.
fn prefix(name: &str) -> Option<&str> {
    let at = name.find("layers.")?;
    let (number, rest) = name[at..].strip_prefix("layers.")?.split_once('.')?;
    let of_layer = number.parse::<u32>().is_ok()
        && ["self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm."]
            .iter()
            .any(|part| rest.starts_with(part));
    of_layer.then_some(&name[..at])
}

fn renamed<T>(
    path: &Path,
    values: BTreeMap<String, T>,
    rename: impl Fn(&str) -> String,
) -> Result<BTreeMap<String, T>> {
    let mut result = BTreeMap::new();
    for (name, value) in values {
        let new = rename(&name);
        if result.insert(new.clone(), value).is_some() {
            return Err(Error::Invalid(format!("{}: several tensors are {new:?}", path.display())));
        }
    }
    Ok(result)
}

/// Finds out whether the embedding and the output projection are one matrix. Then the weights have it under the name of
/// the embedding alone, and `tie_word_embeddings` in `config` is true.
///
/// A file of a tied model may hold the matrix under either name, and an index may list both. A tied model whose file holds
/// two different matrices is not tied, as `transformers` 5 reads it. Without the key `tie_word_embeddings` a model is tied
/// if its file holds one of the two.
///
/// # Errors
/// An untied model without one of the two, or an error of the device.
pub(super) fn tie(path: &Path, config: &mut Value, weights: &mut Weights) -> Result<()> {
    let at = path.display();
    let has = |name: &str| weights.tensors.contains_key(name) || weights.other_dtypes.contains_key(name);
    let (embedding, head) = (has(EMBEDDING), has(HEAD));
    let (stored, missing) = if embedding { (EMBEDDING, HEAD) } else { (HEAD, EMBEDDING) };
    let tied = match config.get(TIED).and_then(Value::as_bool) {
        Some(false) if embedding != head => {
            weights.require_complete()?;
            return Err(Error::Invalid(format!(
                "{at}: it has no tensor {missing:?}, and {TIED} in the configuration is false; set it to true if \
                 {stored:?} is both the embedding and the output projection"
            )));
        }
        Some(true) if embedding && head && !equal(&weights.tensors)? => {
            tracing::warn!(
                "{at}: {TIED} is true in the configuration, but {EMBEDDING} and {HEAD} differ; both are used"
            );
            false
        }
        None if embedding != head => {
            tracing::warn!(
                "{at}: the configuration has no {TIED}, and the file no {missing}; {stored} is both the embedding \
                 and the output projection"
            );
            true
        }
        Some(tied) => tied,
        None => return Ok(()),
    };
    if let Some(keys) = config.as_object_mut() {
        keys.insert(TIED.into(), tied.into());
    }
    if tied {
        move_head(&mut weights.tensors);
        move_head(&mut weights.other_dtypes);
        weights.absent.retain(|name, _| name != HEAD && name != EMBEDDING);
    }
    Ok(())
}

/// Moves the output projection to the name of the embedding, or removes it if there is an embedding.
fn move_head<T>(values: &mut BTreeMap<String, T>) {
    if let Some(matrix) = values.remove(HEAD) {
        values.entry(EMBEDDING.into()).or_insert(matrix);
    }
}

/// Whether the embedding and the output projection have the same shape and values.
fn equal(tensors: &BTreeMap<String, Tensor>) -> Result<bool> {
    let (Some(a), Some(b)) = (tensors.get(EMBEDDING), tensors.get(HEAD)) else { return Ok(true) };
    if a.dims() != b.dims() || a.dtype() != b.dtype() {
        return Ok(false);
    }
    Ok(a.ne(b)?.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()? == 0.0)
}

/// Checks that all values of a weight are finite.
///
/// # Errors
/// Names the tensor and counts the values that are NaN or infinite.
pub(super) fn require_finite(name: &str, tensor: &Tensor) -> candle_core::Result<()> {
    if !tensor.device().is_cpu() {
        // 0 for finite values, else NaN.
        let sum = tensor.to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>()?;
        return if sum == 0.0 { Ok(()) } else { require_finite(name, &tensor.to_device(&Device::Cpu)?) };
    }
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let (start, count) = (layout.start_offset(), layout.shape().elem_count());
    let values = start..start + count;
    let (nan, infinite) = match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => count_non_finite(&all[values], f32::is_nan, f32::is_infinite),
        Storage::Cpu(CpuStorage::F64(all)) => count_non_finite(&all[values], f64::is_nan, f64::is_infinite),
        Storage::Cpu(CpuStorage::F16(all)) => count_non_finite(&all[values], f16::is_nan, f16::is_infinite),
        Storage::Cpu(CpuStorage::BF16(all)) => {
            count_non_finite(&all[values], bf16::is_nan, bf16::is_infinite)
        }
        _ => (0, 0),
    };
    if nan + infinite > 0 {
        candle_core::bail!("tensor {name:?}: of {count} values {nan} are NaN and {infinite} are infinite");
    }
    Ok(())
}

/// The numbers of values that are NaN and that are infinite.
fn count_non_finite<T: Copy + Sync>(
    values: &[T],
    is_nan: impl Fn(T) -> bool + Sync,
    is_infinite: impl Fn(T) -> bool + Sync,
) -> (usize, usize) {
    let count = |value: &T| (usize::from(is_nan(*value)), usize::from(is_infinite(*value)));
    values.par_iter().map(count).reduce(|| (0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
}
