//! Written files: what is read back, the model that keeps its weights quantised, and what a file cannot hold.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Tensor};
use gd_kernels::{Mask, Score};
use gd_layer::Pass;
use gd_model::Transformer;
use gd_model::config::Mechanism;
use gd_model::io::gguf::{self, Gguf, Quantization};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::{self, Loaded, Parts};
use gd_model::model::swap::{Layers, Swap};
use gd_testing::log_cases;
use serde_json::json;

use super::{CPU, HIDDEN, LAYERS, file, metadata, vocabulary, weights, write};

/// A file in f32 with the weights of [`weights`], as a model.
fn source(folder: &Path, tied: bool) -> Result<(Loaded, BTreeMap<String, Tensor>)> {
    let weights = weights(tied, vocabulary().0.len())?;
    let (path, mut metadata) = (folder.join("m.gguf"), metadata());
    let template = Value::String("{% for m in messages %}{{ m.content }}{% endfor %}".into());
    metadata.insert("tokenizer.chat_template".into(), template);
    metadata.insert("tokenizer.ggml.bos_token_id".into(), Value::U32(0));
    metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(true));
    write(&path, &metadata, &weights, GgmlDType::F32)?;
    let tensors = weights.into_iter().map(|(_, name, tensor)| (name, tensor)).collect();
    Ok((pretrained::load(&path, &CPU)?, tensors))
}

/// A model of the Llama family with initial weights.
pub(super) fn initial(change: impl FnOnce(&mut serde_json::Value), tokenizer: Tokenizer) -> Result<Loaded> {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.vocab_size(),
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 0,
    });
    change(&mut config);
    let mut parts = Parts::new(Path::new("config.json"), config, BTreeMap::new(), tokenizer)?;
    parts.seed = Some(0);
    Ok(parts.build(&CPU)?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
}

/// The logits after every token: a part of the text at once, then token by token.
fn logits(model: &Transformer) -> Result<Tensor> {
    let ids: Vec<u32> = (0..60).map(|i| i * 7 % 13).collect();
    let (mut cache, mut all, mut first) = (model.new_cache(), Vec::new(), 0);
    for count in [40].into_iter().chain([1; 20]) {
        let ids = Tensor::new(&ids[first..first + count], &CPU)?.unsqueeze(0)?;
        let mask = Mask::causal(first as i64);
        all.push(model.forward(&ids, &Pass::new(&mask), Some(&mut cache))?);
        first += count;
    }
    Ok(Tensor::cat(&all, 1)?.detach())
}

#[test]
fn what_is_written_is_read_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("q.gguf");
    let mut cases = 0;
    for (i, quantization) in Quantization::ALL.into_iter().enumerate() {
        let tied = i % 2 == 0;
        let (loaded, tensors) = source(folder.path(), tied)?;
        let written = loaded.write_gguf(&path, quantization)?;
        let read = gguf::read(&path, &CPU)?;
        let mut config = loaded.model.config().to_json()?;
        config["torch_dtype"] = json!("float32");
        ensure!(written.architecture == "llama" && read.config == config, "{} {config}", read.config);
        ensure!(read.generation["eos_token_id"] == json!([0]), "{}", read.generation);
        let settings = |files: &BTreeMap<String, Vec<u8>>| {
            files
                .values()
                .map(|text| String::from_utf8_lossy(text).into_owned())
                .collect::<Vec<_>>()
                .join("\n")
        };
        ensure!(read.files == loaded.files, "{} {}", settings(&read.files), settings(&loaded.files));
        for text in ["ab a.12121212", "a<|end|>b<name>", "É2b"] {
            ensure!(read.tokenizer.encode(text)? == loaded.tokenizer.encode(text)?, "{text:?}");
        }
        let (mut types, output) =
            (BTreeMap::new(), if tied { "model.embed_tokens.weight" } else { "lm_head.weight" });
        ensure!(read.tensors.keys().eq(tensors.keys()));
        for (name, tensor) in &tensors {
            let dtype = match tensor.dims() {
                [_, columns] => {
                    let dtype = quantization.type_of(name, *columns, LAYERS, name == output);
                    dtype.map_err(anyhow::Error::msg)?
                }
                _ => GgmlDType::F32,
            };
            *types.entry(format!("{dtype:?}")).or_insert(0) += 1;
            let expected = QTensor::quantize(tensor, dtype)?.dequantize(&CPU)?;
            ensure!(distance(&read.tensors[name], &expected)? == 0.0, "{quantization:?} {name}");
            cases += 1;
        }
        ensure!(written.types == types, "{quantization:?}: {:?}, {types:?}", written.types);
        if quantization == Quantization::Q4KM {
            // The output projection, and in the second of two layers the values and the down projection.
            ensure!(types["Q6K"] == 3, "{types:?}");
        }
    }
    log_cases("gguf-written", cases);
    Ok(())
}

