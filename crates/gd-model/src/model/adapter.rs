//! Adapters of low rank (LoRA) in the format of the library PEFT: a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! The weight of an adapted projection is `W + (alpha / r) B A`, with W of a base model. An adapter that a run of this crate
//! has written also has a file with the hash of its base.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use ::safetensors::View;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::config::{ALL_LINEAR, LoraConfig, ModelConfig};
use crate::error::{Error, Result, shorten};
use crate::io::checkpoint::{FolderWriter, INDEX, WEIGHTS, load_json};
use crate::io::safetensors;
use crate::model::pretrained::Parts;
use crate::model::shapes::shapes;

/// The settings of an adapter.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The weights of an adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// The hash of the weights of the model that an adapter was trained on.
const BASE: &str = "adapter_base.json";

/// What PEFT puts before the names of the modules of a model.
const PREFIX: &str = "base_model.model.";
/// The ends of the names of the two matrices of a projection.
const ENDS: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// Settings of PEFT that change what an adapter computes and are not supported, with the values that have no effect.
const UNSUPPORTED: [(&str, Value); 8] = [
    ("use_dora", Value::Bool(false)),
    ("use_qalora", Value::Bool(false)),
    ("fan_in_fan_out", Value::Bool(false)),
    ("lora_bias", Value::Bool(false)),
    ("modules_to_save", Value::Null),
    ("trainable_token_indices", Value::Null),
    ("layer_replication", Value::Null),
    ("alora_invocation_tokens", Value::Null),
];

/// An adapter that was read from a folder.
#[derive(Debug)]
pub struct Adapter {
    /// The matrices A `[r, I]` and B `[O, r]` of each projection, by its path such as `model.layers.0.self_attn.q_proj`.
    matrices: BTreeMap<String, [Tensor; 2]>,
    alpha: f64,
    /// Whether the product is multiplied by alpha / sqrt(r) instead of alpha / r.
    by_root: bool,
    /// The path or name of the base.
    base: Option<PathBuf>,
    /// The hash of the weights of the base.
    base_hash: Option<String>,
    folder: PathBuf,
}

/// The paths of the projections of the blocks of a model with their outputs and inputs.
fn projections(config: &ModelConfig) -> Result<BTreeMap<String, [usize; 2]>> {
    let projection = |(name, dims): (String, Vec<usize>)| {
        let path = name.strip_suffix(".weight").filter(|path| path.ends_with("_proj"))?;
        Some((path.to_owned(), <[usize; 2]>::try_from(dims).ok()?))
    };
    Ok(shapes(config)?.into_iter().filter_map(projection).collect())
}

/// The last component of a path.
fn name_of(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The projections of a model of the configuration `config` that an adapter changes, with their outputs and inputs, by their
/// paths.
///
/// # Errors
/// A target that the model does not have; the message names those that it has.
pub fn targets(lora: &LoraConfig, config: &ModelConfig) -> Result<BTreeMap<String, [usize; 2]>> {
    let all = projections(config)?;
    let fits = |path: &str, target: &str| {
        target == ALL_LINEAR || path == target || path.ends_with(&format!(".{target}"))
    };
    for target in &lora.targets {
        if !all.keys().any(|path| fits(path, target)) {
            let names: BTreeSet<&str> = all.keys().map(|path| name_of(path)).collect();
            let names: Vec<&str> = names.into_iter().chain([ALL_LINEAR]).collect();
            return Err(Error::Invalid(format!(
                "train.lora.targets: the model has no projection {target:?}; allowed are {}",
                names.join(", ")
            )));
        }
    }
    Ok(all.into_iter().filter(|(path, _)| lora.targets.iter().any(|target| fits(path, target))).collect())
}

/// The number of parameters of an adapter of a model of the configuration `config`.
///
/// # Errors
/// As [`targets`].
pub fn size(lora: &LoraConfig, config: &ModelConfig) -> Result<usize> {
    Ok(targets(lora, config)?.values().map(|[outputs, inputs]| lora.r * (outputs + inputs)).sum())
}

/// The hash of the names, dtypes, shapes and values of the weights of a model.
pub fn hash(parts: &Parts) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for (name, tensor) in &parts.tensors {
        hasher.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.dims()).as_bytes());
        hasher.update(&View::data(&tensor));
    }
    hasher.finalize()
}

