//! Loading and saving models: files are read as [`Parts`], from which a [`Loaded`] model is built, which can be saved as a
//! checkpoint folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use gd_kernels::QuantizedMatrix;
use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{Error, Result, shorten};
use crate::io::chat_template::ChatTemplate;
use crate::io::checkpoint::{self, Checkpoint};
use crate::io::files::read_file;
use crate::io::gguf::{self, Gguf, Quantization, Written};
use crate::io::tokenizer::Tokenizer;
use crate::io::{added_tokens, hub, safetensors};
use crate::model::adapter::{ADAPTER_CONFIG, Adapter};
use crate::model::params::Params;
use crate::model::shapes::shapes;
use crate::model::{Transformer, folder, weights};

/// Files of a checkpoint folder that are copied unchanged when the model is saved.
const COPIED: [&str; 3] =
    [checkpoint::TOKENIZER_CONFIG, "special_tokens_map.json", checkpoint::CHAT_TEMPLATE];

/// The key of the end-of-text tokens in `generation_config.json` or `config.json`: an id or a list of ids.
const EOS_KEY: &str = "eos_token_id";

/// The key of the begin token in `generation_config.json` or `config.json`.
const BOS_KEY: &str = "bos_token_id";

/// The Python classes with which `transformers` loads a checkpoint of this crate.
const PYTHON: [(&str, &str); 2] = [
    ("configuration_gd.py", include_str!("../../python/configuration_gd.py")),
    ("modeling_gd.py", include_str!("../../python/modeling_gd.py")),
];

/// The content of the files of a model.
#[derive(Debug)]
pub struct Parts {
    /// The configuration.
    pub config: ModelConfig,
    /// The weights in their stored dtypes, by the names of Llama.
    pub tensors: BTreeMap<String, Tensor>,
    /// The weights that stay in the blocks of a GGUF file ([`read_quantized`]), by the names of Llama.
    pub quantized: BTreeMap<String, Arc<QuantizedMatrix>>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The sampling defaults: the content of `generation_config.json`.
    pub generation: Value,
    /// Other files by name, which are copied unchanged when the model is saved.
    pub files: BTreeMap<String, Vec<u8>>,
    /// The seed of parameters without a tensor. Without a seed they are errors.
    pub seed: Option<u64>,
    /// Why newer checkpoints in the folder of a run could not be used; empty if the newest was loaded.
    pub skipped: Vec<String>,
    /// The path in messages: that of the configuration.
    pub(crate) path: PathBuf,
    /// The path of the weights.
    weights_path: PathBuf,
    /// The names and dtypes of the tensors beside the weights that were not read.
    other_dtypes: BTreeMap<String, String>,
}

/// How many adapters may lie over each other: the base of an adapter may be a run that has trained one.
const MAX_ADAPTERS: usize = 8;

/// How often a reader tries to read the newest checkpoint of a run if it is removed while it is read.
const MAX_ATTEMPTS: usize = 20;

/// A loaded model.
pub struct Loaded {
    /// The model, without gradients.
    pub model: Transformer,
    /// The parameters.
    pub params: Params,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The sampling defaults: the content of `generation_config.json`.
    pub generation: Value,
    /// Other files by name, which are copied unchanged when the model is saved.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Why newer checkpoints in the folder of a run could not be used; empty if the newest was loaded.
    pub skipped: Vec<String>,
}

/// Loads a model from a checkpoint folder, a `.safetensors` file in one, a GGUF file, or a folder with one. From the folder
/// of a run that is not complete it loads the newest valid checkpoint. A folder with an [adapter](crate::model::adapter) and no model stands
/// for its base with the adapter added. Where no file has the path, `ORG/NAME` and
/// `ORG/NAME:FILE` name a model of the Hugging Face [Hub](hub) in its cache. The model computes in f32.
///
/// ```no_run
/// use std::path::Path;
/// use candle_core::{Device, Tensor};
/// use gd_kernels::Mask;
/// use gd_layer::Pass;
/// use gd_model::model::pretrained;
///
/// let loaded = pretrained::load(Path::new("out/tiny"), &Device::Cpu)?;
/// let ids = Tensor::new(loaded.tokenizer.encode("Call me")?, &Device::Cpu)?.unsqueeze(0)?;
/// let logits = loaded.model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?;
/// assert_eq!(logits.dim(2)?, loaded.model.config().vocab_size);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Names the file and the reason.
pub fn load(path: &Path, device: &Device) -> Result<Loaded> {
    read(path, device)?.build(device)
}

