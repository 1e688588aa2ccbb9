//! Files that say less than they could, and the architectures beside llama.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::io::checkpoint::{CONFIG, load_json, load_tensors};
use gd_model::io::gguf;
use gd_model::model::pretrained;
use gd_testing::log_cases;
use serde_json::json;

use super::{CPU, HEAD_DIM, file, metadata, texts, vocabulary, weights};

#[test]
fn a_factor_without_a_type_is_linear_scaling() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let scaling = |keys: &[(&str, Value)]| -> Result<serde_json::Value> {
        let path = file(folder.path(), |m| {
            m.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())))
        })?;
        Ok(gguf::read(&path, &CPU)?.config["rope_scaling"].clone())
    };
    let (kind, factor, old) =
        ("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear");
    let text = |text: &str| Value::String(text.into());
    let linear = json!({ "rope_type": "linear", "factor": 4.0 });
    assert_eq!(scaling(&[(kind, text("linear")), (factor, Value::F32(4.0))])?, linear);
    assert_eq!(scaling(&[(factor, Value::F32(4.0))])?, linear);
    assert_eq!(scaling(&[(factor, Value::U32(4))])?, linear);
    assert_eq!(scaling(&[(old, Value::F32(4.0))])?, linear);
    for none in [
        &[(factor, Value::F32(1.0))][..],
        &[(factor, Value::F32(0.0))],
        &[(kind, text("none")), (factor, Value::F32(4.0))],
        &[(kind, text("linear"))],
        &[],
    ] {
        assert_eq!(scaling(none)?, serde_json::Value::Null, "{none:?}");
    }
    Ok(())
}

#[test]
fn ids_that_are_no_token_are_absent() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cases = 0;
    for kind in ["bos", "eos", "eot", "eom", "unknown"] {
        for id in [Value::I32(-1), Value::U32(u32::MAX), Value::I64(-1), Value::U32(14), Value::U64(u64::MAX)]
        {
            let key = format!("tokenizer.ggml.{kind}_token_id");
            let path = file(folder.path(), |m| {
                m.insert(key, id);
            })?;
            let read = gguf::read(&path, &CPU)?;
            ensure!(read.config.get("bos_token_id").is_none(), "{kind}: {}", read.config);
            // The vocabulary has <|end|> as a control token.
            ensure!(read.generation == json!({ "eos_token_id": [0] }), "{kind}: {}", read.generation);
            ensure!(read.tokenizer.encode("a")? == [1], "{kind}");
            cases += 1;
        }
    }
    // The begin token of Llama 3 is added by default, and here a flag asks for it.
    for flag in [None, Some(true)] {
        let path = file(folder.path(), |m| {
            m.insert("tokenizer.ggml.pre".into(), Value::String("llama-bpe".into()));
            m.insert("tokenizer.ggml.bos_token_id".into(), Value::I32(-1));
            m.extend(flag.map(|flag| ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(flag))));
        })?;
        ensure!(gguf::read(&path, &CPU)?.tokenizer.encode("a")? == [1]);
        cases += 1;
    }
    log_cases("gguf-ids", cases);
    Ok(())
}

#[test]
fn tokens_that_no_key_names_end_a_turn() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let names = [
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
    ];
    for name in names {
        for (kind, ends) in [(3, true), (4, true), (1, false)] {
            let (mut tokens, _) = vocabulary();
            (tokens[0], tokens[12]) = ("<stop>", name);
            let mut kinds = vec![Value::I32(1); tokens.len()];
            (kinds[0], kinds[12]) = (Value::I32(3), Value::I32(kind));
            let path = file(folder.path(), |m| {
                m.insert("tokenizer.ggml.tokens".into(), texts(&tokens));
                m.insert("tokenizer.ggml.token_type".into(), Value::Array(kinds));
            })?;
            let read = gguf::read(&path, &CPU)?;
            let expected = if ends { json!([0, 12]) } else { json!([0]) };
            ensure!(read.generation["eos_token_id"] == expected, "{name}, type {kind}: {}", read.generation);
        }
    }
    log_cases("gguf-ends", 3 * names.len());
    Ok(())
}

