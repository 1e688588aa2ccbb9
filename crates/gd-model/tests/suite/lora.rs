//! Adapters of low rank: those that `peft` made (scripts/golden/lora.py), gradients, and trainings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::config::{LoraConfig, Mechanism, ModelConfig, Recipe};
use gd_model::data::{Corpus, Tokens};
use gd_model::io::checkpoint::{self, load_tensors};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::adapter::{self, Adapter, targets};
use gd_model::model::params::Params;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::Trainer;
use gd_model::train::run::{About, Run};
use gd_testing::tensors::noise;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

fn logits(model: &Transformer, ids: &Tensor) -> Result<Tensor> {
    Ok(model.forward(ids, &Pass::new(&Mask::causal(0)), None)?.squeeze(0)?)
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    Ok((a - b)?.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar()?)
}

fn lora(r: usize, names: &[&str]) -> LoraConfig {
    let targets = names.iter().map(|name| (*name).to_owned()).collect();
    LoraConfig { base: "base".into(), r, alpha: 1.5 * r as f64, dropout: 0.0, targets }
}

#[test]
fn adapters_made_by_peft_give_its_logits_merged_and_beside_the_weights() -> Result<()> {
    for name in ["llama", "mistral"] {
        let (base, folder) = (fixture("llama").join(name), fixture("lora").join(name));
        let tensor = |path: &Path, name: &str| -> Result<Tensor> {
            load_tensors(path, &Device::Cpu)?.remove(name).with_context(|| name.to_owned())
        };
        let ids = tensor(&base.join("golden.safetensors"), "ids")?.to_dtype(DType::U32)?.unsqueeze(0)?;
        let expected = tensor(&folder.join("golden.safetensors"), "logits")?;
        let unadapted = logits(&pretrained::load(&base, &Device::Cpu)?.model, &ids)?;
        ensure!(distance(&unadapted, &expected)? > 0.1, "{name}: the adapter has no effect");
        let mut parts = pretrained::read(&base, &Device::Cpu)?;
        let stored = parts.tensors.clone();
        Adapter::read(&folder, &Device::Cpu)?.merge(&mut parts, None)?;
        let off = distance(&logits(&parts.build(&Device::Cpu)?.model, &ids)?, &expected)?;
        ensure!(off < 3e-5, "{name}, merged: off by {off}");
        if name == "mistral" {
            // One of its ranks differs from that of its settings, which `adapt` does not take.
            continue;
        }
        let config = pretrained::read(&base, &Device::Cpu)?.config;
        let params = Params::stored(stored, None, DType::F32, &Device::Cpu);
        let adapters = adapter::load_tensors(&folder, &Device::Cpu)?;
        let adapters = Params::stored(adapters, None, DType::F32, &Device::Cpu);
        let mut model = Transformer::new(&config, params.frozen())?;
        let all = targets(&lora(3, &["all-linear"]), &config)?.into_keys().collect();
        model.adapt(&all, 3, 2.0, &adapters.builder())?;
        ensure!(adapters.unused().is_empty() && adapters.vars().len() == 42, "{:?}", adapters.unused());
        let off = distance(&logits(&model, &ids)?, &expected)?;
        ensure!(off < 3e-5, "{name}, beside the weights: off by {off}");
    }
    Ok(())
}

/// Small models: a selecting one with all parts, and softmax attention with biases and without.
fn models() -> Result<Vec<(&'static str, ModelConfig)>> {
    let mut small = Recipe::load("tiny")?.model;
    (small.hidden_size, small.intermediate_size, small.num_hidden_layers) = (24, 40, 2);
    (small.num_attention_heads, small.num_key_value_heads, small.head_dim) = (4, 2, 8);
    (small.gd.output_gate, small.tie_word_embeddings, small.vocab_size) = (true, true, 40);
    let mut softmax = small.clone();
    softmax.gd.selecting_heads = Vec::new();
    (softmax.gd.mechanism, softmax.gd.beacon, softmax.gd.output_gate) =
        (vec![Mechanism::Softmax], None, false);
    let mut biased = softmax.clone();
    (biased.attention_bias, biased.mlp_bias, biased.gd.qk_norm) = (true, true, false);
    let mut other = softmax.clone();
    other.gd.mechanism = vec![Mechanism::named("sliding_window").context("a mechanism")?];
    Ok(vec![("gd", small), ("softmax", softmax), ("biased", biased), ("sliding window", other)])
}