/// As [`load`], for generating text: on the CPU the projections and the embedding that a GGUF file has in blocks of integers
/// stay so, and take the memory of the file. The model computes with the same weights as that of [`load`], in
/// [`quantized_linear`](gd_kernels::quantized_linear), and has no gradients.
///
/// # Errors
/// As [`load`].
pub fn load_quantized(path: &Path, device: &Device) -> Result<Loaded> {
    read_quantized(path, device)?.build(device)
}

/// Reads the files of a model, as [`load`] does, without building it.
///
/// # Errors
/// Names the file and the reason.
pub fn read(path: &Path, device: &Device) -> Result<Parts> {
    read_below(path, device, MAX_ADAPTERS, false)
}

/// Reads the files of a model, as [`load_quantized`] does, without building it.
///
/// # Errors
/// Names the file and the reason.
pub fn read_quantized(path: &Path, device: &Device) -> Result<Parts> {
    read_below(path, device, MAX_ADAPTERS, device.is_cpu())
}

/// As [`read`], or if `quantized` is set [`read_quantized`], where at most `adapters` adapters may lie over the model.
fn read_below(path: &Path, device: &Device, adapters: usize, quantized: bool) -> Result<Parts> {
    let path: &Path = &located(path)?;
    if gguf::is_at(path) {
        return read_gguf(path, device, quantized);
    }
    let mut attempts = 0;
    loop {
        attempts += 1;
        let (located, skipped) = checkpoint::locate(path)?;
        match read_located(&located, skipped, device, adapters, quantized) {
            // The run has removed the checkpoint meanwhile, because there is a newer one.
            Err(_) if attempts < MAX_ATTEMPTS && located != path && !located.exists() => {}
            result => return result,
        }
    }
}

/// Reads the files of the model at `path`, which is no folder of a run. `skipped` says why newer ones were not used.
fn read_located(
    path: &Path,
    skipped: Vec<String>,
    device: &Device,
    adapters: usize,
    quantized: bool,
) -> Result<Parts> {
    for reason in &skipped {
        tracing::warn!("{reason}; the model is loaded from {}", path.display());
    }
    if Adapter::is_at(path) {
        return Ok(Parts { skipped, ..read_adapted(path, device, adapters)? });
    }
    if path.is_dir()
        && let Some(file) = folder::gguf_in(path)?
    {
        return read_gguf(&file, device, quantized);
    }
    let folder: PathBuf = match path.is_dir() {
        true => path.into(),
        false => path.parent().map(Path::to_path_buf).unwrap_or_default(),
    };
    let weights_path = checkpoint::weights_file(path)?;
    folder::check_companions(&folder)?;
    let weights = checkpoint::load_weights(&weights_path, device)?;
    let mut weights = weights::rename(&weights_path, weights)?;
    let file = folder.join(checkpoint::CONFIG);
    let mut config = checkpoint::load_json(&file)?;
    weights::tie(&weights_path, &mut config, &mut weights)?;
    weights.require_complete()?;
    let tokenizer = added_tokens::apply(&folder, Tokenizer::load(&folder.join(checkpoint::TOKENIZER))?)?;
    let safetensors::Weights { tensors, other_dtypes, .. } = weights;
    let mut parts = Parts::new(&file, config, tensors, tokenizer)?;
    let generation = folder.join(checkpoint::GENERATION);
    if generation.exists() {
        let mut stored = checkpoint::load_json(&generation)?;
        for key in [EOS_KEY, BOS_KEY] {
            let absent = stored.get(key).is_none_or(Value::is_null);
            if let (true, Some(keys), Some(ids)) = (absent, stored.as_object_mut(), parts.generation.get(key))
            {
                keys.insert(key.into(), ids.clone());
            }
        }
        parts.generation = stored;
    }
    parts.files = copied_files(&folder)?;
    Ok(Parts { skipped, weights_path, other_dtypes, ..parts })
}

