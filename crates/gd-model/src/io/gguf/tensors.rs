//! The tensors of a GGUF file: their names, the order of their rows, and their data.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, ggml_file};
use candle_core::{DType, Device, Tensor};
use gd_kernels::QuantizedMatrix;

use super::header::TensorInfo;
use crate::config::{EMBEDDING, HEAD, ModelConfig};

type Result<T> = std::result::Result<T, String>;

/// The names of tensors outside of the layers, in GGUF and in Hugging Face.
const WHOLE: [(&str, &str); 3] =
    [("token_embd.weight", EMBEDDING), ("output_norm.weight", "model.norm.weight"), ("output.weight", HEAD)];

/// The names of the parts of a layer, in GGUF and in Hugging Face.
const PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The name in Hugging Face of a tensor.
pub(super) fn name(stored: &str) -> Option<String> {
    if let Some((_, name)) = WHOLE.iter().find(|(theirs, _)| *theirs == stored) {
        return Some((*name).to_owned());
    }
    let (layer, rest) = stored.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, kind) = rest.split_once('.')?;
    let (_, part) = PARTS.iter().find(|(theirs, _)| *theirs == part)?;
    ["weight", "bias"].contains(&kind).then(|| format!("model.layers.{layer}.{part}.{kind}"))
}

/// The name in GGUF of a tensor.
pub(super) fn stored_name(name: &str) -> Option<String> {
    if let Some((theirs, _)) = WHOLE.iter().find(|(_, whole)| *whole == name) {
        return Some((*theirs).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (theirs, _) = PARTS.iter().find(|(_, ours)| *ours == part)?;
    Some(format!("blk.{layer}.{theirs}.{kind}"))
}

/// Whether the module of a parameter takes it in blocks of integers: projections of the layers, the embedding and the output
/// projection.
pub(super) fn is_projection(name: &str) -> bool {
    let of_layer = || {
        let (_, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let part = part.strip_suffix("_proj.weight")?;
        Some(
            ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.g"].contains(&part)
                || ["mlp.gate", "mlp.up", "mlp.down"].contains(&part),
        )
    };
    [EMBEDDING, HEAD].contains(&name) || of_layer() == Some(true)
}

/// The weights of a model by name.
#[derive(Default)]
pub(super) struct Weights {
    pub(super) tensors: BTreeMap<String, Tensor>,
    pub(super) quantized: BTreeMap<String, Arc<QuantizedMatrix>>,
}

/// Reads tensors from the files of a model.
pub(super) struct Loader<'a> {
    pub(super) files: &'a mut [BufReader<File>],
    pub(super) device: &'a Device,
    /// Whether matrices in blocks of integers stay so.
    pub(super) quantized: bool,
}

impl Loader<'_> {
    /// Reads a tensor and adds it to `weights` as `name`. With `heads`, its rows are those of a query or key projection whose
    /// pairs of the rotary embedding are adjacent.
    pub(super) fn load(
        &mut self,
        name: String,
        info: &TensorInfo,
        heads: Option<usize>,
        weights: &mut Weights,
    ) -> Result<()> {
        let file = &mut self.files[info.part];
        let is_plain = matches!(info.dtype, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        if let ([rows, columns], true) =
            (info.shape.as_slice(), self.quantized && !is_plain && is_projection(&name))
        {
            let mut blocks = bytes(file, info)?;
            if let Some(heads) = heads {
                let row_bytes = blocks.len() / rows;
                let order = halves_order(*rows, heads)?;
                blocks = order
                    .into_iter()
                    .flat_map(|row| blocks[row * row_bytes..][..row_bytes].iter().copied())
                    .collect();
            }
            let matrix =
                QuantizedMatrix::new(info.dtype, [*rows, *columns], &blocks).map_err(|e| e.to_string())?;
            weights.quantized.insert(name, Arc::new(matrix));
            return Ok(());
        }
        let tensor = load(file, info)?;
        let tensor = match heads {
            Some(heads) => rotary_halves(&tensor, heads)?,
            None => tensor,
        };
        let tensor = tensor.to_device(self.device).map_err(|e| e.to_string())?;
        weights.tensors.insert(name, tensor);
        Ok(())
    }
}

/// The data of a tensor.
fn bytes(file: &mut (impl Read + Seek), info: &TensorInfo) -> Result<Vec<u8>> {
    let mut raw = vec![0; info.bytes as usize];
    let read = file.seek(SeekFrom::Start(info.start)).and_then(|_| file.read_exact(&mut raw));
    read.map_err(|e| e.to_string()).map(|()| raw)
}

/// Reads a tensor: f16 and bf16 as in the file, all other types converted to f32.
pub(super) fn load(file: &mut (impl Read + Seek), info: &TensorInfo) -> Result<Tensor> {
    let raw = bytes(file, info)?;
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
fn rotary_halves(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let count = rows.dims().first().copied().unwrap_or(0);
    let order = halves_order(count, heads)?;
    let order = Tensor::from_iter(order.into_iter().map(|row| row as u32), rows.device());
    order.and_then(|order| rows.index_select(&order, 0)).map_err(|e| e.to_string())
}

/// The rows of pairs in the order of the two halves of each head.
fn halves_order(count: usize, heads: usize) -> Result<Vec<usize>> {
    // Checked here, because an error of candle may carry a backtrace of many MiB.
    if heads == 0 || !count.is_multiple_of(2 * heads) {
        return Err(format!("{count} rows do not divide into {heads} heads of pairs"));
    }
    let half = count / heads / 2;
    Ok((0..count).map(|row| row / (2 * half) * 2 * half + row % half * 2 + row % (2 * half) / half).collect())
}

/// A tensor with the rows of llama.cpp: those of a query or key projection, and the elements of its bias, in pairs of adjacent
/// rows in the place of the two halves of each head.
pub(super) fn adjacent_pairs(name: &str, tensor: &Tensor, config: &ModelConfig) -> Result<Tensor> {
    let heads = match name.rsplit('.').nth(1) {
        Some("q_proj") => config.num_attention_heads,
        Some("k_proj") => config.num_key_value_heads,
        _ => return Ok(tensor.clone()),
    };
    let halves = halves_order(tensor.dims().first().copied().unwrap_or(0), heads)?;
    let mut order = vec![0u32; halves.len()];
    for (row, stored) in halves.into_iter().enumerate() {
        order[stored] = row as u32;
    }
    let order = Tensor::new(order, tensor.device());
    order.and_then(|order| tensor.index_select(&order, 0)).map_err(|e| e.to_string())
}