/// The gradients of A and B follow from that of the sum of the weights: s Bᵀ dW and s dW Aᵀ.
#[test]
fn gradients_are_those_of_a_dense_training_and_frozen_weights_have_none() -> Result<()> {
    for (name, config) in models()? {
        let dense = Params::new(3, DType::F64, &Device::Cpu);
        let model = Transformer::new(&config, dense.builder())?;
        // No projection is 0, as those that add to the residual stream are at first.
        for (seed, (name, var)) in (10..).zip(dense.vars()) {
            if name.ends_with("_proj.weight") {
                var.set(&noise(seed, var.dims(), 0.4))?;
            }
        }
        for names in [&["q_proj", "v_proj"][..], &["all-linear"]] {
            let lora = lora(3, names);
            let base: BTreeMap<_, _> =
                dense.tensors().into_iter().map(|(name, t)| Ok((name, t.copy()?))).collect::<Result<_>>()?;
            let paths: BTreeSet<String> = targets(&lora, &config)?.into_keys().collect();
            let params = Params::stored(base.clone(), None, DType::F64, &Device::Cpu);
            let adapters = Params::new(5, DType::F64, &Device::Cpu);
            let mut adapted = Transformer::new(&config, params.frozen())?;
            adapted.adapt(&paths, lora.r, lora.scale(), &adapters.builder())?;
            for (seed, (_, var)) in (50..).zip(adapters.vars()) {
                var.set(&noise(seed, var.dims(), 0.4))?;
            }
            let matrices: BTreeMap<_, _> = adapters.vars().into_iter().collect();
            // The dense model has the sums of the weights.
            for (name, var) in dense.vars() {
                if let Some(path) = name.strip_suffix(".weight").filter(|path| paths.contains(*path)) {
                    let [a, b] =
                        ["A", "B"].map(|m| matrices[&format!("{path}.lora_{m}.weight")].as_detached_tensor());
                    var.set(&(&base[&name] + (b.matmul(&a)? * lora.scale())?)?)?;
                }
            }
            let ids: Vec<u32> = (0..2 * 40).map(|i| i * 7 % 40).collect();
            let ids = Tensor::from_vec(ids, (2, 40), &Device::Cpu)?;
            let loss = |model: &Transformer| -> Result<Tensor> {
                let mask = Mask::causal(0);
                Ok(model.loss(&ids.narrow(1, 0, 39)?, &ids.narrow(1, 1, 39)?, &Pass::new(&mask))?)
            };
            let (expected, found) = (loss(&model)?, loss(&adapted)?);
            let off = distance(&expected, &found)?;
            ensure!(off < 1e-9, "{name} {names:?}: the loss is off by {off}");
            let (expected, found) = (expected.backward()?, found.backward()?);
            let weights = dense.vars();
            for path in &paths {
                let (_, weight) =
                    weights.iter().find(|(name, _)| *name == format!("{path}.weight")).context("a weight")?;
                let dw = expected.get(weight).context("a dense gradient")?;
                let [a, b] = ["A", "B"].map(|m| &matrices[&format!("{path}.lora_{m}.weight")]);
                let of =
                    |matrix| found.get(matrix).with_context(|| format!("{name}: {path} has no gradient"));
                let (da, db) = (of(a)?, of(b)?);
                let largest = da.abs()?.max_all()?.to_scalar::<f64>()?;
                ensure!(largest > 1e-8, "{name}: the gradient of {path} is 0");
                for (found, expected) in [
                    (da, (b.as_detached_tensor().t()?.matmul(dw)? * lora.scale())?),
                    (db, (dw.matmul(&a.as_detached_tensor().t()?)? * lora.scale())?),
                ] {
                    let off = distance(found, &expected)?;
                    ensure!(off < 1e-9, "{name} {names:?}, {path}: off by {off}");
                }
            }
            // Nothing of the size of a projection of the base is stored.
            for (frozen_name, var) in params.vars() {
                ensure!(found.get(&var).is_none(), "{name}: {frozen_name} has a gradient");
            }
            for (name, after) in params.tensors() {
                ensure!(distance(&after, &base[&name])? == 0.0, "{name} changed");
            }
        }
    }
    Ok(())
}

