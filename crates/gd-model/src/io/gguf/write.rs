//! Writes GGUF files: models of the Llama family as llama.cpp reads them, and others with the architecture `gd`.

use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use super::config::Architecture;
use super::quantization::Quantization;
use super::{ARCHITECTURE, ROPE_FACTORS, own, tensors, write_config, write_tokenizer};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::io::files::stream_file;
use crate::io::tokenizer::Tokenizer;

/// The version of the block types (`general.quantization_version`).
const QUANTIZATION_VERSION: u32 = 2;

/// The metadata of a file.
pub(super) type Metadata = BTreeMap<String, Value>;

/// A model to write.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    /// The configuration.
    pub config: &'a ModelConfig,
    /// The weights by the names of Llama.
    pub tensors: &'a BTreeMap<String, Tensor>,
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The content of `generation_config.json`.
    pub generation: &'a serde_json::Value,
    /// Other files by name, which are texts: `tokenizer_config.json` and the chat template.
    pub files: &'a BTreeMap<String, Vec<u8>>,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// `general.architecture`: `gd` for a model that llama.cpp does not read.
    pub architecture: &'static str,
    /// The numbers of tensors by type.
    pub types: BTreeMap<String, usize>,
}

/// Writes a model with its matrices in blocks of integers. An existing file is replaced atomically.
///
/// A softmax model of the Llama family gets the metadata that llama.cpp reads. A model of this crate, such as one with
/// selecting layers, gets the architecture `gd`, which only this crate reads. Projections, embedding and output projection
/// are quantised; other parameters stay in f32.
///
/// # Errors
/// [`Error::Invalid`] with the tensor and its width if that is no multiple of the block, and for what a file for llama.cpp
/// cannot hold: layers with a window, scaled rotary frequencies beyond those of Llama 3, and tokenizers other than byte-level
/// BPE with a pre-tokenizer that has a name in GGUF and SentencePiece BPE whose merges follow from scores;
/// [`Error::Unwritable`].
pub fn write(path: &Path, model: &Model<'_>, quantization: Quantization) -> Result<Written> {
    let invalid = |reason: String| Error::Invalid(format!("{}: {reason}", path.display()));
    let architecture = Architecture::of(model.config).map_err(invalid)?;
    let name = architecture.map_or(own::ARCHITECTURE, Architecture::name);
    let mut metadata = Metadata::from([
        (ARCHITECTURE.to_owned(), Value::String(name.into())),
        ("general.file_type".to_owned(), Value::U32(quantization.file_type())),
        ("general.quantization_version".to_owned(), Value::U32(QUANTIZATION_VERSION)),
    ]);
    let mut blocks = BTreeMap::new();
    match architecture {
        None => own::describe(model, &mut metadata)?,
        Some(architecture) => {
            let factors =
                write_config::describe(architecture, model.config, &mut metadata).map_err(invalid)?;
            write_tokenizer::describe(model, &mut metadata).map_err(invalid)?;
            if let Some(factors) = factors {
                let factors = Tensor::new(factors, &Device::Cpu)?;
                blocks.insert(ROPE_FACTORS.to_owned(), QTensor::quantize(&factors, GgmlDType::F32)?);
            }
        }
    }
    for (name, tensor) in model.tensors {
        let named = |reason: String| invalid(format!("tensor {name}: {reason}"));
        let stored = match architecture {
            None => name.clone(),
            Some(_) => tensors::stored_name(name).ok_or_else(|| named("it has no name in GGUF".into()))?,
        };
        let tensor = match architecture {
            Some(architecture) if architecture.rotates_adjacent() => {
                tensors::adjacent_pairs(name, tensor, model.config).map_err(named)?
            }
            _ => tensor.clone(),
        };
        let dtype = dtype(name, &tensor, model.config, quantization).map_err(named)?;
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        blocks.insert(stored, QTensor::quantize(&tensor, dtype)?);
    }
    let mut types = BTreeMap::new();
    for tensor in blocks.values() {
        *types.entry(format!("{:?}", tensor.dtype())).or_insert(0) += 1;
    }
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let blocks: Vec<(&str, &QTensor)> = blocks.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    stream_file(path, |out| {
        let written = gguf_file::write(&mut Counted { out, at: 0 }, &metadata, &blocks);
        written.map_err(|e| Error::write(path, io::Error::other(e.to_string())))
    })?;
    Ok(Written { architecture: name, types })
}

/// The type of a tensor.
fn dtype(
    name: &str,
    tensor: &Tensor,
    config: &ModelConfig,
    quantization: Quantization,
) -> std::result::Result<GgmlDType, String> {
    let &[_, columns] = tensor.dims() else { return Ok(GgmlDType::F32) };
    if !tensors::is_projection(name) {
        return Ok(GgmlDType::F32);
    }
    quantization.type_of(name, columns, config.num_hidden_layers, name == config.output_weight())
}

/// A writer that knows its position, which is all that is asked of it.
struct Counted<'a> {
    out: &'a mut dyn Write,
    at: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Current(0) => Ok(self.at),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
