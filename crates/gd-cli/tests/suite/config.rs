//! `gd config`, and configurations that are merged from presets and files.

use std::fs;

use anyhow::{Context, Result, ensure};
use gd_cli::commands::config::markdown;
use gd_model::config::{PRESETS, Recipe, keys};
use serde_json::{Value, json};

use crate::program::{error, failed, gd, json as parsed, succeeded};

#[test]
fn files_hold_a_part_of_a_configuration_over_a_preset() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    fs::write(dir.join("part.toml"), "[train]\nsteps = 300\n[train.lr]\npeak = 0.5\n")?;
    fs::write(dir.join("over.toml"), "preset = \"small\"\n[train]\nsteps = 300\n[train.lr]\npeak = 0.5\n")?;
    fs::write(
        dir.join("over.json"),
        json!({ "preset": "small", "train": { "steps": 300, "lr": { "peak": 0.5 } } }).to_string(),
    )?;
    fs::write(dir.join("mark.json"), "\u{feff}{\"train\": {\"steps\": 700}}")?;
    let show = |args: &str| parsed(dir, &format!("config show {args}"));
    let small = show("--config small")?;
    for args in ["--config small --config part.toml", "--config over.toml", "--config over.json"] {
        let shown = show(args)?;
        assert_eq!(
            (&shown["train"]["steps"], &shown["train"]["lr"]["peak"]),
            (&json!(300), &json!(0.5)),
            "{args}"
        );
        assert_eq!(
            (&shown["model"], &shown["train"]["batch"]),
            (&small["model"], &small["train"]["batch"]),
            "{args}"
        );
    }
    // Later ones win, and --set over all of them.
    assert_eq!(show("--config over.toml --config mark.json")?["train"]["steps"], 700);
    assert_eq!(show("--config mark.json --config over.toml --set train.steps=800")?["train"]["steps"], 800);
    assert_eq!(show("")?, show("--config tiny")?);
    // What is shown is a configuration.
    fs::write(dir.join("shown.json"), show("--config over.toml")?.to_string())?;
    assert_eq!(show("--config shown.json")?, show("--config over.toml")?);
    // A part alone names what is missing and the way out.
    let message = error(dir, "config show --config part.toml", 1)?;
    for part in
        ["part.toml: ", "model is missing", "train.batch is missing", "preset = \"tiny\"", "--config tiny"]
    {
        ensure!(message.contains(part), "{part}: {message}");
    }
    fs::write(dir.join("wrong.toml"), "preset = \"smal\"\n")?;
    let message = error(dir, "config show --config wrong.toml", 1)?;
    ensure!(message.contains("wrong.toml: preset \"smal\" is unknown; did you mean \"small\"?"), "{message}");
    // Training takes them, too, and is named after the last one.
    fs::write(dir.join("small_model.json"), include_str!("../../../gd-model/tests/fixtures/small.json"))?;
    let text = "a line of a text to train on\n".repeat(60);
    fs::write(dir.join("text.txt"), text)?;
    fs::write(dir.join("mine.toml"), "[train]\nsteps = 2\nlr.warmup = 1\n")?;
    let result = parsed(dir, "train --config small_model.json --config mine.toml --data text.txt --json")?;
    assert_eq!((&result["steps"], &result["folder"]), (&json!(2), &json!("out/mine")));
    Ok(())
}

