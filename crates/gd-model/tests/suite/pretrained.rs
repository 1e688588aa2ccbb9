//! Checkpoints as other programs write them: tied projections, names with prefixes, other dtypes, values that are not
//! finite, folders of other kinds, and the tokens beside a tokenizer.
//!
//! Each case changes a checkpoint of scripts/golden/llama.py, whose logits are those of transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::config::{self, ModelConfig};
use gd_model::io::checkpoint::{CONFIG, INDEX, TOKENIZER, WEIGHTS, load_json, load_tensors, write_tensors};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::{self, Loaded};
use gd_testing::log_cases;
use safetensors::tensor::{Dtype, TensorView, View};
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const TIED: &str = "tie_word_embeddings";

type Tensors = BTreeMap<String, Tensor>;

/// A checkpoint in memory.
#[derive(Clone)]
struct Model {
    family: &'static str,
    config: Value,
    tensors: Tensors,
}

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family)
}

impl Model {
    /// The untied model in f32.
    fn new() -> Result<Self> {
        Self::of("mistral")
    }

    fn of(family: &'static str) -> Result<Self> {
        let folder = fixture(family);
        Ok(Self { family, config: load_json(&folder.join(CONFIG))?, tensors: load_tensors(&folder, &CPU)? })
    }

    /// The model with its embedding as its output projection, stored twice and not tied.
    fn shared() -> Result<Self> {
        let mut model = Self::new()?;
        model.tensors.insert(HEAD.into(), model.tensors[EMBEDDING].copy()?);
        Ok(model)
    }

    /// Sets a key of the configuration; null removes it.
    fn with(mut self, key: &str, value: Value) -> Self {
        match value {
            Value::Null => drop(self.config.as_object_mut().map(|keys| keys.remove(key))),
            _ => self.config[key] = value,
        }
        self
    }

    fn without(mut self, tensor: &str) -> Self {
        self.tensors.remove(tensor);
        self
    }

    /// The model with other names of its tensors.
    fn renamed(mut self, name: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(old, tensor)| (name(&old), tensor)).collect();
        self
    }

    /// Writes the configuration and the tokenizer into a new folder.
    fn folder(&self) -> Result<tempfile::TempDir> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join(CONFIG), self.config.to_string())?;
        fs::write(folder.path().join(TOKENIZER), fs::read(fixture(self.family).join(TOKENIZER))?)?;
        Ok(folder)
    }

    /// Writes a checkpoint folder.
    fn write(&self) -> Result<tempfile::TempDir> {
        let folder = self.folder()?;
        write_tensors(&folder.path().join(WEIGHTS), &self.tensors)?;
        Ok(folder)
    }

    /// Writes a checkpoint folder in which the tensors `other` have any dtype.
    fn write_with(&self, other: &[(String, Dtype, Vec<usize>)]) -> Result<tempfile::TempDir> {
        let folder = self.folder()?;
        let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, t)| (name.clone(), View::dtype(&t), t.dims().to_vec(), View::data(&t).into_owned()))
            .collect();
        for (name, dtype, shape) in other {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            data.push((name.clone(), *dtype, shape.clone(), vec![1; bytes]));
        }
        let views = data.iter().map(|(name, dtype, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>>>()?;
        safetensors::serialize_to_file(views, None, &folder.path().join(WEIGHTS))?;
        Ok(folder)
    }

    /// The logits of the written model.
    fn logits(&self) -> Result<Tensor> {
        logits(self.write()?.path())
    }
}

fn logits(folder: &Path) -> Result<Tensor> {
    let ids = golden("mistral")?.0;
    Ok(pretrained::load(folder, &CPU)?.model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?.squeeze(0)?)
}

