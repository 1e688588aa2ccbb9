//! Checkpoints of other model families: logits, saving, and unsupported configurations.
//!
//! The fixtures are created by scripts/golden/llama.py; their logits are those of transformers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::config::{Mechanism, ModelConfig};
use gd_model::io::checkpoint::{CONFIG, load_json, load_tensors};
use gd_model::model::Transformer;
use gd_model::model::pretrained::{self, Loaded};
use serde_json::{Value, json};

const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family)
}

/// The token ids `[1, N]` of a fixture and their logits `[N, V]`.
fn golden(family: &str) -> Result<(Tensor, Tensor)> {
    let tensors = load_tensors(&fixture(family).join("golden.safetensors"), &Device::Cpu)?;
    let tensor = |name: &str| tensors.get(name).with_context(|| format!("{family}: {name}"));
    Ok((tensor("ids")?.to_dtype(DType::U32)?.unsqueeze(0)?, tensor("logits")?.clone()))
}

/// The logits `[N, V]` of ids `[1, N]`, processed with a cache in chunks of the given lengths.
fn in_chunks(model: &Transformer, ids: &Tensor, lengths: impl Iterator<Item = usize>) -> Result<Tensor> {
    let (mut cache, mut at, mut out) = (model.new_cache(), 0, Vec::new());
    for n in lengths {
        let mask = Mask::causal(at as i64);
        out.push(model.forward(&ids.narrow(1, at, n)?, &Pass::new(&mask), Some(&mut cache))?);
        at += n;
    }
    Ok(Tensor::cat(&out, 1)?.squeeze(0)?)
}

