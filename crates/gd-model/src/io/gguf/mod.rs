//! Reads GGUF files of models of the Llama family, as llama.cpp writes them, and converts them to the content of a Hugging
//! Face checkpoint; writes such files with quantised weights.
//!
//! The rotary embedding of Hugging Face rotates the elements `i` and `i + D / 2` of a head. With the architectures llama and
//! mistral3, that of llama.cpp rotates adjacent elements: the rows of the query and key projections are permuted, so that row
//! `2 i + s` of a head in the GGUF file is row `s D / 2 + i` in the result. With qwen2 and qwen3 both are the same.
//!
//! The reader is not `candle_core::quantized::gguf_file` of candle 0.11, which divides by a `general.alignment` of 0, holds an
//! array of bytes in 32 times its size, and accepts tensors that overlap; candle's tokenizer from GGUF reads byte-level BPE
//! alone and takes the pre-tokenizer of GPT-2 for all that it does not have.

mod config;
mod header;
mod own;
mod pre_tokenizer;
mod quantization;
mod special_tokens;
mod split;
mod tensors;
mod tokenizer;
mod write;
mod write_config;
mod write_sentencepiece;
mod write_tokenizer;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use gd_kernels::QuantizedMatrix;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::io::checkpoint::TOKENIZER_CONFIG;
use crate::io::files::open_regular;
use crate::io::tokenizer::Tokenizer;
use config::Architecture;
use header::Header;
pub use quantization::Quantization;
use special_tokens::SpecialTokens;
use split::Files;
pub use split::SplitName;
use tensors::{Loader, Weights};
pub use write::{Model, Written, write};

/// The key of the architecture of a model.
const ARCHITECTURE: &str = "general.architecture";
/// The key of the chat template.
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";
/// The tensor of the divisors of the rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The content of a GGUF file with the names and the order of rows of Hugging Face.
#[derive(Debug)]
pub struct Gguf {
    /// The content of `config.json`.
    pub config: Value,
    /// The weights by name: in f16 or bf16 as in the file, all other types converted to f32.
    pub tensors: BTreeMap<String, Tensor>,
    /// The weights that stay in the blocks of the file ([`read_quantized`]), by name.
    pub quantized: BTreeMap<String, Arc<QuantizedMatrix>>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The content of `generation_config.json`: the end tokens.
    pub generation: Value,
    /// Other files by name: `tokenizer_config.json` with the chat template and the special tokens.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// Whether `path` is a file that starts with the magic number of GGUF, or that has the extension `gguf`.
pub fn is_at(path: &Path) -> bool {
    let has_extension = || path.extension().is_some_and(|extension| extension == "gguf");
    let has_magic = || {
        let mut start = [0; 4];
        open_regular(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && &start == b"GGUF"
    };
    path.is_file() && (has_extension() || has_magic())
}

/// Reads a GGUF file onto `device`, with the other parts if it is part of a split model. Besides the weights, memory holds
/// one tensor in its stored form at a time.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] with the key or tensor and its value if a file is damaged
/// or not supported; [`Error::Invalid`] for a part that is missing.
pub fn read(path: &Path, device: &Device) -> Result<Gguf> {
    open(path, device, false)
}

/// As [`read`], onto the CPU, where projections and embeddings that the file has in blocks of integers stay so.
///
/// # Errors
/// As [`read`].
pub fn read_quantized(path: &Path) -> Result<Gguf> {
    open(path, &Device::Cpu, true)
}

fn open(path: &Path, device: &Device, quantized: bool) -> Result<Gguf> {
    let mut files = split::open(path)?;
    let foreign = |reason| Error::Foreign { path: path.into(), kind: "GGUF", reason };
    convert(path, &mut files, device, quantized).map_err(foreign)
}

/// Reads the files of a model. The error is the reason without the path, which is for warnings.
fn convert(
    path: &Path,
    files: &mut Files,
    device: &Device,
    quantized: bool,
) -> std::result::Result<Gguf, String> {
    let Files { header, files } = files;
    let mut loader = Loader { files, device, quantized };
    if header.text(ARCHITECTURE)? == Some(own::ARCHITECTURE) {
        return own::read(header, &mut loader);
    }
    let architecture = Architecture::read(header)?;
    let factors = match header.tensors.get(ROPE_FACTORS) {
        Some(info) => {
            let tensor = tensors::load(&mut loader.files[info.part], info);
            let tensor = tensor.map_err(|e| format!("tensor {ROPE_FACTORS}: {e}"))?;
            let values = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>());
            Some(values.map_err(|e| e.to_string())?)
        }
        None => None,
    };
    let mut config = config::config(header, architecture, factors.as_deref())?;
    let count = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
    let (heads, kv_heads) = (count("num_attention_heads"), count("num_key_value_heads"));
    let (tokenizer, special) = tokenizer::tokenizer(path, header)?;
    let mut weights = Weights::default();
    for (stored, info) in header.tensors.iter().filter(|(name, _)| *name != ROPE_FACTORS) {
        let named = |e: String| format!("tensor {stored}: {e}");
        let unknown = || named(format!("it is not a tensor of the {} architecture", architecture.name()));
        let name = tensors::name(stored).ok_or_else(unknown)?;
        let heads = match name.rsplit('.').nth(1).filter(|_| architecture.rotates_adjacent()) {
            Some("q_proj") => Some(heads),
            Some("k_proj") => Some(kv_heads),
            _ => None,
        };
        loader.load(name, info, heads, &mut weights).map_err(named)?;
    }
    let (generation, settings) = settings(header, &tokenizer, &special, &mut config)?;
    let files = BTreeMap::from([(TOKENIZER_CONFIG.to_owned(), format!("{settings:#}\n").into_bytes())]);
    let Weights { tensors, quantized } = weights;
    Ok(Gguf { config, tensors, quantized, tokenizer, generation, files })
}

/// The contents of `generation_config.json` and `tokenizer_config.json`. Adds the ids of the begin and end tokens to
/// `config`.
fn settings(
    header: &Header,
    tokenizer: &Tokenizer,
    special: &SpecialTokens,
    config: &mut Value,
) -> std::result::Result<(Value, Value), String> {
    let (mut settings, mut generation) = (json!({}), json!({}));
    let named = [("bos_token", special.begin), ("eos_token", special.end), ("unk_token", special.unknown)];
    for (name, id) in named {
        if let Some(token) = id.and_then(|id| tokenizer.token(id as u32)) {
            settings[name] = token.into();
        }
    }
    if let Some(begin) = special.begin {
        config["bos_token_id"] = begin.into();
    }
    if let Some(first) = special.ends.first() {
        config["eos_token_id"] = (*first).into();
        generation["eos_token_id"] = special.ends.clone().into();
    }
    if let Some(template) = header.text(CHAT_TEMPLATE)? {
        settings["chat_template"] = template.into();
    }
    Ok((generation, settings))
}
