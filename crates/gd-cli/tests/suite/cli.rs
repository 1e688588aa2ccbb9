//! The program on a small model: train, evaluate, generate, compare, measure memory, check gradients.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use candle_core::{Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::analysis::variants::variants;
use gd_model::config::{Mechanism, Recipe};
use gd_model::data::{Corpus, Texts};
use gd_model::io::checkpoint::WEIGHTS;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::pretrained::{self, Loaded};
use gd_model::train::Trainer;
use serde_json::Value;

use crate::program::{SAMPLE, SMALL, gd, parsed, succeeded};

/// A folder with a text of 20,000 characters and the small configuration.
fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), text())?;
    Ok(dir)
}

fn text() -> String {
    SAMPLE.chars().take(20_000).collect()
}

/// Runs the program. `args` are separated by spaces; the elements of `more` may contain spaces.
fn command(dir: &Path, args: &str, more: &[&str], env: &[(&str, &str)]) -> Result<Output> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    program.args(args.split_whitespace()).args(more).envs(env.to_vec()).current_dir(dir);
    Ok(program.output()?)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

const TRAIN: &str = "train --config small.json --data text.txt --seed 3 --json --out";

#[test]
fn a_trained_model_is_evaluated_and_generates_from_its_folder() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let trained = parsed(&gd(dir, &format!("{TRAIN} model"))?)?;
    let loss = number(&trained, "loss");
    // A uniform distribution over 256 bytes has a loss of 5.55.
    assert!(loss > 2.0 && loss < 4.5, "{trained}");
    let log = fs::read_to_string(dir.join("model/train.jsonl"))?;
    assert_eq!(log.lines().filter(|line| !line.contains("\"event\"")).count(), 20);

    // `eval` measures the loss that `train` reports.
    let split = Texts::split(&[text()], 0.1)?;
    let valid: String = split.valid.iter().map(|text| text.text.as_str()).collect();
    fs::write(dir.join("valid.txt"), &valid)?;
    let evaluated = parsed(&gd(dir, "eval model --data valid.txt --context 32 --json")?)?;
    assert!((number(&evaluated, "loss") - loss).abs() < 1e-5, "{evaluated} {trained}");
    assert_eq!(evaluated["tokens"], valid.len() - 1);
    let bits = number(&evaluated, "loss") / 2f64.ln();
    assert!((number(&evaluated, "bits_per_byte") - bits).abs() < 1e-9, "one token per byte: {evaluated}");
    assert!((number(&evaluated, "perplexity").ln() - number(&evaluated, "loss")).abs() < 1e-9, "{evaluated}");
    // The weights file names the same model, and several text files are concatenated.
    fs::write(dir.join("half.txt"), &valid[..100])?;
    fs::write(dir.join("rest.txt"), &valid[100..])?;
    let args = format!("eval model/{WEIGHTS} --data half.txt rest.txt --context 32 --json");
    assert_eq!(parsed(&gd(dir, &args)?)?, evaluated);

    let greedy = |more: &[&str]| {
        let args = "generate model --max-tokens 40 --temperature 0 --repetition-penalty 1.5 --prompt";
        command(dir, args, &[&["It was"], more].concat(), &[])
    };
    let first = succeeded(&greedy(&[])?)?;
    assert!(first.starts_with("It was") && first.ends_with('\n') && first.len() > 30, "{first:?}");
    assert_eq!(succeeded(&greedy(&[])?)?, first);
    let same = parsed(&greedy(&["--json", "--seed", "9"])?)?;
    let text = same["text"].as_str().unwrap_or_default();
    assert_eq!(format!("It was{text}\n"), first, "the seed has an effect");
    assert_eq!((same["tokens"].clone(), same["stopped"].clone()), (40.into(), false.into()));
    // The text ends before the stop string.
    let stop: String = text.chars().skip(5).take(1).collect();
    let before = text.split(&stop).next().unwrap_or_default().to_owned();
    let stopped = parsed(&greedy(&["--json", "--stop", &stop])?)?;
    assert_eq!((stopped["text"].as_str(), stopped["stopped"].as_bool()), (Some(&*before), Some(true)));
    let hot = |seed| succeeded(&gd(dir, &format!("generate model --prompt It --seed {seed}"))?);
    assert_eq!(hot(1)?, hot(1)?);
    assert_ne!(hot(1)?, hot(2)?);
    Ok(())
}