fn whole(model: &Transformer, ids: &Tensor) -> Result<Tensor> {
    Ok(model.forward(ids, &Pass::new(&Mask::causal(0)), None)?.squeeze(0)?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

#[test]
fn logits_are_those_of_transformers() -> Result<()> {
    for family in FAMILIES {
        let (ids, expected) = golden(family)?;
        let model = pretrained::load(&fixture(family), &Device::Cpu)?.model;
        let (n, longest) = (ids.dim(1)?, (0..3).filter_map(|i| model.config().window(i)).max());
        assert!(
            longest.is_none_or(|w| n > 3 * w),
            "{family}: {n} tokens are no test of a window of {longest:?}"
        );
        for (way, logits) in [
            ("whole", whole(&model, &ids)?),
            ("token by token", in_chunks(&model, &ids, std::iter::repeat_n(1, n))?),
            ("in two chunks", in_chunks(&model, &ids, [n - 20, 20].into_iter())?),
        ] {
            let off = distance(&logits, &expected)?;
            println!("{family}, {way}: off by {off:e}");
            assert!(off < 2e-5, "{family}, {way}: off by {off}");
        }
    }
    Ok(())
}

/// Every part of a configuration has an effect on the logits, so that the comparison above covers it.
#[test]
fn every_part_of_a_config_changes_the_logits() -> Result<()> {
    /// A family, a part of its configuration, and a function that removes this part.
    type Part = (&'static str, &'static str, fn(&mut ModelConfig));
    let parts: [Part; 9] = [
        ("llama", "scaled frequencies", |c| c.rope_parameters = None),
        ("llama", "biases of q, k, v", |c| c.attention_bias = false),
        ("llama", "bias of o", |c| c.gd.output_bias = false),
        ("llama", "biases of the feed-forward block", |c| c.mlp_bias = false),
        ("mistral", "scaled frequencies", |c| c.rope_parameters = None),
        ("mistral", "windows", |c| c.gd.windows.clear()),
        ("qwen2", "window of one layer", |c| c.gd.windows.clear()),
        ("qwen2", "biases of q, k, v", |c| c.attention_bias = false),
        ("qwen3", "norms of q and k", |c| c.gd.qk_norm = false),
    ];
    for (family, part, leave_out) in parts {
        let (ids, expected) = golden(family)?;
        let mut parts = pretrained::read(&fixture(family), &Device::Cpu)?;
        leave_out(&mut parts.config);
        let off = distance(&whole(&parts.build(&Device::Cpu)?.model, &ids)?, &expected)?;
        assert!(off > 0.05, "{family} without {part}: off by {off}");
    }
    Ok(())
}

#[test]
fn a_model_can_be_built_from_a_var_builder() -> Result<()> {
    let (ids, expected) = golden("llama")?;
    let tensors = load_tensors(&fixture("llama"), &Device::Cpu)?.into_iter().collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let config =
        ModelConfig::from_json(load_json(&fixture("llama").join(CONFIG))?).map_err(|p| anyhow!("{p:?}"))?;
    let model = Transformer::new(&config, vb)?;
    assert!(distance(&whole(&model, &ids)?, &expected)? < 2e-5);
    Ok(())
}

#[test]
fn packed_documents_are_independent_with_windows() -> Result<()> {
    for family in ["mistral", "qwen2"] {
        let (ids, _) = golden(family)?;
        let model = pretrained::load(&fixture(family), &Device::Cpu)?.model;
        let (n, cut) = (ids.dim(1)?, 19);
        let mask = Mask::causal(0).packed(vec![vec![0, cut, n]]);
        let packed = model.forward(&ids, &Pass::new(&mask), None)?.squeeze(0)?;
        let alone = [whole(&model, &ids.narrow(1, 0, cut)?)?, whole(&model, &ids.narrow(1, cut, n - cut)?)?];
        let off = distance(&packed, &Tensor::cat(&alone, 0)?)?;
        assert!(off < 2e-5, "{family}: off by {off}");
        assert!(distance(&packed, &whole(&model, &ids)?)? > 0.1, "{family}: the boundary has no effect");
    }
    Ok(())
}

/// The content of a tensor in its file.
#[derive(PartialEq)]
struct Stored {
    dtype: DType,
    dims: Vec<usize>,
    bytes: Vec<u8>,
}

fn stored(folder: &Path) -> Result<BTreeMap<String, Stored>> {
    let of = |t: &Tensor| Stored {
        dtype: t.dtype(),
        dims: t.dims().to_vec(),
        bytes: safetensors::tensor::View::data(&t).into_owned(),
    };
    Ok(load_tensors(folder, &Device::Cpu)?.iter().map(|(name, t)| (name.clone(), of(t))).collect())
}

fn card() -> Vec<(&'static str, String)> {
    let keys =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    keys.map(|key| (key, "test".to_owned())).to_vec()
}

#[test]
fn a_loaded_model_is_saved_unchanged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut types = Vec::new();
    for family in FAMILIES {
        let (from, to) = (fixture(family), dir.path().join(family));
        pretrained::load(&from, &Device::Cpu)?.save(&to, &card())?;
        let before = stored(&from)?;
        assert!(before == stored(&to)?, "{family}");
        types.extend(before.values().map(|tensor| tensor.dtype));
        assert_eq!(load_json(&from.join(CONFIG))?, load_json(&to.join(CONFIG))?);
        let generation = "generation_config.json";
        assert_eq!(load_json(&from.join(generation))?, load_json(&to.join(generation))?);
        assert!(!to.join("modeling_gd.py").exists(), "{family} is a family of transformers");
        let (ids, expected) = golden(family)?;
        assert!(distance(&whole(&pretrained::load(&to, &Device::Cpu)?.model, &ids)?, &expected)? < 2e-5);
    }
    assert!([DType::F32, DType::F16, DType::BF16].iter().all(|t| types.contains(t)), "{types:?}");
    Ok(())
}

#[test]
fn a_changed_model_is_saved_in_the_format_of_this_project() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut parts = pretrained::read(&fixture("mistral"), &Device::Cpu)?;
    parts.files.insert("tokenizer_config.json".into(), b"{}".to_vec());
    parts.config.gd.windows = vec![Some(5)];
    parts.build(&Device::Cpu)?.save(dir.path(), &card())?;
    let json = load_json(&dir.path().join(CONFIG))?;
    assert_eq!((&json["model_type"], &json["gd"]["windows"]), (&json!("gd"), &json!([5])));
    assert_eq!(json["auto_map"]["AutoModelForCausalLM"], "modeling_gd.GdForCausalLM");
    for file in ["modeling_gd.py", "configuration_gd.py", "tokenizer_config.json"] {
        assert!(dir.path().join(file).exists(), "{file}");
    }
    let Loaded { model, files, .. } = pretrained::load(dir.path(), &Device::Cpu)?;
    assert_eq!((model.config().window(1), files.len()), (Some(5), 1));
    Ok(())
}

/// The configuration of a family with some keys changed, or removed if the value is null.
fn changed(family: &str, changes: Value) -> Value {
    let mut config = load_json(&fixture(family).join(CONFIG)).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            _ => config[key] = value.clone(),
        }
    }
    config
}

fn read(family: &str, changes: Value) -> ModelConfig {
    ModelConfig::from_json(changed(family, changes)).unwrap()
}