/// Writes an adapter: `tensors` are its matrices by the names that a model with this adapter gives them, `base_hash` is the
/// [`hash`] of its base.
///
/// # Errors
/// As [`FolderWriter::file`], or targets that the model of the configuration `config` does not have.
pub fn write(
    folder: &mut FolderWriter,
    lora: &LoraConfig,
    config: &ModelConfig,
    tensors: BTreeMap<String, Tensor>,
    base_hash: blake3::Hash,
) -> Result<()> {
    let modules = targets(lora, config)?;
    let names: BTreeSet<&str> = modules.keys().map(|path| name_of(path)).collect();
    let settings = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": true, "bias": "none",
        "base_model_name_or_path": lora.base, "r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": names, "init_lora_weights": true, "use_rslora": false, "use_dora": false,
        "fan_in_fan_out": false, "modules_to_save": null,
    });
    folder.json(ADAPTER_CONFIG, &settings)?;
    folder.json(BASE, &json!({ "blake3": base_hash.to_hex().as_str() }))?;
    let tensors = tensors.into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    folder.tensors(ADAPTER_WEIGHTS, &tensors)
}

/// The tensors of the adapter in `folder`, by the names that a model with this adapter gives them.
///
/// # Errors
/// As [`safetensors::load`], or a tensor that is not one of an adapter.
pub fn load_tensors(folder: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>> {
    let path = folder.join(ADAPTER_WEIGHTS);
    let named = |(name, tensor): (String, Tensor)| match name.strip_prefix(PREFIX) {
        Some(rest) if ENDS.iter().any(|end| rest.ends_with(end)) => Ok((rest.to_owned(), tensor)),
        _ => Err(Error::Invalid(format!(
            "{}: the tensor {name:?} is not one of a LoRA adapter of projections ({PREFIX}PATH{} or {})",
            path.display(),
            ENDS[0],
            ENDS[1]
        ))),
    };
    safetensors::load(&path, device)?.into_iter().map(named).collect()
}

impl Adapter {
    /// Whether a folder has an adapter and no model.
    pub fn is_at(folder: &Path) -> bool {
        let has = |name: &str| folder.join(name).exists();
        has(ADAPTER_CONFIG) && has(ADAPTER_WEIGHTS) && !has(WEIGHTS) && !has(INDEX)
    }

    /// Reads the adapter in `folder`.
    ///
    /// # Errors
    /// Names a file that cannot be read, a setting that is not supported, or a tensor that does not belong to a pair.
    pub fn read(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join(ADAPTER_CONFIG);
        let settings = load_json(&path)?;
        let refused = |reason: String| Error::Invalid(format!("{}: {reason}", path.display()));
        let kind = settings.get("peft_type").and_then(Value::as_str).unwrap_or_default();
        if kind != "LORA" {
            return Err(refused(format!("peft_type is {kind:?}; adapters of the type \"LORA\" are read")));
        }
        let is_empty = |value: &Value| match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        };
        let other = |(name, usual): &(&'static str, Value)| {
            settings.get(name).filter(|value| *value != usual && !is_empty(value)).map(|value| (*name, value))
        };
        let bias =
            settings.get("bias").filter(|bias| bias.as_str() != Some("none")).map(|bias| ("bias", bias));
        let alphas = settings.get("alpha_pattern").filter(|value| !is_empty(value));
        let other = UNSUPPORTED.iter().find_map(other).or(bias).or(alphas.map(|v| ("alpha_pattern", v)));
        if let Some((name, value)) = other {
            return Err(refused(format!("{name} is {value}, which is not supported")));
        }
        let alpha = settings.get("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
        let alpha = alpha.ok_or_else(|| refused("lora_alpha is not a number".into()))?;
        let base = settings.get("base_model_name_or_path").and_then(Value::as_str).map(PathBuf::from);
        let hash = match folder.join(BASE) {
            file if file.exists() => {
                load_json(&file)?.get("blake3").and_then(Value::as_str).map(str::to_owned)
            }
            _ => None,
        };
        Ok(Self {
            matrices: pairs(folder, load_tensors(folder, device)?)?,
            alpha,
            by_root: settings.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            base,
            base_hash: hash,
            folder: folder.into(),
        })
    }

    /// The path or name of the model that the adapter belongs to.
    ///
    /// # Errors
    /// The settings do not name it.
    pub fn base(&self) -> Result<&Path> {
        self.base.as_deref().ok_or_else(|| {
            Error::Invalid(format!(
                "{}: base_model_name_or_path is missing; `gd convert --adapter` takes the path of the base",
                self.folder.join(ADAPTER_CONFIG).display()
            ))
        })
    }

    /// Adds the adapter to the weights of its base. The changed weights are in `dtype`, else in that of the base, to which they
    /// are rounded.
    ///
    /// # Errors
    /// [`Error::WrongBase`], or a projection that the base lacks or that has another shape.
    pub fn merge(&self, base: &mut Parts, dtype: Option<DType>) -> Result<()> {
        if let Some(expected) = &self.base_hash {
            let actual = hash(base).to_hex();
            if actual.as_str() != expected {
                let [expected, actual] =
                    [expected.as_str(), actual.as_str()].map(|h| h.chars().take(16).collect());
                return Err(Error::WrongBase {
                    path: self.folder.clone(),
                    base: base.path.clone(),
                    expected,
                    actual,
                });
            }
        }
        let missing: Vec<String> = self
            .matrices
            .keys()
            .filter(|path| !base.tensors.contains_key(&format!("{path}.weight")))
            .cloned()
            .collect();
        if !missing.is_empty() {
            return Err(Error::Invalid(format!(
                "{}: the base {} lacks {} projections of the adapter: {}",
                self.folder.display(),
                base.path.display(),
                missing.len(),
                shorten(&missing)
            )));
        }
        for (path, [a, b]) in &self.matrices {
            let Some(weight) = base.tensors.get_mut(&format!("{path}.weight")) else { continue };
            let fits = matches!((weight.dims(), a.dims(), b.dims()), ([o, i], [r, c], [p, s]) if o == p && i == c && r == s);
            if !fits {
                return Err(Error::Invalid(format!(
                    "{}: {path} is {:?} in the base, and its adapter is A {:?} and B {:?}; [O, I], [r, I] and [O, r] expected",
                    self.folder.display(),
                    weight.dims(),
                    a.dims(),
                    b.dims()
                )));
            }
            let rank = a.dim(0)? as f64;
            let scale = self.alpha / if self.by_root { rank.sqrt() } else { rank };
            let product = b.to_dtype(DType::F32)?.matmul(&a.to_dtype(DType::F32)?)?;
            let sum = (weight.to_dtype(DType::F32)? + (product * scale)?)?;
            *weight = sum.to_dtype(dtype.unwrap_or(weight.dtype()))?;
        }
        Ok(())
    }
}

/// The tensors of an adapter as pairs by the path of their projection.
fn pairs(folder: &Path, tensors: BTreeMap<String, Tensor>) -> Result<BTreeMap<String, [Tensor; 2]>> {
    let mut pairs: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for (name, tensor) in tensors {
        for (i, end) in ENDS.iter().enumerate() {
            if let Some(path) = name.strip_suffix(end) {
                pairs.entry(path.into()).or_default()[i] = Some(tensor.clone());
            }
        }
    }
    let whole = |(path, pair): (String, [Option<Tensor>; 2])| match pair {
        [Some(a), Some(b)] => Ok((path, [a, b])),
        _ => Err(Error::Invalid(format!(
            "{}: {path} has only one of lora_A and lora_B",
            folder.join(ADAPTER_WEIGHTS).display()
        ))),
    };
    pairs.into_iter().map(whole).collect()
}