/// The name in GGUF of a tensor of Hugging Face.
fn stored_name(name: &str) -> Result<String> {
    let parts = [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let stored = parts.iter().fold(name.to_owned(), |name, (ours, theirs)| name.replace(ours, theirs));
    ensure!(!stored.contains("model") && !stored.contains("self_attn"), "{stored}");
    Ok(stored)
}

/// Writes the fixture of a family as a GGUF file of this architecture, without the sliding windows, which GGUF files of the
/// family do not have. `order` changes the rows of the query and key projections for a number of heads.
fn write_fixture(
    path: &Path,
    family: &str,
    architecture: &str,
    order: impl Fn(&Tensor, usize) -> Result<Tensor>,
) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family);
    let config = load_json(&folder.join(CONFIG))?;
    let size = |key: &str| config[key].as_u64().with_context(|| key.to_owned());
    let number = |key: &str| -> Result<Value> { Ok(Value::U32(size(key)? as u32)) };
    let head_dim = config["head_dim"].as_u64().unwrap_or(size("hidden_size")? / size("num_attention_heads")?);
    let rope = [&config["rope_parameters"], &config];
    let theta = rope.iter().find_map(|keys| keys["rope_theta"].as_f64()).context("rope_theta")?;
    let mut keys: Vec<(String, Value)> = vec![
        ("general.architecture".into(), Value::String(architecture.into())),
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.merges".into(), texts(&["a a"])),
    ];
    let mut tokens: Vec<String> = (0..256).map(|id| format!("token {id}")).collect();
    (tokens[0], tokens[1]) = ("a".into(), "aa".into());
    keys.push((
        "tokenizer.ggml.tokens".into(),
        Value::Array(tokens.into_iter().map(Value::String).collect()),
    ));
    for (key, value) in [
        ("block_count", number("num_hidden_layers")?),
        ("context_length", number("max_position_embeddings")?),
        ("embedding_length", number("hidden_size")?),
        ("feed_forward_length", number("intermediate_size")?),
        ("attention.head_count", number("num_attention_heads")?),
        ("attention.head_count_kv", number("num_key_value_heads")?),
        ("attention.key_length", Value::U32(head_dim as u32)),
        ("attention.value_length", Value::U32(head_dim as u32)),
        (
            "attention.layer_norm_rms_epsilon",
            Value::F32(config["rms_norm_eps"].as_f64().context("eps")? as f32),
        ),
        ("rope.freq_base", Value::F32(theta as f32)),
    ] {
        keys.push((format!("{architecture}.{key}"), value));
    }
    let mut tensors = Vec::new();
    for (name, tensor) in load_tensors(&folder, &CPU)? {
        let heads = match name.rsplit('.').nth(1) {
            Some("q_proj") => Some(size("num_attention_heads")?),
            Some("k_proj") => Some(size("num_key_value_heads")?),
            _ => None,
        };
        let tensor = tensor.to_dtype(DType::F32)?;
        let tensor = heads.map_or(Ok(tensor.clone()), |heads| order(&tensor, heads as usize))?;
        tensors.push((stored_name(&name)?, QTensor::quantize(&tensor, GgmlDType::F32)?));
    }
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let keys: Vec<_> = keys.iter().map(|(key, value)| (key.as_str(), value)).collect();
    Ok(gguf_file::write(&mut std::fs::File::create(path)?, &keys, &tensors)?)
}

/// The logits of the fixture of a family, in which no layer has a window.
fn logits_of_fixture(family: &str, ids: &Tensor) -> Result<Tensor> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family);
    let mut parts = pretrained::read(&folder, &CPU)?;
    parts.config.gd.windows.clear();
    let rope = parts.config.rope_parameters.as_mut().context("rope_parameters")?;
    (rope.rope_type, rope.factor) = ("default".into(), None);
    logits(parts, ids)
}

fn logits(parts: pretrained::Parts, ids: &Tensor) -> Result<Tensor> {
    Ok(parts.build(&CPU)?.model.forward(ids, &Pass::new(&Mask::causal(0)), None)?)
}

/// Rows `i` and `i + D / 2` of every head side by side, as llama.cpp stores them for adjacent rotation.
fn adjacent(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let half = rows.dim(0)? / heads / 2;
    Ok(rows.reshape((heads, 2, half, ()))?.transpose(1, 2)?.reshape(rows.shape())?)
}