#[test]
fn the_number_of_threads_does_not_change_a_run() -> Result<()> {
    let folder = folder()?;
    for precision in ["f32", "bf16_mixed"] {
        for threads in ["1", "2", "3"] {
            let args = format!("{TRAIN} {precision}{threads} --set train.precision={precision}");
            succeeded(&command(folder.path(), &args, &[], &[("RAYON_NUM_THREADS", threads)])?)?;
        }
        let weights = |n: u32| fs::read(folder.path().join(format!("{precision}{n}")).join(WEIGHTS));
        assert!(weights(1)? == weights(2)? && weights(1)? == weights(3)?, "{precision}");
    }
    Ok(())
}

#[test]
fn a_reloaded_model_is_bit_identical() -> Result<()> {
    let folder = folder()?;
    let (cpu, recipe): (_, Recipe) = (Device::Cpu, serde_json::from_str(SMALL)?);
    let tokenizer = Tokenizer::bytes()?;
    let texts = Texts::split(&[text()], 0.1)?;
    let mut trainer = Trainer::new(recipe, Corpus::encode(&texts, &tokenizer)?, 5, &cpu)?;
    for _ in 0..5 {
        trainer.train_step()?;
    }
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let card = card.map(|key| (key, "test".to_owned()));
    let path = folder.path().join("model");
    let same = Transformer::new(trainer.model.config(), trainer.params.frozen())?;
    Loaded::new(same, trainer.params.clone(), tokenizer).save(&path, &card)?;
    let loaded = pretrained::load(&path, &cpu)?;
    let ids = Tensor::from_vec((0..50u32).map(|i| i * 37 % 256).collect::<Vec<_>>(), (2, 25), &cpu)?;
    let mask = Mask::causal(0);
    let bits = |model: &Transformer| -> Result<Vec<u32>> {
        let logits = model.forward(&ids, &Pass::new(&mask), None)?;
        Ok(logits.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    let expected = bits(&trainer.model)?;
    assert!(expected.iter().any(|b| *b != expected[0]));
    assert_eq!(bits(&loaded.model)?, expected);
    trainer.train_step()?;
    assert_ne!(bits(&trainer.model)?, expected, "a step changes the bits");
    Ok(())
}

#[test]
fn compare_trains_every_mechanism_with_equal_parameters_and_data() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let args = "compare --config small.json --data text.txt --mechanisms softmax,gd --seed 4 --out c --json";
    let result = parsed(&gd(dir, args)?)?;
    let stored: Value = serde_json::from_slice(&fs::read(dir.join("c/compare.json"))?)?;
    assert_eq!(result, stored);
    let [softmax, selecting] = [&result["mechanisms"][0], &result["mechanisms"][1]];
    assert_eq!((&softmax["mechanism"], &selecting["mechanism"]), (&"softmax".into(), &"gd".into()));
    // The numbers differ by at most half the parameters of a column of the feed-forward block.
    let half = 3.0 * 32.0 * 2.0 / 2.0;
    let difference = number(softmax, "parameters") - number(selecting, "parameters");
    assert!(difference.abs() <= half, "{softmax} {selecting}");
    let ratio = number(selecting, "loss") / number(softmax, "loss");
    assert!((number(selecting, "difference_percent") - 100.0 * (ratio - 1.0)).abs() < 1e-9, "{selecting}");
    assert_eq!((&softmax["spread"], &softmax["abstain_rate"]), (&Value::Null, &0.0.into()));
    for run in result["runs"].as_array().into_iter().flatten() {
        assert_eq!(run["seed"], 4);
        assert_eq!(run["train_loss"].as_array().map(Vec::len), Some(20));
        assert_eq!(run["valid_loss"].as_array().map(Vec::len), Some(2));
    }
    let table = fs::read_to_string(dir.join("c/table.md"))?;
    assert!(table.starts_with("| mechanism") && table.contains("| loss by position"), "{table}");
    let costs = [softmax, selecting].map(|row| &row["reading"]);
    let costs = costs.map(|reading| number(reading, "loss_without_reads") - number(reading, "loss"));
    let measures = costs.into_iter().any(|cost| cost >= 0.005);
    assert_eq!(table.contains("This table does not measure reading"), !measures, "{table}");
    for run in result["runs"].as_array().into_iter().flatten() {
        assert_eq!(run["reading"]["by_position"].as_array().map(Vec::len), Some(8));
    }
    let curves = fs::read_to_string(dir.join("c/curves.svg"))?;
    assert!(curves.starts_with("<svg") && curves.contains("softmax: ") && curves.contains("gd: "));
    Ok(())
}

#[test]
fn a_repeated_comparison_continues_with_the_runs_that_are_missing() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let args = "compare --config small.json --data text.txt --mechanisms softmax,nsa --steps 2 --out c";
    let log = |args: &str| -> Result<(String, Value)> {
        let output = gd(dir, args)?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        succeeded(&output)?;
        Ok((log, serde_json::from_slice(&fs::read(dir.join("c/compare.json"))?)?))
    };
    let (first, result) = log(args)?;
    assert!(first.contains("softmax, seed 0") && first.contains("nsa, seed 0"), "{first}");
    // Its defaults would select all keys of this context.
    let nsa = result["mechanisms"][1]["layers"][0].clone();
    assert!(nsa["w"].as_u64().is_some_and(|w| w > 0 && w < 64), "{nsa}");
    let table = fs::read_to_string(dir.join("c/table.md"))?;
    assert!(table.contains(&format!("nsa: {nsa}")) && table.contains("After 2 steps"), "{table}");
    let runs = fs::read_dir(dir.join("c/runs"))?.collect::<std::io::Result<Vec<_>>>()?;
    let [one, two] = &runs[..] else { anyhow::bail!("{runs:?}") };
    let softmax = if one.file_name().to_string_lossy().starts_with("softmax") { one } else { two };
    fs::remove_file(softmax.path())?;
    let (again, same) = log(args)?;
    assert!(again.contains("softmax, seed 0") && !again.contains("nsa"), "{again}");
    assert_eq!(result["runs"][1], same["runs"][1]);
    assert_eq!(result["runs"][0]["train_loss"], same["runs"][0]["train_loss"]);
    // Another text is another run.
    fs::write(dir.join("other.txt"), fs::read_to_string(dir.join("text.txt"))?.replace('e', "a"))?;
    let (other, _) = log(&args.replace("text.txt", "other.txt"))?;
    assert!(other.contains("a run of another configuration") && other.contains("nsa, seed 0"), "{other}");
    Ok(())
}