#[test]
fn missing_keys_have_the_defaults_of_their_family() {
    let left_out = json!({
        "num_key_value_heads": null, "head_dim": null, "rope_theta": null, "rope_scaling": null,
        "rope_parameters": null, "rms_norm_eps": null, "tie_word_embeddings": null, "hidden_act": null,
        "torch_dtype": null, "dtype": null, "max_position_embeddings": null, "attention_bias": null,
        "sliding_window": null, "architectures": null, "num_attention_heads": null,
    });
    let with = |family, heads: usize| {
        let mut changes = left_out.clone();
        changes["num_attention_heads"] = json!(heads);
        read(family, changes)
    };
    let llama = with("llama", 4);
    assert_eq!((llama.num_key_value_heads, llama.head_dim, llama.theta()), (4, 8, 10_000.0));
    assert_eq!(
        (llama.rms_norm_eps, llama.tie_word_embeddings, llama.dtype.as_str()),
        (1e-6, false, "float32")
    );
    assert_eq!((llama.max_position_embeddings, llama.attention_bias), (2048, false));
    let mistral = with("mistral", 16);
    assert_eq!((mistral.num_key_value_heads, mistral.head_dim, mistral.window(1)), (8, 2, Some(4096)));
    assert_eq!((mistral.max_position_embeddings, mistral.attention_bias), (131_072, false));
    let qwen2 = with("qwen2", 32);
    assert_eq!((qwen2.num_key_value_heads, qwen2.window(0), qwen2.window(1)), (32, None, Some(4096)));
    assert_eq!((qwen2.attention_bias, qwen2.gd.output_bias, qwen2.gd.qk_norm), (true, false, false));
    let qwen3 = with("qwen3", 32);
    assert_eq!((qwen3.head_dim, qwen3.gd.qk_norm, qwen3.attention_bias), (128, true, false));
    assert_eq!(qwen3.gd.mechanism, [Mechanism::Softmax]);
}

#[test]
fn a_config_that_transformers_saved_again_is_read() {
    let ours = serde_json::to_value(read("llama", json!({}))).unwrap();
    let mut saved = ours.clone();
    let added = json!({
        "transformers_version": "5.23.0", "use_cache": false, "_name_or_path": "m", "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": null, "torch_dtype": "float16",
    });
    saved.as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
    let dtype = saved.as_object_mut().unwrap().remove("dtype");
    let (ours, mut again) =
        (ModelConfig::from_json(ours).unwrap(), ModelConfig::from_json(saved.clone()).unwrap());
    assert_eq!(again.dtype, "float16");
    again.dtype.clone_from(&ours.dtype);
    assert_eq!(again, ours);
    saved["dtype"] = dtype.unwrap();
    assert_eq!(ModelConfig::from_json(saved.clone()).unwrap(), ours);
    // Other keys are refused.
    saved["partial_rotary_factor"] = json!(0.5);
    let problems = ModelConfig::from_json(saved).unwrap_err();
    assert!(problems[0].to_string().contains("partial_rotary_factor"), "{problems:?}");
}