/// Reads the base of the adapter in `folder` and adds the adapter to its weights, in f32. Tokenizer, sampling defaults and
/// chat template are those beside the adapter where there are some.
fn read_adapted(folder: &Path, device: &Device, adapters: usize) -> Result<Parts> {
    let adapter = Adapter::read(folder, device)?;
    let base = adapter.base()?;
    if adapters == 0 {
        return Err(Error::Invalid(format!("{}: more than {MAX_ADAPTERS} adapters", folder.display())));
    }
    let mut parts = read_below(base, device, adapters - 1, false).map_err(|e| match e {
        Error::Missing { .. } | Error::NoModel { .. } => Error::Invalid(format!(
            "{}: the base of the adapter cannot be read: {e}; `gd convert --adapter {} MODEL` takes its new place",
            folder.join(ADAPTER_CONFIG).display(),
            folder.display()
        )),
        other => other,
    })?;
    adapter.merge(&mut parts, Some(DType::F32))?;
    if folder.join(checkpoint::TOKENIZER).exists() {
        let tokenizer = Tokenizer::load(&folder.join(checkpoint::TOKENIZER))?;
        parts.tokenizer = added_tokens::apply(folder, tokenizer)?;
    }
    if folder.join(checkpoint::GENERATION).exists() {
        parts.generation = checkpoint::load_json(&folder.join(checkpoint::GENERATION))?;
    }
    parts.files.extend(copied_files(folder)?);
    Ok(parts)
}

/// The path, or if nothing is there that of the model with this name: in the cache of the Hugging Face Hub, into which it is
/// fetched if it is not there (feature `hub`).
///
/// # Errors
/// [`Error::Hub`].
fn located(path: &Path) -> Result<PathBuf> {
    let Some(name) = hub::Name::parse(path).filter(|_| path.symlink_metadata().is_err()) else {
        return Ok(path.into());
    };
    let cached = || hub::find(&hub::cache_folder()?, &name);
    let stored = cached();
    #[cfg(feature = "hub")]
    if stored.as_deref().is_none_or(|stored| !folder::has_weights(stored)) {
        // In a folder that exists, a name is that of a file with a mistake in it.
        if path.parent().is_some_and(Path::is_dir) {
            return Ok(path.into());
        }
        hub::fetch(&name)?;
        return Ok(cached().unwrap_or_else(|| path.into()));
    }
    Ok(stored.unwrap_or_else(|| path.into()))
}

/// The files of a folder that are copied unchanged when its model is saved.
///
/// # Errors
/// Names the file that cannot be read.
pub(crate) fn copied_files(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for name in COPIED.into_iter().filter(|name| folder.join(name).exists()) {
        let path = folder.join(name);
        let content = read_file(&path, "file")?;
        files.insert(name.into(), content);
    }
    Ok(files)
}

fn read_gguf(path: &Path, device: &Device, quantized: bool) -> Result<Parts> {
    let gguf = if quantized { gguf::read_quantized(path)? } else { gguf::read(path, device)? };
    let Gguf { config, tensors, quantized, tokenizer, generation, files } = gguf;
    Ok(Parts { quantized, generation, files, ..Parts::new(path, config, tensors, tokenizer)? })
}

impl Parts {
    /// The parts of a model from `path`: its `config.json`, in the format of this crate or of a supported family, its
    /// tensors and its tokenizer.
    ///
    /// # Errors
    /// Names the path and every key or value that does not fit.
    pub fn new(
        path: &Path,
        config: Value,
        tensors: BTreeMap<String, Tensor>,
        tokenizer: Tokenizer,
    ) -> Result<Self> {
        let mut generation = generation_defaults();
        for key in [EOS_KEY, BOS_KEY] {
            if let Some(ids) = config.get(key).filter(|ids| !ids.is_null()) {
                generation[key] = ids.clone();
            }
        }
        let config = ModelConfig::from_json(config)
            .map_err(|problems| Error::Config { source_name: path.display().to_string(), problems })?;
        Ok(Self {
            config,
            tensors,
            quantized: BTreeMap::new(),
            tokenizer,
            generation,
            files: BTreeMap::new(),
            seed: None,
            skipped: Vec::new(),
            path: path.into(),
            weights_path: path.into(),
            other_dtypes: BTreeMap::new(),
        })
    }

    /// Casts the weights to `dtype`: f32, f16 or bf16.
    ///
    /// # Errors
    /// Names a tensor with values beyond the range of the dtype.
    pub fn cast(&mut self, dtype: DType) -> Result<()> {
        self.config.dtype = match dtype {
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            _ => "float32",
        }
        .into();
        for (name, tensor) in &mut self.tensors {
            let cast = tensor.to_dtype(dtype)?;
            // The sum of the absolute values is finite only if all of them are.
            let [before, after] =
                [&*tensor, &cast].map(|t| t.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>());
            if before?.is_finite() && !after?.is_finite() {
                let text = format!(
                    "{}: {name} has weights beyond the range of {}",
                    self.path.display(),
                    self.config.dtype
                );
                return Err(Error::Invalid(text));
            }
            *tensor = cast;
        }
        Ok(())
    }

