//! Reads GGUF files of models of the Llama family, as llama.cpp writes them, and converts them to the content of a Hugging
//! Face checkpoint.
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
mod pre_tokenizer;
mod special_tokens;
mod split;
mod tokenizer;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::{GgmlDType, ggml_file};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::io::checkpoint::TOKENIZER_CONFIG;
use crate::io::files::open_regular;
use crate::io::tokenizer::Tokenizer;
use config::Architecture;
use header::{Header, TensorInfo};
use special_tokens::SpecialTokens;
use split::Files;
pub use split::SplitName;

/// The content of a GGUF file with the names and the order of rows of Hugging Face.
#[derive(Debug)]
pub struct Gguf {
    /// The content of `config.json`.
    pub config: Value,
    /// The weights by name: in f16 or bf16 as in the file, all other types converted to f32.
    pub tensors: BTreeMap<String, Tensor>,
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
    let mut files = split::open(path)?;
    let foreign = |reason| Error::Foreign { path: path.into(), kind: "GGUF", reason };
    convert(path, &mut files, device).map_err(foreign)
}

/// Reads the files of a model. The error is the reason without the path, which is for warnings.
fn convert(path: &Path, files: &mut Files, device: &Device) -> std::result::Result<Gguf, String> {
    let Files { header, files } = files;
    let mut load = |info: &TensorInfo| load(&mut files[info.part], info);
    let architecture = Architecture::read(header)?;
    let factors = match header.tensors.get("rope_freqs.weight") {
        Some(info) => {
            let tensor = load(info).map_err(|e| format!("tensor rope_freqs.weight: {e}"))?;
            let values = tensor.flatten_all().and_then(|t| t.to_dtype(DType::F32)?.to_vec1::<f32>());
            Some(values.map_err(|e| e.to_string())?)
        }
        None => None,
    };
    let mut config = config::config(header, architecture, factors.as_deref())?;
    let count = |key: &str| config[key].as_u64().unwrap_or_default() as usize;
    let (heads, kv_heads) = (count("num_attention_heads"), count("num_key_value_heads"));
    let (tokenizer, special) = tokenizer::tokenizer(path, header)?;
    let mut tensors = BTreeMap::new();
    for (stored, info) in header.tensors.iter().filter(|(name, _)| *name != "rope_freqs.weight") {
        let named = |e: &dyn std::fmt::Display| format!("tensor {stored}: {e}");
        let unknown = || named(&format!("it is not a tensor of the {} architecture", architecture.name()));
        let name = name(stored).ok_or_else(unknown)?;
        let tensor = load(info).map_err(|e| named(&e))?;
        let tensor = match name.rsplit('.').nth(1).filter(|_| architecture.rotates_adjacent()) {
            Some("q_proj") => rotary_halves(&tensor, heads).map_err(|e| named(&e))?,
            Some("k_proj") => rotary_halves(&tensor, kv_heads).map_err(|e| named(&e))?,
            _ => tensor,
        };
        let tensor = tensor.to_device(device).map_err(|e| named(&e))?;
        tensors.insert(name, tensor);
    }
    let (generation, settings) = settings(header, &tokenizer, &special, &mut config)?;
    let files = BTreeMap::from([(TOKENIZER_CONFIG.to_owned(), format!("{settings:#}\n").into_bytes())]);
    Ok(Gguf { config, tensors, tokenizer, generation, files })
}

/// The name in Hugging Face of a tensor.
fn name(stored: &str) -> Option<String> {
    let whole = match stored {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(name) = whole {
        return Some(name.to_owned());
    }
    let (layer, rest) = stored.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.')?;
    let part = match part {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    ["weight", "bias"].contains(&kind).then(|| format!("model.layers.{layer}.{part}.{kind}"))
}

/// Reads a tensor: f16 and bf16 as in the file, all other types converted to f32.
fn load(file: &mut (impl Read + Seek), info: &TensorInfo) -> std::result::Result<Tensor, String> {
    let mut raw = vec![0; info.bytes as usize];
    file.seek(SeekFrom::Start(info.start))
        .and_then(|_| file.read_exact(&mut raw))
        .map_err(|e| e.to_string())?;
    let plain = |dtype| Tensor::from_raw_buffer(&raw, dtype, &info.shape, &Device::Cpu);
    let tensor = match info.dtype {
        GgmlDType::F32 => plain(DType::F32),
        GgmlDType::F16 => plain(DType::F16),
        GgmlDType::BF16 => plain(DType::BF16),
        dtype => ggml_file::qtensor_from_ggml(dtype, &raw, info.shape.clone(), &Device::Cpu)
            .and_then(|blocks| blocks.dequantize(&Device::Cpu)),
    };
    tensor.map_err(|e| e.to_string())
}

/// Permutes the rows of a query or key projection, or the elements of its bias, from pairs of adjacent rows to the two
/// halves of each head.
fn rotary_halves(rows: &Tensor, heads: usize) -> std::result::Result<Tensor, String> {
    let count = rows.dims().first().copied().unwrap_or(0);
    // Checked here, because an error of candle may carry a backtrace of many MiB.
    if heads == 0 || !count.is_multiple_of(2 * heads) {
        return Err(format!("{count} rows do not divide into {heads} heads of pairs"));
    }
    let pairs = rows.reshape((heads, count / heads / 2, 2, ())).and_then(|pairs| pairs.transpose(1, 2));
    pairs.and_then(|halves| halves.reshape(rows.shape())).map_err(|e| e.to_string())
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
    if let Some(template) = header.text("tokenizer.chat_template")? {
        settings["chat_template"] = template.into();
    }
    Ok((generation, settings))
}
