//! GGUF files: tensor types, the order of the rows, tokenizers, and unsupported or damaged files.

mod split;
mod tokens;
mod variants;
mod write;
mod write_sentencepiece;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use gd_model::io::gguf::{self, Gguf};
use gd_testing::log_cases;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

const CPU: Device = Device::Cpu;
const LAYERS: usize = 2;
const HIDDEN: usize = 256;
const FFN: usize = 512;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

type Metadata = BTreeMap<String, Value>;

fn texts(texts: &[&str]) -> Value {
    Value::Array(texts.iter().map(|text| Value::String((*text).into())).collect())
}

/// The tokens and the merges of a byte-level BPE vocabulary.
fn vocabulary() -> (Vec<&'static str>, Vec<&'static str>) {
    let tokens =
        vec!["<|end|>", "a", "b", "1", "2", "Ġ", ".", "ab", "Ġa", "12", "121", "1212", "<name>", "É"];
    (tokens, vec!["a b", "Ġ a", "1 2", "12 1", "12 12"])
}

fn metadata() -> Metadata {
    let (tokens, merges) = vocabulary();
    let mut kinds = vec![Value::I32(1); tokens.len()];
    (kinds[0], kinds[12]) = (Value::I32(3), Value::I32(4));
    let number = |x: usize| Value::U32(x as u32);
    [
        ("general.architecture", Value::String("llama".into())),
        ("llama.block_count", number(LAYERS)),
        ("llama.context_length", number(128)),
        ("llama.embedding_length", number(HIDDEN)),
        ("llama.feed_forward_length", number(FFN)),
        ("llama.attention.head_count", number(HEADS)),
        ("llama.attention.head_count_kv", number(KV_HEADS)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-6)),
        ("llama.rope.freq_base", Value::F32(5e5)),
        ("llama.rope.dimension_count", number(HEAD_DIM)),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", texts(&merges)),
        ("tokenizer.ggml.eos_token_id", number(0)),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value))
    .collect()
}

/// The weights with their names in GGUF and in Hugging Face, with rows in the order of Hugging Face.
fn weights(tied: bool, vocab: usize) -> Result<Vec<(String, String, Tensor)>> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut random = |rows: usize, columns: usize| {
        let values: Vec<f32> =
            (0..rows * columns).map(|_| rng.next_u32() as f32 / u32::MAX as f32 - 0.5).collect();
        match columns {
            1 => Tensor::from_vec(values, rows, &CPU),
            _ => Tensor::from_vec(values, (rows, columns), &CPU),
        }
    };
    let mut all = vec![
        ("token_embd.weight".into(), "model.embed_tokens.weight".into(), random(vocab, HIDDEN)?),
        ("output_norm.weight".into(), "model.norm.weight".into(), random(HIDDEN, 1)?),
    ];
    if !tied {
        all.push(("output.weight".into(), "lm_head.weight".into(), random(vocab, HIDDEN)?));
    }
    for n in 0..LAYERS {
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        for (theirs, ours, rows, columns) in [
            ("attn_norm", "input_layernorm", HIDDEN, 1),
            ("ffn_norm", "post_attention_layernorm", HIDDEN, 1),
            ("attn_q", "self_attn.q_proj", q, HIDDEN),
            ("attn_k", "self_attn.k_proj", kv, HIDDEN),
            ("attn_v", "self_attn.v_proj", kv, HIDDEN),
            ("attn_output", "self_attn.o_proj", HIDDEN, q),
            ("ffn_gate", "mlp.gate_proj", FFN, HIDDEN),
            ("ffn_up", "mlp.up_proj", FFN, HIDDEN),
            ("ffn_down", "mlp.down_proj", HIDDEN, FFN),
        ] {
            let name = |part: &str, before: &str| format!("{before}.{n}.{part}.weight");
            all.push((name(theirs, "blk"), name(ours, "model.layers"), random(rows, columns)?));
        }
    }
    Ok(all)
}

