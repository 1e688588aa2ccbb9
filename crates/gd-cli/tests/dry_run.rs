//! `gd train --dry-run` predicts the exact number of parameters and the peak memory within 15 %, of adapters within
//! 10 %, for mechanisms that are compositions of operations within 30 %, and writes nothing.

use std::path::Path;
use std::process::Command;

use candle_core::{DType, Device};
use gd_model::config::{LoraConfig, Mechanism, ModelConfig, Recipe};
use gd_model::data::{Corpus, Tokens};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::Parts;
use gd_model::train::Trainer;
use gd_model::train::estimate::estimate;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The number of parameters, and the allocator's peak during two steps in MiB, minus the memory in use before.
fn measured(mut recipe: Recipe) -> (usize, f64) {
    recipe.train.eval_every = u64::MAX;
    let tokens: Vec<u32> = (0..4000).map(|i| i * 31 % 256).collect();
    let n = tokens.len();
    let tokens = Tokens::from(tokens);
    let corpus = Corpus { train: tokens.clone(), valid: tokens, train_bytes: n, valid_bytes: n };
    let source = recipe.train.lora.is_some().then(|| base(&recipe.model));
    let before = ALLOCATOR.current_usage() - source.as_ref().map_or(0, |(_, bytes)| *bytes);
    let mut trainer = match source {
        Some((parts, _)) => Trainer::finetune(recipe, corpus, 3, parts, &Device::Cpu),
        None => Trainer::new(recipe, corpus, 3, &Device::Cpu),
    }
    .unwrap();
    ALLOCATOR.reset_peak_usage();
    for _ in 0..2 {
        trainer.train_step().unwrap();
    }
    (trainer.parameter_count(), (ALLOCATOR.peak_usage() - before) as f64 / f64::from(1 << 20))
}

/// A model with random weights, and their size in bytes.
fn base(config: &ModelConfig) -> (Parts, usize) {
    let before = ALLOCATOR.current_usage();
    let params = Params::new(1, DType::F32, &Device::Cpu);
    Transformer::new(config, params.frozen()).unwrap();
    let tokenizer = Tokenizer::bytes().unwrap();
    let parts =
        Parts::new(Path::new("base"), config.to_json().unwrap(), params.tensors(), tokenizer).unwrap();
    drop(params);
    (parts, ALLOCATOR.current_usage() - before)
}

/// Compares prediction and measurement with and without recomputed blocks, for a mechanism in all layers. Adds predictions
/// that are off by more than `tolerance` to `faults`.
fn check(recipe: &Recipe, mechanism: &Mechanism, tolerance: f64, faults: &mut Vec<String>) {
    let mut mib = Vec::new();
    for checkpoint_blocks in [false, true] {
        let mut recipe = recipe.clone();
        let context = recipe.train.context;
        recipe.model.gd.mechanism = vec![mechanism.clone()];
        let lora = recipe.train.lora.as_ref().map(|lora| lora.targets.join(","));
        recipe.model.max_position_embeddings = recipe.model.max_position_embeddings.max(context);
        (recipe.train.accumulation, recipe.train.checkpoint_blocks) = (1, checkpoint_blocks);
        let (estimate, batch) = (estimate(&recipe).unwrap(), recipe.train.batch);
        let (parameters, peak) = measured(recipe);
        assert_eq!(estimate.parameters, parameters, "{mechanism:?}");
        let error = estimate.peak_memory_mib / peak - 1.0;
        let what = format!(
            "{mechanism:?} {batch}x{context}, adapter of {lora:?}, recomputed {checkpoint_blocks}: {:.1} MiB, measured \
             {peak:.1} ({:+.1} %)",
            estimate.peak_memory_mib,
            100.0 * error
        );
        println!("{what}");
        if error.is_nan() || error.abs() > tolerance {
            faults.push(what);
        }
        mib.push(peak);
    }
    assert!(mib[1] < mib[0], "recomputed blocks need {} MiB instead of {}", mib[1], mib[0]);
}

/// This is one test because the allocator counts the memory of the whole process.
#[test]
fn the_predicted_memory_matches_the_allocator() {
    let mut faults = Vec::new();
    for (preset, contexts, batch) in [("tiny", &[128, 256, 512][..], 4), ("small", &[256][..], 1)] {
        for mechanism in [Mechanism::Gd, Mechanism::Softmax] {
            for &context in contexts {
                let mut recipe = Recipe::load(preset).unwrap();
                (recipe.train.batch, recipe.train.context) = (batch, context);
                check(&recipe, &mechanism, 0.15, &mut faults);
            }
        }
    }
    for (targets, mechanism) in
        [(&["q_proj", "v_proj"][..], Mechanism::Gd), (&["all-linear"], Mechanism::Softmax)]
    {
        let mut recipe = Recipe::load("small").unwrap();
        (recipe.train.batch, recipe.train.context) = (1, 256);
        let targets = targets.iter().map(|name| (*name).to_owned()).collect();
        recipe.train.lora =
            Some(LoraConfig { base: "base".into(), r: 16, alpha: 32.0, dropout: 0.1, targets });
        check(&recipe, &mechanism, 0.1, &mut faults);
    }
    // Compositions of operations, in blocks of queries or with matrices of all queries by all keys.
    for (name, context, batch) in [
        ("sparsemax", 256, 2),
        ("sigmoid", 512, 1),
        ("differential", 256, 2),
        ("sliding_window", 256, 2),
        ("nsa", 512, 1),
        ("linear", 512, 1),
        ("selective", 256, 2),
        ("softmax-null", 256, 2),
    ] {
        let mut recipe = Recipe::load("tiny").unwrap();
        (recipe.model.gd.beacon, recipe.model.gd.selecting_heads) = (None, Vec::new());
        (recipe.train.batch, recipe.train.context) = (batch, context);
        check(&recipe, &Mechanism::named(name).unwrap(), 0.3, &mut faults);
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn the_command_prints_the_plan_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gd"))
        .args(["train", "--dry-run", "--json", "--steps", "7", "--out", "run"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((plan["steps"].as_u64(), plan["tokens_per_step"].as_u64()), (Some(7), Some(1024)));
    assert_eq!(plan["parameters"], 913_872);
    assert!(plan["peak_memory_mib"].as_f64().unwrap() > 10.0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