/// A base of the preset `tiny` without its training, and a corpus.
fn base(folder: &Path) -> Result<(Recipe, Corpus)> {
    let mut recipe = Recipe::load("tiny")?;
    (recipe.model.hidden_size, recipe.model.intermediate_size, recipe.model.num_hidden_layers) = (32, 48, 2);
    (recipe.model.num_attention_heads, recipe.model.num_key_value_heads, recipe.model.head_dim) = (4, 2, 8);
    (recipe.train.steps, recipe.train.batch, recipe.train.context) = (4, 2, 32);
    recipe.train.lr.warmup = 0;
    let params = Params::new(1, DType::F32, &Device::Cpu);
    let model = Transformer::new(&recipe.model, params.builder())?;
    let card: Vec<(&str, String)> =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"]
            .map(|key| (key, key.to_owned()))
            .into();
    pretrained::Loaded::new(model, params, Tokenizer::bytes()?).save(folder, &card)?;
    let tokens = Tokens::from((0..2000u32).map(|i| i * i % 251).collect::<Vec<_>>());
    Ok((recipe, Corpus { train: tokens.clone(), valid: tokens, train_bytes: 2000, valid_bytes: 2000 }))
}

#[test]
fn a_trained_adapter_computes_the_same_when_it_is_merged() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut recipe, corpus) = base(&dir.path().join("base"))?;
    recipe.train.lora = Some(LoraConfig { dropout: 0.3, ..lora(4, &["all-linear"]) });
    let read = || pretrained::read(&dir.path().join("base"), &Device::Cpu);
    let mut losses = Vec::new();
    for checkpoint_blocks in [false, true] {
        recipe.train.checkpoint_blocks = checkpoint_blocks;
        let trainer = Trainer::finetune(recipe.clone(), corpus.clone(), 2, read()?, &Device::Cpu)?;
        let copies = |(name, t): (String, Tensor)| Ok((name, t.copy()?));
        let before: BTreeMap<_, _> =
            trainer.params.tensors().into_iter().map(copies).collect::<Result<_>>()?;
        let about = About { name: "adapter".into(), data: Vec::new(), from: None, seed: 2 };
        let out = dir.path().join(format!("adapter-{checkpoint_blocks}"));
        let mut run = Run::create(&out, trainer, Tokenizer::bytes()?, about)?;
        run.train(None, &AtomicBool::new(false), |step, _| {
            losses.push(step.loss);
            Ok(())
        })?;
        let trainer = &run.trainer;
        for (name, after) in trainer.params.tensors() {
            ensure!(distance(&after, &before[&name])? > 0.0, "{name} was not trained");
            let is_zero = distance(&before[&name], &before[&name].zeros_like()?)? == 0.0;
            ensure!(name.contains(".lora_B.") == is_zero, "{name}");
        }
        let out = out.join("checkpoint-4");
        let mut parts: Parts = read()?;
        Adapter::read(&out, &Device::Cpu)?.merge(&mut parts, None)?;
        let ids = Tensor::arange(0u32, 60, &Device::Cpu)?.unsqueeze(0)?;
        let merged = logits(&parts.build(&Device::Cpu)?.model, &ids)?;
        let off = distance(&merged, &logits(&trainer.model, &ids)?)?;
        ensure!(off < 2e-5, "off by {off}");
        // Another base.
        let mut other = read()?;
        let name = "model.norm.weight".to_owned();
        let changed = (&other.tensors[&name] * 1.5)?;
        other.tensors.insert(name, changed);
        let error = Adapter::read(&out, &Device::Cpu)?.merge(&mut other, None).unwrap_err().to_string();
        ensure!(error.contains("trained on another model"), "{error}");
    }
    let (stored, recomputed) = losses.split_at(losses.len() / 2);
    ensure!(stored == recomputed && stored.len() == 4, "{losses:?}");
    Ok(())
}