#[test]
fn architectures_of_the_family_give_the_logits_of_the_checkpoint() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.gguf");
    let ids = Tensor::new(&b"The quick brown fox".map(u32::from)[..], &Device::Cpu)?.unsqueeze(0)?;
    let same = |rows: &Tensor, _: usize| Ok(rows.clone());
    let mut cases = 0;
    for (family, architecture, model_type) in [
        ("qwen2", "qwen2", "qwen2"),
        ("qwen3", "qwen3", "qwen3"),
        // Neither biases nor norms.
        ("mistral", "qwen2", "llama"),
        ("mistral", "qwen3", "llama"),
        ("mistral", "llama", "llama"),
        ("mistral", "mistral3", "llama"),
        // A file of llama with the biases of Qwen 2, as some converters write Qwen models.
        ("qwen2", "llama", "qwen2"),
    ] {
        let is_adjacent = ["llama", "mistral3"].contains(&architecture);
        match is_adjacent {
            true => write_fixture(&path, family, architecture, adjacent)?,
            false => write_fixture(&path, family, architecture, same)?,
        }
        let parts = pretrained::read(&path, &CPU)?;
        ensure!(
            parts.config.origin.as_ref().is_some_and(|origin| origin["model_type"] == model_type),
            "{architecture}"
        );
        let (actual, expected) = (logits(parts, &ids)?, logits_of_fixture(family, &ids)?);
        let off = (&actual - &expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
        ensure!(off < 2e-5, "{family} as {architecture}: off by {off}");
        // The order of rows matters, so that the comparison covers it.
        match is_adjacent {
            true => write_fixture(&path, family, architecture, same)?,
            false => write_fixture(&path, family, architecture, adjacent)?,
        }
        let off = (logits(pretrained::read(&path, &CPU)?, &ids)? - &expected)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        ensure!(off > 0.05, "{family} as {architecture}: off by {off} with the other order");
        cases += 1;
    }
    log_cases("gguf-architectures", cases);
    Ok(())
}

#[test]
fn incomplete_sets_of_norms_and_biases_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.gguf");
    for (names, expected) in [
        (&["attn_q.bias"][..], "only some of the projections"),
        (&["attn_q.bias", "attn_k.bias", "attn_v.bias", "ffn_gate.bias"], "only some of the projections"),
        (&["attn_q_norm.weight"], "only one of queries and keys"),
        (
            &["attn_q_norm.weight", "attn_k_norm.weight", "attn_q.bias", "attn_k.bias", "attn_v.bias"],
            "only some",
        ),
    ] {
        let mut weights = weights(true, vocabulary().0.len())?;
        for name in names {
            let ones = Tensor::ones(HEAD_DIM, DType::F32, &CPU)?;
            weights.push((format!("blk.0.{name}"), String::new(), ones));
        }
        super::write(&path, &metadata(), &weights, GgmlDType::Q8_0)?;
        let e = super::error(&path)?;
        ensure!(e.contains(expected), "{names:?}: {e}");
    }
    Ok(())
}

#[test]
fn a_folder_with_one_file_is_that_file_and_values_must_be_finite() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file(folder.path(), |_| ())?;
    let config = pretrained::read(folder.path(), &CPU)?.config;
    ensure!(config == pretrained::read(&path, &CPU)?.config && config.vocab_size == 14);
    std::fs::copy(&path, folder.path().join("second.gguf"))?;
    let e = pretrained::load(folder.path(), &CPU).err().context("an error was expected")?.to_string();
    ensure!(e.contains("several GGUF files") && e.contains("m.gguf, second.gguf"), "{e}");
    // A file with the extension and without content is reported as a GGUF file.
    std::fs::write(folder.path().join("second.gguf"), "GG")?;
    let e = pretrained::load(&folder.path().join("second.gguf"), &CPU).err().context("an error")?.to_string();
    ensure!(e.contains("second.gguf: not a valid GGUF file"), "{e}");

    let mut weights = weights(true, vocabulary().0.len())?;
    let mut values = weights[0].2.flatten_all()?.to_vec1::<f32>()?;
    (values[3], values[900]) = (f32::NAN, f32::INFINITY);
    weights[0].2 = Tensor::from_vec(values, weights[0].2.dims(), &CPU)?;
    super::write(&path, &metadata(), &weights, GgmlDType::F16)?;
    let e = pretrained::load(&path, &CPU).err().context("an error was expected")?.to_string();
    ensure!(
        e.contains("m.gguf: tensor \"model.embed_tokens.weight\"")
            && e.contains("1 are NaN and 1 are infinite"),
        "{e}"
    );
    Ok(())
}