/// The token ids `[1, N]` of a fixture and their logits `[N, V]`.
fn golden(family: &str) -> Result<(Tensor, Tensor)> {
    let tensors = load_tensors(&fixture(family).join("golden.safetensors"), &CPU)?;
    Ok((tensors["ids"].to_dtype(DType::U32)?.unsqueeze(0)?, tensors["logits"].clone()))
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

/// The error of loading a model, on one line.
fn error(path: &Path) -> Result<String> {
    let error = pretrained::load(path, &CPU).err().context("an error was expected")?.to_string();
    // Where RUST_BACKTRACE is set, candle writes a backtrace below the message.
    Ok(error.lines().next().unwrap_or_default().to_owned())
}

fn check(error: &str, words: &[&str]) -> Result<()> {
    ensure!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
    Ok(())
}

/// Writes the tensors in two shards, and the tensors `listed` in addition to them in the index.
fn write_shards(model: &Model, listed: &[&str]) -> Result<tempfile::TempDir> {
    let folder = model.folder()?;
    let mut map = serde_json::Map::new();
    for (at, shard) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let of_shard = |(place, (name, tensor)): (usize, (&String, &Tensor))| {
            (place % 2 == at).then(|| (name.clone(), tensor.clone()))
        };
        let part: Tensors = model.tensors.iter().enumerate().filter_map(of_shard).collect();
        map.extend(part.keys().map(|name| (name.clone(), json!(shard))));
        write_tensors(&folder.path().join(shard), &part)?;
    }
    map.extend(listed.iter().map(|name| ((*name).to_owned(), json!("b.safetensors"))));
    fs::write(folder.path().join(INDEX), json!({ "weight_map": map }).to_string())?;
    Ok(folder)
}

#[test]
fn a_tied_matrix_is_found_under_either_name() -> Result<()> {
    let shared = Model::shared()?;
    let expected = shared.logits()?;
    let mut cases = 0;
    for flag in [json!(true), Value::Null] {
        for stored in [EMBEDDING, HEAD] {
            let other = if stored == HEAD { EMBEDDING } else { HEAD };
            let model = shared.clone().with(TIED, flag.clone()).without(other);
            ensure!(distance(&model.logits()?, &expected)? == 0.0, "{flag}, {stored}");
            // The index may list both.
            for listed in [&[][..], &[other][..]] {
                let folder = write_shards(&model, listed)?;
                ensure!(distance(&logits(folder.path())?, &expected)? == 0.0, "{flag}, {stored}, {listed:?}");
                cases += 1;
            }
            let loaded = pretrained::load(model.write()?.path(), &CPU)?;
            ensure!(loaded.model.config().tie_word_embeddings && loaded.model.config().is_foreign());
            ensure!(loaded.model.config().to_json()?[TIED] == json!(true));
            cases += 1;
        }
    }
    let both = shared.clone().with(TIED, json!(true));
    ensure!(distance(&both.logits()?, &expected)? == 0.0);
    ensure!(pretrained::load(both.write()?.path(), &CPU)?.model.config().tie_word_embeddings);
    log_cases("tied", cases + 1);
    Ok(())
}

#[test]
fn two_different_matrices_are_not_tied() -> Result<()> {
    let expected = golden("mistral")?.1;
    for flag in [json!(true), json!(false), Value::Null] {
        let model = Model::new()?.with(TIED, flag.clone());
        ensure!(distance(&model.logits()?, &expected)? < 2e-5, "{flag}");
        ensure!(!pretrained::load(model.write()?.path(), &CPU)?.model.config().tie_word_embeddings);
    }
    Ok(())
}

#[test]
fn an_untied_model_needs_both_matrices() -> Result<()> {
    for (missing, stored) in [(HEAD, EMBEDDING), (EMBEDDING, HEAD)] {
        let model = Model::shared()?.with(TIED, json!(false)).without(missing);
        let folder = model.write()?;
        check(&error(folder.path())?, &[WEIGHTS, &format!("no tensor {missing:?}"), TIED, stored])?;
        let folder = write_shards(&model, &[missing])?;
        check(&error(folder.path())?, &["b.safetensors: 1 tensors are missing", missing])?;
    }
    // A shard without another tensor that the index lists.
    let norm = "model.layers.1.input_layernorm.weight";
    let folder = write_shards(&Model::new()?.without(norm), &[norm])?;
    check(&error(folder.path())?, &["b.safetensors: 1 tensors are missing", norm])
}