#[test]
fn a_quantised_model_computes_what_the_dequantised_one_does() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("q.gguf");
    for (i, quantization) in Quantization::ALL.into_iter().enumerate() {
        let (loaded, _) = source(folder.path(), i % 2 == 0)?;
        loaded.write_gguf(&path, quantization)?;
        let (full, quantized) = (pretrained::load(&path, &CPU)?, pretrained::load_quantized(&path, &CPU)?);
        let matrices = quantized.params.quantized();
        let projections = 7 * LAYERS + 2 - usize::from(i % 2 == 0);
        ensure!(full.params.quantized().is_empty() && matrices.len() == projections, "{quantization:?}");
        ensure!(full.params.count() == quantized.params.count(), "{quantization:?}");
        ensure!(full.params.hash()? == quantized.params.hash()?, "{quantization:?}");
        ensure!(quantized.params.tensors().values().all(|tensor| tensor.rank() == 1), "{quantization:?}");
        let (expected, actual) = (logits(&full.model)?, logits(&quantized.model)?);
        let scale = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let far = distance(&expected, &actual)?;
        ensure!(far <= 2e-3 * scale && far > 0.0, "{quantization:?}: {far} of {scale}");
        // The loss reads the dequantised output projection.
        let ids = Tensor::new(&[[1u32, 2, 3, 4]], &CPU)?;
        let mask = Mask::causal(0);
        let loss = |loaded: &Loaded| loaded.model.loss(&ids, &ids, &Pass::new(&mask))?.to_scalar::<f32>();
        let (a, b) = (loss(&full)?, loss(&quantized)?);
        ensure!((a - b).abs() <= 1e-2 * a.abs(), "{quantization:?}: {a} {b}");
    }
    Ok(())
}

#[test]
fn models_of_this_crate_have_an_architecture_of_their_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("q.gguf");
    source(folder.path(), true)?;
    let mut parts = pretrained::read(&folder.path().join("m.gguf"), &CPU)?;
    let swap = Swap { layers: Layers::All, mechanism: Mechanism::Gd, candidates: 64, score: Score::Dot };
    swap.apply(&mut parts)?;
    let loaded = parts.build(&CPU)?;
    let written = loaded.write_gguf(&path, Quantization::Q8_0)?;
    ensure!(written.architecture == "gd", "{written:?}");
    let Gguf { config, tokenizer, generation, files, quantized, .. } = gguf::read_quantized(&path)?;
    ensure!(config == loaded.model.config().to_json()? && quantized.len() == 7 * LAYERS + 1, "{config}");
    ensure!(tokenizer.to_json()? == loaded.tokenizer.to_json()? && files == loaded.files);
    ensure!(generation == loaded.generation, "{generation}");
    let (full, quantized) = (pretrained::load(&path, &CPU)?, pretrained::load_quantized(&path, &CPU)?);
    let (expected, actual) = (logits(&full.model)?, logits(&quantized.model)?);
    let scale = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let far = distance(&expected, &actual)?;
    ensure!(far <= 2e-3 * scale, "{far} of {scale}");
    // The same swap of a model whose weights stay quantised.
    let (softmax, path) = (source(folder.path(), true)?.0, folder.path().join("softmax.gguf"));
    softmax.write_gguf(&path, Quantization::Q8_0)?;
    let mut parts = pretrained::read_quantized(&path, &CPU)?;
    swap.apply(&mut parts)?;
    let far = distance(&logits(&parts.build(&CPU)?.model)?, &actual)?;
    ensure!(far <= 2e-3 * scale, "{far} of {scale}");
    Ok(())
}