#[test]
fn dropout_is_that_of_the_training_alone_and_differs_by_step_and_seed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (mut recipe, mut corpus) = base(&dir.path().join("base"))?;
    // Every window is the same text, and nothing is learned, so that losses differ by dropout alone.
    corpus.train = Tokens::from(vec![7u32; 2000]);
    recipe.train.lr.peak = 1e-30;
    (recipe.train.batch, recipe.train.accumulation) = (1, 1);
    let losses = |dropout: f64, seed: u64| -> Result<Vec<f64>> {
        let mut recipe = recipe.clone();
        recipe.train.lora = Some(LoraConfig { dropout, ..lora(4, &["all-linear"]) });
        let parts = pretrained::read(&dir.path().join("base"), &Device::Cpu)?;
        let mut trainer = Trainer::finetune(recipe, corpus.clone(), seed, parts, &Device::Cpu)?;
        // B is 0 at first, and the adapter without effect.
        for (name, var) in trainer.params.vars() {
            let values =
                (0..var.elem_count()).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.05).collect::<Vec<_>>();
            let value = if name.contains("lora_B") {
                Tensor::from_vec(values, var.dims(), &Device::Cpu)?
            } else {
                continue;
            };
            var.set(&value)?;
        }
        let before = trainer.evaluate()?.loss;
        let losses = (0..3).map(|_| Ok(trainer.train_step()?.loss)).collect::<Result<_>>()?;
        ensure!(trainer.evaluate()?.loss == before, "dropout in an evaluation");
        Ok(losses)
    };
    let distinct = |losses: &[f64]| losses.iter().map(|loss| loss.to_bits()).collect::<BTreeSet<_>>().len();
    let (without, with) = (losses(0.0, 2)?, losses(0.3, 2)?);
    ensure!(distinct(&with) == 3 && with.iter().all(|loss| !without.contains(loss)), "{without:?} {with:?}");
    ensure!(with == losses(0.3, 2)?, "not repeated");
    Ok(())
}

#[test]
fn settings_that_do_not_fit_are_refused() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (recipe, corpus) = base(&dir.path().join("base"))?;
    let read = || pretrained::read(&dir.path().join("base"), &Device::Cpu);
    let with = |lora: LoraConfig| {
        let mut recipe = recipe.clone();
        recipe.train.lora = Some(lora);
        recipe
    };
    let error =
        Trainer::finetune(with(lora(2, &["q_proj", "x_proj"])), corpus.clone(), 0, read()?, &Device::Cpu);
    let error = error.err().context("an error")?.to_string();
    ensure!(error.contains("\"x_proj\"") && error.contains("allowed are down_proj, gate_proj"), "{error}");
    ensure!(error.contains("v_proj, all-linear"), "{error}");
    let dropout = LoraConfig { dropout: 1.0, ..lora(2, &["q_proj"]) };
    for (lora, name) in [
        (lora(0, &["q_proj"]), "train.lora.r"),
        (lora(2, &[]), "train.lora.targets"),
        (dropout, "train.lora.dropout"),
    ] {
        let error = with(lora).train.validate().unwrap_err().to_string();
        ensure!(error.contains(name), "{error}");
    }
    let mut both = with(lora(2, &["q_proj"]));
    both.train.muon = Some(Default::default());
    let error = both.train.validate().unwrap_err().to_string();
    ensure!(error.contains("train.muon cannot be combined with train.lora"), "{error}");
    // Adapters of other kinds.
    let copy = dir.path().join("adapter");
    std::fs::create_dir(&copy)?;
    let source = fixture("lora/llama");
    std::fs::copy(source.join("adapter_model.safetensors"), copy.join("adapter_model.safetensors"))?;
    let settings: serde_json::Value = checkpoint::load_json(&source.join("adapter_config.json"))?;
    for (key, value) in [
        ("peft_type", serde_json::json!("IA3")),
        ("use_dora", true.into()),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("bias", "all".into()),
        ("alpha_pattern", serde_json::json!({ "q_proj": 3 })),
        ("lora_alpha", "x".into()),
    ] {
        let mut settings = settings.clone();
        settings[key] = value;
        std::fs::write(copy.join("adapter_config.json"), settings.to_string())?;
        let error = Adapter::read(&copy, &Device::Cpu).unwrap_err().to_string();
        ensure!(error.contains(key), "{key}: {error}");
    }
    Ok(())
}