/// The rows of every head in the order of llama.cpp, where those of the two halves alternate.
fn interleaved(halves: &Tensor) -> Result<Tensor> {
    let half = HEAD_DIM / 2;
    let from = |row: usize| row / HEAD_DIM * HEAD_DIM + row % 2 * half + row % HEAD_DIM / 2;
    let order: Vec<u32> = (0..halves.dim(0)?).map(|row| from(row) as u32).collect();
    Ok(halves.index_select(&Tensor::new(order, &CPU)?, 0)?)
}

/// Writes a model with matrices of one type.
fn write(
    path: &Path,
    metadata: &Metadata,
    weights: &[(String, String, Tensor)],
    dtype: GgmlDType,
) -> Result<()> {
    let mut tensors = Vec::new();
    for (theirs, ours, tensor) in weights {
        let rotary = ours.contains("q_proj") || ours.contains("k_proj");
        let tensor = if rotary { interleaved(tensor)? } else { tensor.clone() };
        let dtype = if tensor.rank() == 1 { GgmlDType::F32 } else { dtype };
        tensors.push((theirs.as_str(), QTensor::quantize(&tensor, dtype)?));
    }
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    Ok(gguf_file::write(&mut File::create(path)?, &metadata, &tensors)?)
}

/// Writes a model with changed metadata.
fn file(folder: &Path, change: impl FnOnce(&mut Metadata)) -> Result<PathBuf> {
    let (path, mut metadata) = (folder.join("m.gguf"), metadata());
    change(&mut metadata);
    write(&path, &metadata, &weights(true, vocabulary().0.len())?, GgmlDType::Q8_0)?;
    Ok(path)
}

fn error(path: &Path) -> Result<String> {
    let error = gguf::read(path, &CPU).err().context("an error was expected")?.to_string();
    ensure!(error.contains("m.gguf") && !error.contains('\n'), "{error}");
    Ok(error)
}

#[test]
fn every_type_gives_the_weights_in_the_order_of_hugging_face() -> Result<()> {
    use GgmlDType::*;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.gguf");
    let mut cases = 0;
    for (dtype, tolerance) in [
        (F32, 0.0),
        (F16, 3e-4),
        (BF16, 2e-3),
        (Q8_0, 4e-3),
        (Q4_0, 0.07),
        (Q4_1, 0.04),
        (Q5_0, 0.04),
        (Q5_1, 0.02),
        (Q4K, 0.05),
        (Q5K, 0.03),
        (Q6K, 0.02),
    ] {
        let tied = cases % 2 == 0;
        let weights = weights(tied, vocabulary().0.len())?;
        write(&path, &metadata(), &weights, dtype)?;
        let Gguf { config, tensors, .. } = gguf::read(&path, &CPU)?;
        ensure!(
            tensors.len() == weights.len() && config["tie_word_embeddings"] == json!(tied),
            "{dtype:?} {config}"
        );
        let named = match dtype {
            F16 => "float16",
            BF16 => "bfloat16",
            _ => "float32",
        };
        ensure!(config["torch_dtype"] == named, "{dtype:?} {config}");
        for (_, name, expected) in &weights {
            let tensor = tensors.get(name).context(name.clone())?;
            let expected_dtype = match dtype {
                F16 if expected.rank() == 2 => DType::F16,
                BF16 if expected.rank() == 2 => DType::BF16,
                _ => DType::F32,
            };
            ensure!(
                tensor.dims() == expected.dims() && tensor.dtype() == expected_dtype,
                "{name} {tensor:?}"
            );
            let tensor = &tensor.to_dtype(DType::F32)?;
            // Quantized blocks do not cross rows, so their values do not depend on the order of the rows.
            let dtype = if expected.rank() == 1 { F32 } else { dtype };
            let stored = QTensor::quantize(expected, dtype)?.dequantize(&CPU)?;
            let far = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
            ensure!(far(tensor, &stored)? == 0.0, "{dtype:?} {name}: {}", far(tensor, &stored)?);
            ensure!(far(tensor, expected)? <= tolerance, "{dtype:?} {name}: {}", far(tensor, expected)?);
        }
        cases += 1;
    }
    log_cases("gguf-types", cases);
    Ok(())
}