/// Softmax computes its weights again in the backward pass, and selection stores a constant number of candidates per
/// query; other mechanisms are computed in blocks of queries, or with a state of constant size. Selective Attention, whose
/// weights depend on those of earlier queries, stores N × N weights.
#[test]
fn the_memory_of_all_but_selective_attention_does_not_grow_quadratically() -> Result<()> {
    let folder = folder()?;
    let names = ["selective", "softmax", "gd", "linear", "sliding_window", "nsa", "sigmoid"];
    let args = names.join(",");
    let args = format!("compare --config small.json --mechanisms {args} --memory 256,1024 --json");
    let result = parsed(&gd(folder.path(), &args)?)?;
    let cells: Vec<&Value> = result["memory"].as_array().into_iter().flatten().collect();
    assert_eq!(cells.len(), 2 * names.len(), "{result}");
    assert_eq!((&cells[5]["mechanism"], &cells[5]["context"]), (&"gd".into(), &1024.into()));
    if cells[0]["mib"].is_null() {
        // The system does not report its memory.
        return Ok(());
    }
    let growth = |short: usize| number(cells[short + 1], "mib") / number(cells[short], "mib");
    assert!(growth(0) > 7.0, "selective: {result}");
    for (at, name) in names.iter().enumerate().skip(1) {
        assert!(growth(2 * at) < 5.0, "{name}: {result}");
    }
    Ok(())
}

#[test]
fn doctor_names_parameters_without_a_gradient() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let report = parsed(&gd(dir, "doctor --config small.json --json")?)?;
    let base: Recipe = serde_json::from_str(SMALL)?;
    let all = variants().iter().filter(|variant| variant.applies(&base.model)).count();
    assert!(all > Mechanism::names().len(), "{all} variants");
    assert_eq!(report["gradients"].as_array().map(Vec::len), Some(all), "{report}");
    let mut recipe: Value = serde_json::from_str(SMALL)?;
    recipe["model"]["gd"]["select"]["estimator"] = "winner".into();
    fs::write(dir.join("no_gradient.json"), recipe.to_string())?;
    let output = gd(dir, "doctor --config no_gradient.json")?;
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert_eq!(output.status.code(), Some(1), "{out}{err}");
    let line = err.trim_end();
    assert!(line.starts_with("error: no_gradient.json") && !line.contains('\n'), "{err}");
    assert!(err.contains("model.layers.0.self_attn.q_proj.weight") && !err.contains("v_proj"), "{err}");
    assert!(
        out.contains("model.layers.0.self_attn.q_proj.weight: all zero") || out.contains(": absent"),
        "{out}"
    );
    Ok(())
}

#[cfg(not(feature = "mpi"))]
#[test]
fn several_processes_without_mpi_are_an_error() -> Result<()> {
    let folder = folder()?;
    let output = command(folder.path(), &format!("{TRAIN} one"), &[], &[("OMPI_COMM_WORLD_SIZE", "4")])?;
    let err = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("one of 4 processes") && err.contains("without the feature mpi"), "{err}");
    assert!(!folder.path().join("one").exists());
    Ok(())
}