    /// Builds the model on `device`. It computes in f32; matrices in half precision keep their dtype.
    ///
    /// # Errors
    /// An invalid configuration, or tensors that are missing or of another shape.
    pub fn build(self, device: &Device) -> Result<Loaded> {
        self.build_in(DType::F32, device)
    }

    /// As [`Parts::build`], with a model that computes in `dtype`.
    ///
    /// # Errors
    /// As [`Parts::build`].
    pub fn build_in(self, dtype: DType, device: &Device) -> Result<Loaded> {
        self.config.validate().map_err(|e| Error::Invalid(format!("{}: {e}", self.path.display())))?;
        let at = self.weights_path.display();
        self.check_dtypes()?;
        let params =
            Params::for_inference(self.tensors, self.seed, dtype, device).with_quantized(self.quantized);
        let invalid = |e: &dyn std::fmt::Display| Error::Invalid(format!("{at}: {e}"));
        let mut model = Transformer::new(&self.config, params.frozen()).map_err(|e| invalid(&e))?;
        model.set_quantized(params.quantized()).map_err(|e| invalid(&e))?;
        let mut unused = params.unused();
        unused.extend(self.other_dtypes.into_keys());
        // Files of older versions of transformers hold the rotary frequencies.
        unused.retain(|name| !name.ends_with("rotary_emb.inv_freq"));
        if !unused.is_empty() {
            let list = shorten(&unused);
            tracing::warn!("{at}: {} tensors that the model does not use are ignored: {list}", unused.len());
        }
        Ok(Loaded {
            generation: self.generation,
            files: self.files,
            skipped: self.skipped,
            ..Loaded::new(model, params, self.tokenizer)
        })
    }

    /// Checks that the tensors of the configuration are there.
    ///
    /// # Errors
    /// [`Error::MissingTensors`], or a tensor that is stored in a dtype that is not read.
    pub(crate) fn require_complete(&self) -> Result<()> {
        self.check_dtypes()?;
        let needed = shapes(&self.config)?;
        let needed = needed.keys().map(String::as_str).filter(|name| !self.quantized.contains_key(*name));
        checkpoint::require(&self.weights_path, &self.tensors, needed)
    }

    /// Checks that no parameter of the model is stored in a dtype that is not read, or as integers beside its scales
    /// (`q_proj.qweight` for `q_proj.weight`).
    fn check_dtypes(&self) -> Result<()> {
        if self.other_dtypes.is_empty() {
            return Ok(());
        }
        let in_place_of = |name: &str| {
            let module = name.strip_suffix("weight").filter(|module| !module.is_empty());
            let is_part = |other: &str| module.is_some_and(|module| other.starts_with(module));
            let part = || self.other_dtypes.iter().find(|(other, _)| is_part(other));
            self.other_dtypes.get_key_value(name).or_else(part)
        };
        let needed = shapes(&self.config)?;
        let missing = needed.keys().filter(|name| !self.tensors.contains_key(*name));
        match missing.filter_map(|name| in_place_of(name)).next() {
            None => Ok(()),
            Some((name, dtype)) => Err(Error::Invalid(format!(
                "{}: tensor {name:?} is {dtype}; weights in F32, F16, BF16 and F64 are read, quantised ones are not: \
                 convert the model to BF16, or use a GGUF file",
                self.weights_path.display()
            ))),
        }
    }
}

impl Loaded {
    /// A model that was not loaded from files, with the default sampling settings.
    pub fn new(model: Transformer, params: Params, tokenizer: Tokenizer) -> Self {
        Self {
            model,
            params,
            tokenizer,
            generation: generation_defaults(),
            files: BTreeMap::new(),
            skipped: Vec::new(),
        }
    }

    /// The dtype in which programs that generate text cache keys and values if nothing else is asked for: on the CPU f16 where
    /// matrices of the model are quantised or stored in 16 bits, else the dtype in which the model computes.
    pub fn default_cache_dtype(&self) -> DType {
        if self.params.has_narrow_matrices() && self.model.can_cache(DType::F16) {
            DType::F16
        } else {
            self.model.dtype()
        }
    }