#[test]
fn metadata_becomes_a_llama_config() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let read = gguf::read(&file(folder.path(), |_| ())?, &CPU)?;
    let expected = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 14, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
        "tie_word_embeddings": true, "attention_bias": false, "mlp_bias": false, "hidden_act": "silu",
        "torch_dtype": "float32", "eos_token_id": 0,
    });
    assert_eq!(read.config, expected);
    assert_eq!(read.generation, json!({ "eos_token_id": [0] }));

    // The factors of Llama 3.1 as a tensor, computed by a second implementation of the formula.
    let factors: Vec<f32> = (0..HEAD_DIM / 2)
        .map(|i| {
            let wavelength = std::f64::consts::TAU * 5e5f64.powf(i as f64 / (HEAD_DIM / 2) as f64);
            let (long, short) = (8192.0 / 1.0, 8192.0 / 4.0);
            if wavelength < short {
                1.0
            } else if wavelength > long {
                8.0
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / (4.0 - 1.0);
                (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
            }
        })
        .collect();
    let with = |factors: Vec<f32>| -> Result<PathBuf> {
        let path = folder.path().join("m.gguf");
        let mut weights = weights(true, vocabulary().0.len())?;
        let factors = Tensor::from_vec(factors, HEAD_DIM / 2, &CPU)?;
        weights.push(("rope_freqs.weight".into(), String::new(), factors));
        write(&path, &metadata(), &weights, GgmlDType::F16)?;
        Ok(path)
    };
    let read = gguf::read(&with(factors.clone())?, &CPU)?;
    let expected = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    assert_eq!(read.config["rope_scaling"], expected);
    assert!(!read.tensors.contains_key("rope_freqs.weight"));
    let mut other = factors;
    other[15] *= 1.1;
    let e = error(&with(other)?)?;
    assert!(e.contains("value 15 of tensor rope_freqs.weight"), "{e}");
    Ok(())
}

#[test]
fn text_is_split_by_the_named_pre_tokenizer() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cut = |pre: &str, begin: Option<bool>, text: &str| -> Result<String> {
        let path = file(folder.path(), |m| {
            m.insert("tokenizer.ggml.pre".into(), Value::String(pre.into()));
            m.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(0));
            if let Some(begin) = begin {
                m.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(begin));
            }
        })?;
        let tokenizer = gguf::read(&path, &CPU)?.tokenizer;
        let ids = tokenizer.encode(text)?;
        Ok(ids.iter().map(|&id| tokenizer.token(id).unwrap_or_default()).collect::<Vec<_>>().join("|"))
    };
    for (pre, expected) in [
        ("gpt-2", "ab|Ġa|.|1212|1212"),
        ("smollm", "ab|Ġa|.|1|2|1|2|1|2|1|2"),
        // Groups of three digits; there is no merge for 212.
        ("llama-bpe", "<|end|>|ab|Ġa|.|121|2|12|12"),
        ("qwen2", "ab|Ġa|.|1|2|1|2|1|2|1|2"),
        ("default", "ab|Ġa|.|121|2|12|12"),
    ] {
        assert_eq!(cut(pre, None, "ab a.12121212")?, expected, "{pre}");
    }
    // Control and user-defined tokens are never split; decoding drops control tokens.
    assert_eq!(cut("gpt-2", None, "a<|end|>b<name>")?, "a|<|end|>|b|<name>");
    assert_eq!(cut("gpt-2", Some(true), "a")?, "<|end|>|a");
    assert_eq!(cut("llama-bpe", Some(false), "a")?, "a");
    let tokenizer = gguf::read(&file(folder.path(), |_| ())?, &CPU)?.tokenizer;
    assert_eq!(tokenizer.decode(&tokenizer.encode("a<|end|>b<name> a")?)?, "ab<name> a");
    Ok(())
}