#[test]
fn damaged_files_of_this_crate_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file(folder.path(), |metadata| {
        metadata.insert("general.architecture".into(), Value::String("gd".into()));
    })?;
    let error =
        |path: &Path| gguf::read(path, &CPU).err().context("an error was expected").map(|e| e.to_string());
    ensure!(error(&path)?.contains("key gd.config is missing"), "{}", error(&path)?);
    let path = file(folder.path(), |metadata| {
        let text = |text: &str| Value::String(text.into());
        metadata.insert("general.architecture".into(), text("gd"));
        metadata.insert("gd.config".into(), text("{"));
    })?;
    ensure!(error(&path)?.contains("key gd.config: EOF"), "{}", error(&path)?);
    // A scale that is NaN is an error in both forms.
    let (loaded, _) = source(folder.path(), true)?;
    let path = folder.path().join("m.gguf");
    loaded.write_gguf(&path, Quantization::Q8_0)?;
    let mut bytes = std::fs::read(&path)?;
    // The last tensor of the file is token_embd.weight, without padding. Its last block starts with the scale.
    let scale = bytes.len() - 34;
    bytes[scale..scale + 2].copy_from_slice(&[0xFF, 0x7F]);
    std::fs::write(&path, bytes)?;
    for result in [pretrained::load(&path, &CPU), pretrained::load_quantized(&path, &CPU)] {
        let error = result.err().context("an error was expected")?.to_string();
        ensure!(error.contains("NaN"), "{error}");
    }
    Ok(())
}

#[test]
fn what_a_file_cannot_hold_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let bpe = || -> Result<Tokenizer> { Ok(gguf::read(&file(folder.path(), |_| ())?, &CPU)?.tokenizer) };
    let scaling = |factor: f64| {
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": factor,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 })
    };
    let path = folder.path().join("q.gguf");
    let mut cases = 0;
    let mut check = |loaded: Result<Loaded>, expected: Option<&str>| -> Result<()> {
        let result = loaded?.write_gguf(&path, Quantization::Q4_0);
        match (result, expected) {
            (Ok(_), None) => ensure!(pretrained::load_quantized(&path, &CPU).is_ok()),
            (Err(e), Some(expected)) => {
                let e = e.to_string();
                ensure!(e.contains("q.gguf") && e.contains(expected) && !e.contains('\n'), "{e}");
                ensure!(!path.exists(), "{expected}: a file is left");
            }
            (result, _) => anyhow::bail!("{expected:?}: {result:?}"),
        }
        let _ = std::fs::remove_file(&path);
        cases += 1;
        Ok(())
    };
    check(initial(|_| (), bpe()?), None)?;
    check(initial(|c| c["rope_scaling"] = json!({ "rope_type": "linear", "factor": 2.0 }), bpe()?), None)?;
    check(initial(|c| c["rope_scaling"] = scaling(1.0), bpe()?), None)?;
    check(initial(|c| c["vocab_size"] = json!(20), bpe()?), None)?;
    check(
        initial(|c| c["intermediate_size"] = json!(80), bpe()?),
        Some("tensor model.layers.0.mlp.down_proj.weight: 80 columns are no multiple of the 32"),
    )?;
    check(initial(|c| c["rope_scaling"] = scaling(2.0), bpe()?), Some("low_freq_factor 2"))?;
    let mistral = |c: &mut serde_json::Value| {
        (c["model_type"], c["architectures"]) = (json!("mistral"), json!(["MistralForCausalLM"]));
        c["sliding_window"] = json!(32);
    };
    check(initial(mistral, bpe()?), Some("layer 0 has a window of 32 keys"))?;
    check(initial(|_| (), Tokenizer::bytes()?), Some("no merges"))?;
    log_cases("gguf-not-written", cases);
    Ok(())
}

/// The dtype of the hidden states of a quantised model is f32, whatever that of the other tensors is.
#[test]
fn a_quantised_model_refuses_gradients() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = file(folder.path(), |_| ())?;
    let loaded = pretrained::load_quantized(&path, &CPU)?;
    let x = candle_core::Var::zeros((1, 3, HIDDEN), DType::F32, &CPU)?;
    let mask = Mask::causal(0);
    let error = loaded.model.hidden_of(x.as_tensor().clone(), &Pass::new(&mask), None);
    let error = error.err().context("an error was expected")?.to_string();
    ensure!(error.contains("quantized_linear: gradients"), "{error}");
    Ok(())
}
