//! Presets, configuration files and settings, and their errors.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use gd_model::config::LrShape;
use gd_model::config::{Mechanism, PRESETS, Recipe, Setting, TokenizerChoice};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::shapes::{count, shapes};

const SMALL: &str = include_str!("../fixtures/small.json");

/// The error of the small configuration with these settings, without the file's name.
fn refused(settings: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.json");
    fs::write(&path, SMALL).unwrap();
    let name = path.to_str().unwrap();
    let settings: Vec<Setting> = settings.iter().map(|s| s.parse().unwrap()).collect();
    let error = Recipe::load_with(name, &settings).unwrap_err().to_string();
    assert!(!error.contains('\n'), "{error}");
    error.strip_prefix(name).map_or(error.clone(), |rest| rest.trim_start_matches(": ").to_owned())
}

fn write(dir: &Path, name: &str, text: &str) -> String {
    fs::write(dir.join(name), text).unwrap();
    dir.join(name).to_str().unwrap().to_owned()
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_key() {
    let cases = [
        ("train.lr.peek=1", "unknown key train.lr.peek; did you mean train.lr.peak?"),
        ("model.hidden_sizes=1", "unknown key model.hidden_sizes; did you mean model.hidden_size?"),
        ("trane.steps=1", "unknown key trane; did you mean train?"),
        ("model.gd.select.temperatur=1", "did you mean model.gd.select.temperature?"),
        ("model.gd.beacon.conv=1", "did you mean model.gd.beacon.conv_width?"),
        ("model.gd.beacon.barrier.flor=1", "did you mean model.gd.beacon.barrier.floor?"),
        ("train.lr.shape={\"wsd\":{\"decoy\":0.1}}", "did you mean train.lr.shape.wsd.decay?"),
        ("train.lr.zzz=1", "unknown key train.lr.zzz (known here: peak, warmup,"),
    ];
    for (setting, expected) in cases {
        let error = refused(&[setting]);
        assert!(error.contains(expected), "{setting}: {error}");
    }
}

#[test]
fn wrong_values_are_named_with_their_path_and_what_is_expected() {
    let cases = [
        ("train.lr.peak=fast", "train.lr.peak: invalid type: string \"fast\", expected f64"),
        ("train.steps=-1", "train.steps: invalid value: integer `-1`, expected u64"),
        ("model.gd.mechanism=[\"gd\", 3]", "model.gd.mechanism.1: "),
        ("train.lr.shape=cosin", "train.lr.shape \"cosin\" is unknown; did you mean \"cosine\"?"),
        ("train.lr=null", "train.lr: invalid type: null"),
        ("train.steps.x=1", "train.steps.x: train.steps is 20, not a table"),
        ("train.context=65", "train.context must be at most max_position_embeddings 64, not 65"),
    ];
    for (setting, expected) in cases {
        let error = refused(&[setting]);
        assert!(error.contains(expected), "{setting}: {error}");
    }
}

#[test]
fn all_problems_are_reported_at_once() {
    let error = refused(&["train.lr.peek=1", "model.colour=red", "train.clip=hard", "train.batches=2"]);
    for part in ["train.lr.peek", "model.colour", "train.clip: ", "train.batches"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = refused(&["model.head_dim=15", "train.clip=0", "train.context=65"]);
    for part in
        ["head_dim must be even", "train.clip must be above 0, not 0", "train.context must be at most"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_missing_key_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "short.json", &SMALL.replace("\"hidden_size\": 32,", ""));
    let error = Recipe::load(&path).unwrap_err().to_string();
    assert!(error.ends_with("short.json: model.hidden_size is missing"), "{error}");
}

#[test]
fn settings_override_and_are_checked_with_the_rest() {
    let set = |text: &str| text.parse::<Setting>().unwrap();
    let recipe =
        Recipe::load_with("tiny", &[set("train.lr.peak=1e-3"), set("train.lr.shape.wsd={ decay = 0.2 }")]);
    assert!(recipe.unwrap_err().to_string().contains("not a table"));
    let settings = [
        set("train.lr.peak=1e-3"),
        set("train.lr.shape={ wsd = { decay = 0.2 } }"),
        set("model.num_hidden_layers=6"),
        set("train.tokenizer.bpe.vocab=300"),
    ];
    assert!(Recipe::load_with("tiny", &settings).unwrap_err().to_string().contains("\"bytes\", not a table"));
    let settings = [&settings[..3], &[set("train.tokenizer={\"bpe\": {\"vocab\": 300}}")]].concat();
    let recipe = Recipe::load_with("tiny", &settings).unwrap();
    assert_eq!((recipe.train.lr.peak, recipe.model.num_hidden_layers), (1e-3, 6));
    assert_eq!(recipe.train.lr.shape, LrShape::Wsd { decay: 0.2 });
    assert_eq!(recipe.train.tokenizer, TokenizerChoice::Bpe { vocab: 300 });
    // Heads that read nothing are the Beacon alone.
    let bare = [set("model.gd.beacon=null"), set("model.gd.selecting_heads=[]")];
    let error = Recipe::load_with("tiny", &bare[..1]).unwrap_err().to_string();
    assert!(error.contains("selecting_heads 2 of 8"), "{error}");
    assert_eq!(Recipe::load_with("tiny", &bare).unwrap().model.gd.beacon, None);
}

#[test]
fn toml_and_json_give_the_same_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let json = write(dir.path(), "a.json", SMALL);
    let tree: serde_json::Value = serde_json::from_str(SMALL).unwrap();
    let toml = write(dir.path(), "a.toml", &toml::to_string(&tree).unwrap());
    assert_eq!(Recipe::load(&toml).unwrap(), Recipe::load(&json).unwrap());
    let broken = write(dir.path(), "b.toml", "[train]\nsteps = 1\nsteps = 2\n");
    let error = Recipe::load(&broken).unwrap_err().to_string();
    assert!(error.contains("b.toml") && error.contains("duplicate"), "{error}");
}

/// A saved recipe loads as the same recipe.
#[test]
fn every_preset_is_valid_and_loads_as_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    for (name, _) in PRESETS {
        let recipe = Recipe::load(name).unwrap();
        let path = write(dir.path(), "recipe.json", &serde_json::to_string_pretty(&recipe).unwrap());
        assert_eq!(Recipe::load(&path).unwrap(), recipe, "{name}");
    }
    let error = Recipe::load("tinny").unwrap_err().to_string();
    assert!(error.contains("did you mean tiny?"), "{error}");
}