/// The ids are those of Python's sentencepiece 0.2.3 for a BPE vocabulary with byte fallback that it trained.
#[test]
fn tokens_are_those_of_sentencepiece() -> Result<()> {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../fixtures/sentencepiece.json"))?;
    let list = |key: &str| golden[key].as_array().cloned().unwrap_or_default();
    let tokens = list("tokens").into_iter().map(|t| Value::String(t.as_str().unwrap_or_default().into()));
    let scores = list("scores").into_iter().map(|x| Value::F32(x.as_f64().unwrap_or(f64::NAN) as f32));
    let types = list("types").into_iter().map(|x| Value::I32(x.as_i64().unwrap_or(-1) as i32));
    let mut metadata = metadata();
    metadata.remove("tokenizer.ggml.merges");
    metadata.extend([
        ("tokenizer.ggml.model".to_owned(), Value::String("llama".into())),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens.collect())),
        ("tokenizer.ggml.scores".to_owned(), Value::Array(scores.collect())),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(types.collect())),
        ("tokenizer.ggml.bos_token_id".to_owned(), Value::U32(1)),
        ("tokenizer.ggml.eos_token_id".to_owned(), Value::U32(2)),
    ]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.gguf");
    write(&path, &metadata, &weights(true, list("tokens").len())?, GgmlDType::Q8_0)?;
    let tokenizer = gguf::read(&path, &CPU)?.tokenizer;
    let texts = list("texts");
    ensure!(texts.len() == 10);
    for case in &texts {
        let text = case["text"].as_str().unwrap_or_default();
        let ids = case["ids"].as_array().into_iter().flatten().filter_map(|id| id.as_u64());
        let ids: Vec<u32> = [1].into_iter().chain(ids.map(|id| id as u32)).collect();
        assert_eq!(tokenizer.encode(text)?, ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids)?, text);
    }
    Ok(())
}