#[test]
fn all_problems_of_a_configuration_are_reported_at_once() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let settings = [
        ("train.lr.peek=1", "unknown key train.lr.peek; did you mean train.lr.peak?"),
        ("train.steps=many", "train.steps: invalid type"),
        ("train.clip=-1", "train.clip must be above 0, not -1"),
        ("train.batch=0", "train.batch must be at least 1, not 0"),
        ("train.adamw.beta1=2", "train.adamw.beta1 must be in [0, 1), not 2"),
        ("train.adamw.eps=0", "train.adamw.eps must be above 0, not 0"),
        ("train.guard.window=1", "train.guard.window must be at least 2, not 1"),
        ("train.select.hardness=3", "train.select.hardness must be in [0, 1], not 3"),
        ("train.lr.shape=cosin", "did you mean \"cosine\"?"),
        ("model.head_dim=15", "model.head_dim must be even"),
        (
            "model.gd.select.candidates=3",
            "model.gd.select.candidates must be one of [1, 2, 4, 8, 16, 32, 64], not 3",
        ),
        ("model.gd.mechanism=[\"gd\",3]", "model.gd.mechanism.1"),
        ("train.precision.x.y=1", "train.precision.x.y: train.precision is \"auto\", not a table"),
        ("train.context.x=1", "train.context.x: train.context is 256, not a table"),
    ];
    let args = settings.map(|(setting, _)| format!("--set {setting}")).join(" ");
    let message = error(dir.path(), &format!("config show {args}"), 1)?;
    for (setting, expected) in settings {
        ensure!(message.contains(expected), "{setting}: {expected}: {message}");
    }
    // A check that involves a value that is wrong itself would be a false one.
    let message = error(dir.path(), "config show --set train.steps=many --set train.lr.warmup=900", 1)?;
    ensure!(!message.contains("warmup"), "{message}");
    Ok(())
}

#[test]
fn the_keys_of_the_documentation_are_those_of_the_code() -> Result<()> {
    let page = include_str!("../../../../docs/src/configuration.md");
    let tables = markdown(&keys());
    for line in tables.lines().filter(|line| !line.is_empty()) {
        ensure!(
            page.lines().any(|other| other == line),
            "docs/src/configuration.md lacks this line, which `gd config keys --markdown` prints:\n{line}"
        );
    }
    let rows = |text: &str| {
        text.lines().filter(|line| line.starts_with("| `model.") || line.starts_with("| `train.")).count()
    };
    assert_eq!(rows(page), rows(&tables), "the page has keys that do not exist");
    assert_eq!(rows(&tables), keys().iter().filter(|key| key.key.contains('.')).count());
    let dir = tempfile::tempdir()?;
    assert_eq!(succeeded(&gd(dir.path(), "config keys --markdown")?)?, tables);
    let listed = parsed(dir.path(), "config keys --json")?;
    assert_eq!(listed.as_array().context("no list")?.len(), keys().len());
    ensure!(succeeded(&gd(dir.path(), "config keys")?)?.contains("train.lr.peak: number (required)"));
    Ok(())
}

#[test]
fn every_key_of_a_preset_is_in_the_schema() -> Result<()> {
    fn paths(prefix: &str, value: &Value, all: &mut Vec<String>) {
        for (key, value) in value.as_object().into_iter().flatten() {
            let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            paths(&path, value, all);
            all.push(path);
        }
    }
    let keys = keys();
    for (name, _) in PRESETS {
        let mut used = Vec::new();
        paths("", &serde_json::to_value(Recipe::load(name)?)?, &mut used);
        for path in used {
            ensure!(keys.iter().any(|key| key.key == path), "{name}: {path} is no key");
        }
    }
    // A default is the value that an absent key gets.
    let bare: Value = serde_json::from_str(include_str!("../../../gd-model/tests/fixtures/small.json"))?;
    let recipe: Recipe = serde_json::from_value(bare.clone())?;
    let full = serde_json::to_value(&recipe)?;
    let mut compared = 0;
    for key in keys.iter().filter(|key| !key.required) {
        let pointer = format!("/{}", key.key.replace('.', "/"));
        if let (None, Some(value), Some(default)) =
            (bare.pointer(&pointer), full.pointer(&pointer), &key.default)
        {
            assert_eq!(value, default, "{}", key.key);
            compared += 1;
        }
    }
    ensure!(compared > 20, "{compared}");
    let dir = tempfile::tempdir()?;
    let schema = parsed(dir.path(), "config schema")?;
    assert_eq!(schema["properties"]["preset"]["enum"], json!(["tiny", "small", "base", "125M"]));
    ensure!(schema["required"].is_null() && schema["properties"]["train"].is_object(), "{schema}");
    failed(&gd(dir.path(), "config")?, 2)?;
    Ok(())
}