#[test]
fn keys_have_the_meaning_and_precedence_of_transformers() {
    assert_eq!(read("mistral", json!({ "dtype": "bfloat16", "torch_dtype": "float16" })).dtype, "bfloat16");
    let mut none = changed("mistral", json!({}));
    none["sliding_window"] = Value::Null;
    assert_eq!(ModelConfig::from_json(none).unwrap().window(0), None);
    // sliding_window has no effect without use_sliding_window. With it, the layers from max_window_layers on have a window.
    let qwen = json!({ "use_sliding_window": false, "layer_types": null });
    assert_eq!(read("qwen2", qwen).gd.windows, []);
    let kinds = json!({ "layer_types": ["sliding_attention", "full_attention"] });
    assert_eq!(read("qwen2", kinds).gd.windows, [Some(12), None]);
    assert_eq!(read("qwen2", json!({ "layer_types": null })).gd.windows, [None, Some(12)]);
    let bias = read("qwen3", json!({ "attention_bias": true }));
    assert_eq!((bias.attention_bias, bias.gd.output_bias), (true, true));
    // rope_scaling takes precedence over rope_parameters, and the rope_theta in it over the key rope_theta.
    let both = json!({
        "rope_scaling": { "type": "linear", "factor": 4, "rope_theta": 500 }, "rope_theta": 7,
        "rope_parameters": { "rope_type": "default", "rope_theta": 9 },
    });
    let rope = read("mistral", both).rope_parameters.unwrap();
    assert_eq!((rope.rope_type.as_str(), rope.factor, rope.rope_theta), ("linear", Some(4.0), 500.0));
    let scaling = json!({ "rope_type": "llama3", "type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4 });
    let rope = read("llama", json!({ "rope_scaling": scaling })).rope_parameters.unwrap();
    assert_eq!((rope.unscaled_context, rope.rope_theta), (Some(128), 200.0));
}

#[test]
fn keys_without_effect_change_nothing() {
    let with = |changes: Value| {
        let mut config = changed("mistral", json!({}));
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let mut config = ModelConfig::from_json(config).unwrap();
        config.origin = None;
        config
    };
    let plain = with(json!({}));
    for same in [
        json!({ "pretraining_tp": 2 }),
        json!({ "architectures": ["MISTRALForCausalLM"] }),
        json!({ "architectures": ["MistralModel"] }),
        json!({ "architectures": null }),
        json!({ "model_type": "Mistral" }),
        json!({ "_name_or_path": "a/b", "transformers_version": "4.28.0", "use_cache": true, "id2label": { "0": "x" } }),
        json!({ "attention_dropout": 0.1, "rope_interleaved": false, "transformers.js_config": {} }),
        json!({ "eos_token_id": -1, "bos_token_id": null, "pad_token_id": [1, 2] }),
        json!({ "rope_scaling": null, "quantization_config": null, "layer_types": null }),
        json!({ "tie_word_embeddings": null, "attention_bias": null, "mlp_bias": null, "hidden_act": null }),
        json!({ "use_sliding_window": null, "max_window_layers": null, "partial_rotary_factor": null }),
        json!({ "hidden_act": "swish" }),
    ] {
        assert_eq!(with(same.clone()), plain, "{same}");
    }
    let linear = |more: Value| {
        let mut scaling = json!({ "rope_type": "linear", "factor": 4.0, "rope_theta": 500.0 });
        scaling.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        with(json!({ "rope_scaling": scaling, "rope_parameters": null }))
    };
    let plain = linear(json!({}));
    for same in [
        json!({ "finetuned": true }),
        json!({ "original_max_position_embeddings": 64, "low_freq_factor": 1.0 }),
        json!({ "beta_fast": 32, "mscale": null, "attention_factor": null, "long_factor": [1.0, 2.0] }),
        json!({ "type": "linear" }),
    ] {
        assert_eq!(linear(same.clone()), plain, "{same}");
    }
}

#[test]
fn unsupported_configs_are_refused_with_their_value() {
    let scaled = |kind: &str| json!({ "rope_scaling": { "type": kind, "factor": 4.0, "beta_fast": 32 } });
    let cases = [
        (
            "llama",
            json!({ "model_type": "gemma" }),
            vec!["model_type \"gemma\"", "llama, mistral, qwen2, qwen3"],
        ),
        ("llama", json!({ "model_type": null }), vec!["neither a gd block nor a model_type"]),
        (
            "llama",
            json!({ "architectures": ["LlamaForSequenceClassification"] }),
            vec!["SequenceClassification"],
        ),
        ("llama", json!({ "hidden_act": "gelu" }), vec!["hidden_act must be silu, not \"gelu\""]),
        ("llama", json!({ "quantization_config": { "bits": 4 } }), vec!["quantization_config", "\"bits\":4"]),
        ("llama", json!({ "partial_rotary_factor": 0.5 }), vec!["partial_rotary_factor 0.5"]),
        ("llama", json!({ "hidden_size": null }), vec!["hidden_size is missing"]),
        ("llama", json!({ "hidden_size": "wide" }), vec!["hidden_size: invalid type"]),
        ("llama", json!({ "num_attention_heads": 0 }), vec!["num_attention_heads must be at least 1, not 0"]),
        ("llama", scaled("yarn"), vec!["rope_scaling", "\"yarn\""]),
        ("llama", scaled("dynamic"), vec!["\"dynamic\""]),
        ("llama", scaled("longrope"), vec!["\"longrope\""]),
        ("llama", json!({ "rope_scaling": { "type": "linear" } }), vec!["rope_scaling", "without factor"]),
        (
            "llama",
            json!({ "rope_scaling": { "type": "llama3", "factor": 8, "high_freq_factor": 4 } }),
            vec!["without low_freq_factor"],
        ),
        ("qwen2", json!({ "layer_types": ["full_attention"] }), vec!["1 layer_types for 2 layers"]),
        (
            "qwen2",
            json!({ "layer_types": ["full_attention", "chunked_attention"] }),
            vec!["chunked_attention"],
        ),
        ("qwen2", json!({ "use_sliding_window": false }), vec!["sliding_attention", "no sliding_window"]),
        (
            "qwen3",
            json!({ "rope_parameters": { "full_attention": { "rope_theta": 1 } } }),
            vec!["rope_parameters", "full_attention"],
        ),
    ];
    for (family, changes, words) in cases {
        let config = ModelConfig::from_json(changed(family, changes.clone()));
        let error = match config.map(|c| c.validate()) {
            Ok(Ok(())) => panic!("{changes} was accepted"),
            Ok(Err(e)) => e.to_string(),
            Err(problems) => problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
        };
        for word in words {
            assert!(error.contains(word), "{changes}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}