#[test]
fn unsupported_values_and_damage_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let text = |text: &str| Value::String(text.into());
    let cases: Vec<(&str, Option<Value>, &str)> = vec![
        (
            "general.architecture",
            Some(text("gemma")),
            "general.architecture is \"gemma\"; llama, mistral3, qwen2, qwen3",
        ),
        ("general.alignment", Some(Value::U32(0)), "general.alignment 0"),
        ("general.alignment", Some(Value::U32(24)), "general.alignment 24"),
        ("llama.block_count", None, "llama.block_count is missing"),
        ("llama.block_count", Some(text("two")), "llama.block_count is the text \"two\""),
        ("llama.attention.head_count", Some(Value::U32(0)), "0 heads"),
        ("llama.attention.head_count", Some(Value::I32(-4)), "head_count is -4"),
        ("llama.attention.head_count_kv", Some(Value::U32(3)), "4 heads over 3"),
        ("llama.attention.value_length", Some(Value::U32(32)), "value_length is 32; 64"),
        ("llama.rope.dimension_count", Some(Value::U32(32)), "dimension_count is 32; 64"),
        ("llama.expert_count", Some(Value::U32(8)), "expert_count is 8"),
        ("llama.rope.scaling.type", Some(text("yarn")), "\"yarn\""),
        ("llama.rope.freq_base", Some(Value::F32(f32::NAN)), "freq_base is NaN"),
        ("tokenizer.ggml.model", Some(text("bert")), "tokenizer.ggml.model is \"bert\""),
        ("tokenizer.ggml.pre", Some(text("bloom")), "tokenizer.ggml.pre is \"bloom\""),
        ("tokenizer.ggml.tokens", Some(texts(&["a", "b", "a"])), "token \"a\" occurs twice"),
        ("tokenizer.ggml.tokens", Some(texts(&["x"; 0])), "tokenizer.ggml.tokens is a list of 0 numbers"),
        ("tokenizer.ggml.merges", Some(texts(&["a 1"])), "merge \"a 1\": there is no token \"a1\""),
        ("tokenizer.ggml.merges", Some(texts(&["ab"])), "merge \"ab\" is no pair"),
        ("tokenizer.ggml.token_type", Some(Value::Array(vec![Value::I32(1)])), "1 token types for 14 tokens"),
        ("tokenizer.ggml.eos_token_id", Some(text("<|end|>")), "eos_token_id is the text \"<|end|>\""),
        ("llama.attention.scale", Some(Value::F32(0.5)), "attention.scale is 0.5"),
        ("llama.attention.causal", Some(Value::Bool(false)), "attention.causal is false"),
        ("tokenizer.ggml.add_bos_token", Some(Value::Bool(true)), "bos_token_id is missing"),
    ];
    let count = cases.len();
    for (key, value, expected) in cases {
        let path = file(folder.path(), |m| {
            m.remove(key);
            m.extend(value.map(|value| (key.to_owned(), value)));
        })?;
        let e = error(&path)?;
        ensure!(e.contains(expected), "{key}: {e}");
    }

    // Damaged bytes: lengths beyond the end of the file, tensors outside the file, and overlapping tensors.
    let path = file(folder.path(), |_| ())?;
    let whole = std::fs::read(&path)?;
    let find =
        |name: &str| whole.windows(name.len()).position(|w| w == name.as_bytes()).context(name.to_owned());
    // After a tensor's name: rank u32, dimensions u64, type u32, offset u64.
    let (q, k) = (find("blk.0.attn_q.weight")? + 19, find("blk.0.attn_k.weight")? + 19);
    let offset = whole[k + 24..k + 32].to_vec();
    let damage: Vec<(&str, usize, Vec<u8>, &str)> = vec![
        ("magic", 0, b"GGML".to_vec(), "does not start with GGUF"),
        ("version", 4, 1u32.to_le_bytes().to_vec(), "version 1"),
        ("tensors", 8, u64::MAX.to_le_bytes().to_vec(), "18446744073709551615 tensors"),
        ("keys", 16, 70_000u64.to_le_bytes().to_vec(), "70000 keys; 65536 of each"),
        (
            "a key's length",
            24,
            (1u64 << 62).to_le_bytes().to_vec(),
            "key 0: a name of 4611686018427387904 bytes",
        ),
        (
            "a list's length",
            find("tokenizer.ggml.merges")? + 29,
            (1u64 << 61).to_le_bytes().to_vec(),
            "merges: truncated",
        ),
        ("a rank", q, 9u32.to_le_bytes().to_vec(), "tensor blk.0.attn_q.weight: rank 9"),
        (
            "dimensions",
            q + 4,
            [1u64 << 40, 1 << 40].map(u64::to_le_bytes).concat(),
            "attn_q.weight: dimensions",
        ),
        ("a dimension of 0", q + 4, 0u64.to_le_bytes().to_vec(), "attn_q.weight: dimensions [0, 256]"),
        ("a type", q + 20, 99u32.to_le_bytes().to_vec(), "attn_q.weight: type 99"),
        ("a small type", q + 20, 10u32.to_le_bytes().to_vec(), "attn_q.weight: type 10"),
        (
            "an offset",
            q + 24,
            (1u64 << 40).to_le_bytes().to_vec(),
            "attn_q.weight: 69632 bytes at offset 1099511627776",
        ),
        ("an odd offset", q + 24, 1u64.to_le_bytes().to_vec(), "attn_q.weight: offset 1 is no multiple"),
        ("the same offset", q + 24, offset, "overlap"),
    ];
    let count = count + damage.len() + 1;
    for (what, at, bytes, expected) in damage {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(&bytes);
        std::fs::write(&path, damaged)?;
        let e = error(&path)?;
        ensure!(e.contains(expected), "{what}: {e}");
    }
    std::fs::write(&path, &whole[..whole.len() / 2])?;
    let e = error(&path)?;
    ensure!(e.contains("do not lie in a file of"), "{e}");
    log_cases("gguf-refused", count);
    Ok(())
}