/// The table of presets in the documentation has the sizes of the models that are built.
#[test]
fn the_documentation_states_every_presets_size() {
    let page = include_str!("../../../../docs/src/configuration.md");
    for (name, _) in PRESETS {
        let Recipe { model, train } = Recipe::load(name).unwrap();
        let row = format!(
            "| {name} | {} | {} | {} | {} × {} | {} | {} | {} | {} |",
            count(&model).unwrap(),
            model.num_hidden_layers,
            model.hidden_size,
            model.num_attention_heads,
            model.head_dim,
            model.attention(0).reading_heads(),
            model.vocab_size,
            train.context,
            train.batch * train.context * train.accumulation,
        );
        assert!(page.lines().any(|line| line == row), "docs/src/configuration.md lacks this row:\n{row}");
        assert!(
            model.gd.mechanism.iter().all(|m| *m == Mechanism::Gd) && model.gd.beacon.is_some(),
            "{name}"
        );
    }
    let tiny = Recipe::load("tiny").unwrap().model;
    let params = Params::new(0, DType::F32, &Device::Cpu);
    Transformer::new(&tiny, params.builder()).unwrap();
    assert_eq!(params.count(), count(&tiny).unwrap());
    let built: BTreeMap<_, _> = params.tensors().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    assert_eq!(built, shapes(&tiny).unwrap());
}