    /// The end-of-text tokens: those of `generation_config.json`, else that of the tokenizer. Negative ids stand for none.
    ///
    /// # Errors
    /// An `eos_token_id` that is neither a token id nor a list of ids.
    pub fn end_tokens(&self) -> Result<Vec<u32>> {
        let ids = match self.generation.get(EOS_KEY) {
            None | Some(Value::Null) => return Ok(self.tokenizer.end_of_text().into_iter().collect()),
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        let id = |id: &Value| {
            let number = id.as_u64().and_then(|id| u32::try_from(id).ok());
            number.ok_or_else(|| Error::Invalid(format!("{EOS_KEY} {id} is not a token id")))
        };
        let is_id = |id: &&Value| !id.is_null() && id.as_i64().is_none_or(|id| id >= 0);
        ids.iter().filter(is_id).map(id).collect()
    }

    /// The begin token: that of `generation_config.json` or `config.json`, else that of `tokenizer_config.json`; `None` if
    /// none of them names a token that the model has.
    pub fn begin_token(&self) -> Option<u32> {
        let id = self.generation.get(BOS_KEY).and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let named = || {
            let settings = self.files.get(checkpoint::TOKENIZER_CONFIG)?;
            let settings: Value = serde_json::from_slice(settings).ok()?;
            let token = settings.get("bos_token")?;
            let name = token.as_str().or_else(|| token.get("content")?.as_str())?;
            self.tokenizer.token_id(name)
        };
        id.or_else(named).filter(|&id| (id as usize) < self.model.config().vocab_size)
    }

    /// The ids of a prompt. An empty text is continued from the begin token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`], and [`Error::Invalid`] for an empty text if the model has no begin token.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text)?;
        if !ids.is_empty() {
            return Ok(ids);
        }
        let begin = self.begin_token().ok_or_else(|| {
            Error::Invalid(
                "the prompt is empty, and the model has no begin token (bos_token_id) to start from; give it a text"
                    .into(),
            )
        })?;
        Ok(vec![begin])
    }

    /// The chat template among the files of the model, if there is one.
    ///
    /// # Errors
    /// As [`ChatTemplate::find`].
    pub fn chat(&self) -> Result<Option<ChatTemplate>> {
        ChatTemplate::find(&self.files)
    }

    /// Writes a checkpoint folder with the weights in their stored dtypes. An existing folder is replaced when the new one
    /// is complete. A model of another family is written with the configuration that was read.
    ///
    /// # Errors
    /// Names the file and the reason.
    pub fn save(&self, folder: &Path, card: &[(&str, String)]) -> Result<()> {
        if self.tokenizer.has_equal_scores() {
            tracing::warn!(
                "{}: tokens with equal scores are merged by their ids with the saved tokenizer.json, not from left to right",
                folder.display()
            );
        }
        let config = self.model.config();
        let mut extra = self.files.clone();
        extra.extend(python_files(config).map(|(name, text)| (name.to_owned(), text.as_bytes().to_vec())));
        checkpoint::save(
            folder,
            &Checkpoint {
                config: &config.to_json()?,
                tensors: &self.params.stored_tensors()?,
                tokenizer: &self.tokenizer,
                generation: &self.generation,
                card: &checkpoint::model_card(card)?,
                extra: &extra,
            },
        )
    }

    /// Writes a GGUF file with quantised matrices; see [`gguf::write`]. A model that llama.cpp does not read is written with
    /// the architecture `gd`.
    ///
    /// # Errors
    /// As [`gguf::write`].
    pub fn write_gguf(&self, path: &Path, quantization: Quantization) -> Result<Written> {
        let model = gguf::Model {
            config: self.model.config(),
            tensors: &self.params.stored_tensors()?,
            tokenizer: &self.tokenizer,
            generation: &self.generation,
            files: &self.files,
        };
        gguf::write(path, &model, quantization)
    }
}

/// The Python files of a checkpoint with this configuration; none for another family, which `transformers` supports.
pub(crate) fn python_files(config: &ModelConfig) -> impl Iterator<Item = (&'static str, &'static str)> {
    PYTHON.into_iter().filter(|_| !config.is_foreign())
}

/// The default sampling settings of a new model.
pub(crate) fn generation_defaults() -> Value {
    serde_json::json!({ "do_sample": true, "temperature": 0.8, "top_p": 0.95 })
}