#[test]
fn prefixes_of_wrappers_are_removed_and_a_missing_one_is_added() -> Result<()> {
    let expected = golden("mistral")?.1;
    type Rename = fn(&str) -> String;
    let cases: [(&str, Rename); 7] = [
        ("compiled", |name| format!("_orig_mod.{name}")),
        ("parallel", |name| format!("module.{name}")),
        ("compiled and parallel", |name| format!("module._orig_mod.{name}")),
        ("compiled layers", |name| match name.split_once(".self_attn.") {
            Some((layer, rest)) => format!("{layer}._orig_mod.self_attn.{rest}"),
            None => name.into(),
        }),
        ("sharded, with recomputation", |name| {
            name.replace(".self_attn", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn")
        }),
        ("without the output projection's class", |name| name.trim_start_matches("model.").into()),
        ("the same, compiled", |name| format!("_orig_mod.{}", name.trim_start_matches("model."))),
    ];
    for (what, rename) in cases {
        let model = Model::new()?.renamed(rename);
        ensure!(distance(&model.logits()?, &expected)? < 2e-5, "{what}");
        let folder = write_shards(&model, &[])?;
        ensure!(distance(&logits(folder.path())?, &expected)? < 2e-5, "{what}, in shards");
    }
    for prefix in ["student.", "base_model.model.model.", "transformer."] {
        let model = Model::new()?.renamed(|name| name.replacen("model.", prefix, 1));
        let text = error(model.write()?.path())?;
        check(&text, &[WEIGHTS, &format!("the prefix {prefix:?}"), "start with \"model.\""])?;
    }
    let mut twice = Model::new()?;
    twice.tensors.insert(format!("module.{HEAD}"), twice.tensors[HEAD].clone());
    check(&error(twice.write()?.path())?, &[WEIGHTS, "several tensors are", HEAD])
}

#[test]
fn tensors_beside_the_weights_may_have_any_dtype() -> Result<()> {
    let expected = golden("mistral")?.1;
    let model = Model::new()?;
    let dtypes = [
        Dtype::BOOL,
        Dtype::U8,
        Dtype::I8,
        Dtype::I16,
        Dtype::U16,
        Dtype::I32,
        Dtype::U32,
        Dtype::I64,
        Dtype::U64,
        Dtype::F8_E4M3,
        Dtype::F8_E5M2,
        Dtype::F8_E8M0,
        Dtype::F16,
        Dtype::BF16,
        Dtype::F32,
        Dtype::F64,
        Dtype::C64,
        Dtype::F4,
    ];
    for dtype in dtypes {
        let buffers = ["model.layers.0.self_attn.bias", "model.layers.1.self_attn.masked_bias", "steps"];
        let buffers = buffers.map(|name| (name.to_owned(), dtype, vec![4, 4]));
        let folder = model.write_with(&buffers)?;
        ensure!(distance(&logits(folder.path())?, &expected)? < 2e-5, "{dtype:?}");
    }
    // Values that are not finite matter in weights alone.
    let mut mask = model;
    mask.tensors.insert("model.layers.0.self_attn.bias".into(), Tensor::full(f32::NEG_INFINITY, 4, &CPU)?);
    ensure!(distance(&mask.logits()?, &expected)? < 2e-5);
    log_cases("buffer-dtypes", dtypes.len());
    Ok(())
}

#[test]
fn weights_in_integers_or_8_bits_are_refused_with_name_and_dtype() -> Result<()> {
    let weight = "model.layers.1.self_attn.q_proj.weight";
    let model = Model::new()?.without(weight);
    for dtype in
        [Dtype::I8, Dtype::U8, Dtype::I32, Dtype::I64, Dtype::F8_E4M3, Dtype::F8_E5M2, Dtype::F8_E4M3FNUZ]
    {
        for scales in [&[][..], &["weight_scale"], &["weight_scale_inv"], &["SCB"]] {
            let mut tensors = vec![(weight.to_owned(), dtype, vec![32, 32])];
            let scale = |name: &&str| (weight.replace("weight", name), Dtype::F32, vec![1]);
            tensors.extend(scales.iter().map(scale));
            let folder = model.write_with(&tensors)?;
            check(&error(folder.path())?, &[WEIGHTS, weight, &format!("{dtype:?}"), "BF16"])
                .with_context(|| format!("{dtype:?} {scales:?}"))?;
        }
    }
    let packed = weight.replace("weight", "qweight");
    let folder = model.write_with(&[(packed.clone(), Dtype::I32, vec![4, 32])])?;
    check(&error(folder.path())?, &[WEIGHTS, &packed, "I32"])?;
    // Without any tensor in its place, the weight is missing.
    check(&error(model.write()?.path())?, &[WEIGHTS, "no tensor", weight])
}

#[test]
fn weights_that_are_not_finite_are_counted() -> Result<()> {
    let mut cases = 0;
    // f32, bf16, f16.
    for family in ["mistral", "qwen2", "qwen3"] {
        let model = Model::of(family)?;
        for (name, tensor) in &model.tensors {
            let mut values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let last = values.len() - 1;
            (values[0], values[1], values[last]) = (f32::NAN, f32::NEG_INFINITY, f32::NAN);
            let mut damaged = model.clone();
            let tensor = Tensor::from_vec(values, tensor.dims(), &CPU)?.to_dtype(tensor.dtype())?;
            damaged.tensors.insert(name.clone(), tensor);
            let text = error(damaged.write()?.path())?;
            let counts = format!("of {} values 2 are NaN and 1 are infinite", last + 1);
            check(&text, &[WEIGHTS, &format!("{name:?}"), &counts])
                .with_context(|| format!("{family} {name}"))?;
            cases += 1;
        }
    }
    log_cases("not-finite", cases);
    Ok(())
}

#[test]
fn a_tokenizer_may_have_more_or_fewer_tokens_than_the_model() -> Result<()> {
    for (rows, name) in [(200, "fewer"), (300, "more")] {
        let mut model = Model::new()?.with("vocab_size", json!(rows));
        for name in [EMBEDDING, HEAD] {
            model.tensors.insert(name.into(), Tensor::ones((rows, 32), DType::F32, &CPU)?);
        }
        let loaded = pretrained::load(model.write()?.path(), &CPU)?;
        assert_eq!((loaded.model.config().vocab_size, loaded.tokenizer.vocab_size()), (rows, 256), "{name}");
    }
    Ok(())
}

#[test]
fn end_tokens_may_be_absent_negative_or_several() -> Result<()> {
    let ends = |config: Value, generation: Option<Value>| -> Result<Vec<u32>> {
        let mut model = Model::new()?;
        model.config["eos_token_id"] = config;
        let folder = model.write()?;
        if let Some(generation) = generation {
            let text = json!({ "eos_token_id": generation }).to_string();
            fs::write(folder.path().join("generation_config.json"), text)?;
        }
        Ok(pretrained::load(folder.path(), &CPU)?.end_tokens()?)
    };
    let none: [u32; 0] = [];
    assert_eq!(ends(json!(-1), None)?, none);
    assert_eq!(ends(Value::Null, None)?, none);
    assert_eq!(ends(json!([]), None)?, none);
    assert_eq!(ends(json!(7), None)?, [7]);
    assert_eq!(ends(json!([7, -1, 9, null]), None)?, [7, 9]);
    assert_eq!(ends(json!(7), Some(Value::Null))?, [7]);
    assert_eq!(ends(json!(7), Some(json!([3, 4])))?, [3, 4]);
    assert_eq!(ends(json!(-1), Some(json!(-1)))?, none);
    for bad in [json!("seven"), json!(7.5), json!([true]), json!(1_u64 << 40)] {
        let e = ends(bad.clone(), None).err().context("an error was expected")?.to_string();
        check(&e, &["eos_token_id", &bad.to_string().replace(['[', ']'], "")])?;
    }
    Ok(())
}

/// The ids of a text with the tokenizer of a folder.
fn encode(loaded: &Loaded, text: &str) -> Result<Vec<u32>> {
    Ok(loaded.tokenizer.encode(text)?)
}

#[test]
fn added_tokens_beside_the_tokenizer_are_applied() -> Result<()> {
    let token = |content: &str, special: bool| json!({ "content": content, "special": special });
    let decoder = json!({ "added_tokens_decoder": {
        "257": token("<tool>", false), "256": token("<|im_start|>", true),
    } });
    let ids = json!({ "<tool>": 257, "<|im_start|>": 256 });
    let special = json!({ "additional_special_tokens": ["<|im_start|>"], "eos_token": { "content": "z" } });
    let folder = |files: &[(&str, &Value)]| -> Result<tempfile::TempDir> {
        let folder = Model::new()?.write()?;
        for (name, content) in files {
            fs::write(folder.path().join(name), content.to_string())?;
        }
        Ok(folder)
    };
    let load =
        |files: &[(&str, &Value)]| -> Result<Loaded> { Ok(pretrained::load(folder(files)?.path(), &CPU)?) };
    let text = "<|im_start|>hi<tool>";
    for files in [
        &[("tokenizer_config.json", &decoder)][..],
        &[("added_tokens.json", &ids), ("special_tokens_map.json", &special)],
        &[
            ("added_tokens.json", &ids),
            ("tokenizer_config.json", &decoder),
            ("special_tokens_map.json", &special),
        ],
    ] {
        let loaded = load(files)?;
        assert_eq!(encode(&loaded, text)?, [256, 104, 105, 257], "{files:?}");
        // Special tokens are not part of a decoded text.
        assert_eq!(loaded.tokenizer.decode(&[256, 104, 257])?, "h<tool>");
        assert_eq!(loaded.tokenizer.vocab_size(), 258);
    }
    // A special token of the vocabulary that has no id in the files.
    assert_eq!(load(&[("special_tokens_map.json", &special)])?.tokenizer.decode(&[104, 122, 105])?, "hi");
    // Ids that do not continue the vocabulary, or that contradict it, are left out.
    let gap = json!({ "added_tokens_decoder": { "300": token("<tool>", false), "5": token("z", true) } });
    let loaded = load(&[("tokenizer_config.json", &gap)])?;
    assert_eq!((encode(&loaded, "<tool>")?.len(), loaded.tokenizer.decode(&[122])?.as_str()), (6, "z"));
    // The tokens are saved with the tokenizer.
    let again = tempfile::tempdir()?;
    load(&[("added_tokens.json", &ids)])?.tokenizer.save(&again.path().join(TOKENIZER))?;
    let saved = gd_model::io::tokenizer::Tokenizer::load(&again.path().join(TOKENIZER))?;
    assert_eq!(saved.encode(text)?, [256, 104, 105, 257]);
    for (name, content, words) in [
        (
            "tokenizer_config.json",
            json!({ "added_tokens_decoder": { "x": token("a", true) } }),
            "added_tokens_decoder.x",
        ),
        (
            "tokenizer_config.json",
            json!({ "added_tokens_decoder": { "256": {} } }),
            "added_tokens_decoder.256",
        ),
        ("added_tokens.json", json!({ "<tool>": -1 }), "<tool>"),
        ("added_tokens.json", json!([]), "no table"),
    ] {
        check(&error(folder(&[(name, &content)])?.path())?, &[name, words])?;
    }
    Ok(())
}

#[test]
fn folders_of_other_kinds_say_what_they_are() -> Result<()> {
    let adapter = json!({ "peft_type": "LORA", "base_model_name_or_path": "org/base" }).to_string();
    let model = &[CONFIG, TOKENIZER][..];
    // The files that are copied from a model, files with a content, the file that is missing, and words of the error.
    type Case<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], &'a str, &'a [&'a str]);
    let cases: &[Case] = &[
        (&[], &[], WEIGHTS, &["the folder is empty"]),
        (model, &[], WEIGHTS, &["no weights", CONFIG, TOKENIZER]),
        (model, &[("pytorch_model.bin", "")], WEIGHTS, &["pytorch_model.bin is a pickle", "safetensors"]),
        (
            model,
            &[("pytorch_model-00001-of-00002.bin", ""), ("training_args.bin", "")],
            WEIGHTS,
            &["00002.bin is a pickle"],
        ),
        (
            &[],
            &[("consolidated.00.pth", ""), ("params.json", "{}")],
            WEIGHTS,
            &["consolidated.00.pth is a pickle"],
        ),
        (
            &[TOKENIZER],
            &[("adapter_config.json", &adapter), ("adapter_model.bin", "")],
            WEIGHTS,
            &["an adapter", "\"org/base\"", "merge_and_unload"],
        ),
        (&[], &[("adapter_model.bin", "")], WEIGHTS, &["an adapter", "its base model"]),
        (
            model,
            &[("model-00001-of-00002.safetensors", ""), ("model-00002-of-00002.safetensors", "")],
            WEIGHTS,
            &["2 shards", INDEX],
        ),
        (
            model,
            &[("model-00001-of-00001.safetensors", "")],
            WEIGHTS,
            &["is a shard", INDEX, "path of the shard"],
        ),
        (model, &[("weights.safetensors", "")], WEIGHTS, &["the weights are in weights.safetensors"]),
        (
            model,
            &[("a.safetensors", ""), ("b.safetensors", "")],
            WEIGHTS,
            &["several files", "a.safetensors, b.safetensors"],
        ),
        (model, &[("tf_model.h5", "")], WEIGHTS, &["tf_model.h5 is a format"]),
        (&[], &[("snapshots", "")], WEIGHTS, &["Hugging Face cache"]),
        (&[], &[("a.gguf", ""), ("b.gguf", "")], WEIGHTS, &["several GGUF files", "a.gguf, b.gguf"]),
        (&[WEIGHTS, TOKENIZER], &[], CONFIG, &["without the configuration"]),
        (&[WEIGHTS, TOKENIZER], &[("params.json", "{}")], CONFIG, &["params.json"]),
        (&[WEIGHTS, CONFIG], &[("tokenizer.model", "")], TOKENIZER, &["tokenizer.model", "save_pretrained"]),
        (
            &[WEIGHTS, CONFIG],
            &[("vocab.json", ""), ("merges.txt", "")],
            TOKENIZER,
            &["vocab.json and merges.txt"],
        ),
        (&[WEIGHTS, CONFIG], &[], TOKENIZER, &["no tokenizer"]),
    ];
    let whole = Model::new()?.write()?;
    for (copied, written, missing, words) in cases {
        let folder = tempfile::tempdir()?;
        for name in *copied {
            fs::copy(whole.path().join(name), folder.path().join(name))?;
        }
        for (name, content) in *written {
            fs::write(folder.path().join(name), content)?;
        }
        let text = error(folder.path())?;
        let start = format!("{}: no such file: ", folder.path().join(missing).display());
        ensure!(text.starts_with(&start), "{text}");
        check(&text, words)?;
    }
    // A model with an adapter beside it is a model, and a lone shard can be loaded by its path.
    let folder = Model::new()?.write()?;
    fs::write(folder.path().join("adapter_config.json"), &adapter)?;
    ensure!(distance(&logits(folder.path())?, &golden("mistral")?.1)? < 2e-5);
    let shard = folder.path().join("model-00001-of-00001.safetensors");
    fs::rename(folder.path().join(WEIGHTS), &shard)?;
    ensure!(distance(&logits(&shard)?, &golden("mistral")?.1)? < 2e-5);
    log_cases("folder-kinds", cases.len());
    Ok(())
}

#[test]
fn thresholds_by_length_are_saved_and_needed() -> Result<()> {
    let config = |by_length: bool| -> Result<ModelConfig> {
        let config = json!({
            "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "gd": { "mechanism": ["gd"], "select": {
                "threshold": 0.5, "threshold_by_length": by_length, "gate": { "energy": { "temperature": 0.7 } } } },
        });
        config::parse(config).map_err(|problems| anyhow::anyhow!("{problems:?}"))
    };
    let built = |config: &ModelConfig| -> Result<Loaded> {
        let params = Params::new(5, DType::F32, &CPU);
        let model = Transformer::new(config, params.frozen())?;
        // The output projections start at 0.
        let changed = |name: &str| name.contains(".gd.threshold") || name.ends_with("o_proj.weight");
        for (name, var) in params.vars().iter().filter(|(name, _)| changed(name)) {
            let noise: Vec<f32> = (0..var.elem_count()).map(|i| (i as f32 * 12.9898 + 0.5).sin()).collect();
            var.set(&(var.as_tensor() + Tensor::from_vec(noise, var.shape(), &CPU)?)?)
                .with_context(|| name.clone())?;
        }
        Ok(Loaded::new(model, params, Tokenizer::bytes()?))
    };
    let ids = Tensor::arange(3u32, 40, &CPU)?.unsqueeze(0)?;
    let logits = |loaded: &Loaded| -> Result<Vec<f32>> {
        let y = loaded.model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?;
        Ok(y.flatten_all()?.to_vec1()?)
    };
    let (with, without) = (built(&config(true)?)?, built(&config(false)?)?);
    ensure!(logits(&with)? != logits(&without)?);
    let root = tempfile::tempdir()?;
    let card: Vec<(&str, String)> =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"]
            .map(|key| (key, key.to_owned()))
            .into();
    for (name, loaded) in [("with", &with), ("without", &without)] {
        let folder = root.path().join(name);
        loaded.save(&folder, &card)?;
        ensure!(logits(&pretrained::load(&folder, &CPU)?)? == logits(loaded)?, "{name}");
        let slopes =
            load_tensors(&folder, &CPU)?.into_keys().filter(|name| name.ends_with(".threshold_slope"));
        ensure!(slopes.count() == if name == "with" { 2 } else { 0 });
    }
    // A checkpoint whose configuration asks for slopes must have them; one without the key has none.
    let path = root.path().join("without").join(CONFIG);
    let mut stored = load_json(&path)?;
    stored["gd"]["select"]["threshold_by_length"] = json!(true);
    fs::write(&path, stored.to_string())?;
    let error = pretrained::load(&root.path().join("without"), &CPU).err().context("loaded")?.to_string();
    ensure!(error.contains("threshold_slope"), "{error}");
    stored["gd"]["select"].as_object_mut().context("a table")?.remove("threshold_by_length");
    fs::write(&path, stored.to_string())?;
    ensure!(logits(&pretrained::load(&root.path().join("without"), &CPU)?)? == logits(&without)?);
    Ok(())
}
