//! Distillation of a model into a copy with another attention: the two losses compared with naive arithmetic and finite
//! differences, and runs of `gd convert --uptrain`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::cross_entropy::IGNORE;
use gd_kernels::{Mask, Score};
use gd_layer::Pass;
use gd_model::config::{Mechanism, ModelConfig};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained;
use gd_model::model::swap::{Layers, Swap};
use gd_model::train::teacher::Teacher;
use serde_json::Value;

use crate::program::{SAMPLE, SMALL, error, json};

const CPU: Device = Device::Cpu;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family)
}

/// A fixture model, a copy of it with selecting layers and its parameters, and ids `[2, 23]`, all in f64.
struct Pair {
    teacher: Transformer,
    student: Transformer,
    vars: Vec<(String, Var)>,
    ids: Tensor,
}

fn pair(family: &str, layers: Layers, k: usize) -> Result<Pair> {
    let read = || pretrained::read(&fixture(family), &CPU);
    let parts = read()?;
    let params = Params::stored(parts.tensors, None, DType::F64, &CPU);
    let teacher = Transformer::new(&parts.config, params.frozen())?;
    let mut parts = read()?;
    Swap { layers, mechanism: Mechanism::Gd, candidates: k, score: Score::Dot }.apply(&mut parts)?;
    let params = Params::stored(parts.tensors, parts.seed, DType::F64, &CPU);
    let student = Transformer::new(&parts.config, params.builder())?;
    let vocab = parts.config.vocab_size as u32;
    let ids: Vec<u32> = (0..2 * 23u32).map(|i| i * i * 31 % vocab).collect();
    Ok(Pair { teacher, student, vars: params.vars(), ids: Tensor::from_vec(ids, (2, 23), &CPU)? })
}

/// Compares the directional derivative of each parameter with a finite difference of the loss.
fn check_directions(
    vars: &[(String, Var)],
    grads: &GradStore,
    learns: impl Fn(&str) -> bool,
    loss: impl Fn() -> Result<f64>,
) -> Result<()> {
    let mut checked = 0;
    for (i, (name, var)) in vars.iter().enumerate() {
        if !learns(name) {
            ensure!(grads.get(var).is_none(), "{name} has a gradient");
            continue;
        }
        let grad = grads.get(var).with_context(|| format!("{name} has no gradient"))?;
        let direction: Vec<f64> = (0..var.elem_count()).map(|j| ((i + j * 3) as f64 * 1.7).sin()).collect();
        let direction = Tensor::from_vec(direction, var.shape(), &CPU)?;
        let (at, step) = (var.as_detached_tensor().copy()?, 1e-6);
        let along = (grad.detach() * &direction)?.sum_all()?.to_scalar::<f64>()?;
        let loss_at = |by: f64| -> Result<f64> {
            var.set(&(&at + (&direction * by)?)?)?;
            loss()
        };
        let difference = (loss_at(step)? - loss_at(-step)?) / (2.0 * step);
        var.set(&at)?;
        ensure!(
            (along - difference).abs() <= 1e-6 * (1.0 + along.abs()) && along != 0.0,
            "{name}: {along}, by differences {difference}"
        );
        checked += 1;
    }
    ensure!(checked > 4, "{checked} parameters checked");
    Ok(())
}

#[test]
fn layer_alignment_trains_only_the_changed_layers() -> Result<()> {
    let mask = Mask::causal(0);
    let pass = Pass::new(&mask);
    for (family, layers) in [("llama", vec![0, 2]), ("qwen3", vec![1]), ("mistral", vec![0, 1])] {
        let loss_with_keys = |k: usize| -> Result<(Pair, Tensor, GradStore)> {
            let pair = pair(family, Layers::List(layers.clone()), k)?;
            let Pair { teacher, student, vars, ids } = &pair;
            let (loss, grads) = student.layer_alignment(teacher, vars, &layers, ids, &pass, 0.75)?;
            Ok((pair, loss, grads))
        };
        // All visible keys.
        let (_, loss, _) = loss_with_keys(64)?;
        ensure!(loss.to_scalar::<f64>()? < 1e-12, "{family}: {loss}");
        let (pair, loss, grads) = loss_with_keys(2)?;
        let loss = loss.to_scalar::<f64>()?;
        ensure!(loss > 1e-3, "{family}: {loss}");
        let learns = |name: &str| {
            layers.iter().any(|i| {
                let of = |part: &str| name.starts_with(&format!("model.layers.{i}.{part}"));
                of("self_attn.") || of("input_layernorm.")
            })
        };
        check_directions(&pair.vars, &grads, learns, || {
            let Pair { teacher, student, vars, ids } = &pair;
            Ok(student.layer_alignment(teacher, vars, &layers, ids, &pass, 0.75)?.0.to_scalar()?)
        })?;
    }
    Ok(())
}

#[test]
fn the_alignment_error_is_relative_to_the_teacher() -> Result<()> {
    let pair = pair("qwen2", Layers::Last(1), 2)?;
    let Pair { teacher, student, vars, ids } = &pair;
    let (mask, last) = (Mask::causal(0), student.config().num_hidden_layers - 1);
    let error = |weight: f64| -> Result<f64> {
        Ok(student.layer_alignment(teacher, vars, &[last], ids, &Pass::new(&mask), weight)?.0.to_scalar()?)
    };
    let once = error(1.0)?;
    ensure!((error(0.5)? * 2.0 - once).abs() < 1e-12 && once < 4.0, "{once}");
    // The relative error of a layer with output 0 is 1.
    let name = format!("model.layers.{last}.self_attn.o_proj.weight");
    let (_, var) = vars.iter().find(|v| v.0 == name).context("a projection")?;
    var.set(&var.zeros_like()?)?;
    ensure!((error(1.0)? - 1.0).abs() < 1e-12, "{}", error(1.0)?);
    Ok(())
}

fn rows(logits: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(logits.flatten_to(1)?.to_dtype(DType::F64)?.to_vec2()?)
}

/// `x - logsumexp(x)`.
fn log_softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum = top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln();
    row.iter().map(|x| x - sum).collect()
}

#[test]
fn distillation_trains_every_parameter() -> Result<()> {
    let (mask, kl) = (Mask::causal(0), 0.6);
    let pass = Pass::new(&mask);
    for family in ["llama", "qwen2"] {
        let Pair { teacher, student, vars, ids } = pair(family, Layers::All, 2)?;
        let vocab = student.config().vocab_size as u32;
        let mut next: Vec<u32> = (0..2 * 23u32).map(|i| (i * 13 + 5) % vocab).collect();
        (next[3], next[22]) = (IGNORE, IGNORE);
        let targets = Tensor::from_vec(next.clone(), (2, 23), &CPU)?;
        let parts = pretrained::read(&fixture(family), &CPU)?;
        let loss = || -> Result<Tensor> {
            let mine = student.hidden(&ids, &pass, None)?.flatten_to(1)?;
            let other = teacher.hidden(&ids, &pass, None)?.flatten_to(1)?;
            let targets = targets.flatten_all()?;
            Ok(gd_kernels::cross_entropy::linear_distillation(
                (&mine, &student.head_weight()?),
                &targets,
                (&other, &teacher.head_weight()?),
                kl,
            )?)
        };
        let (mine, theirs) =
            (rows(&student.forward(&ids, &pass, None)?)?, rows(&teacher.forward(&ids, &pass, None)?)?);
        let (mut sum, mut count) = (0.0, 0);
        for ((mine, theirs), &next) in mine.iter().zip(&theirs).zip(&next).filter(|row| *row.1 != IGNORE) {
            let (s, t) = (log_softmax(mine), log_softmax(theirs));
            sum -= s[next as usize];
            sum += kl * t.iter().zip(&s).map(|(t, s)| t.exp() * (t - s)).sum::<f64>();
            count += 1;
        }
        let got = loss()?;
        let value = got.to_scalar::<f64>()?;
        ensure!(
            (value - sum / f64::from(count)).abs() < 1e-9,
            "{family}: {value} {}",
            sum / f64::from(count)
        );
        check_directions(&vars, &got.backward()?, |_| true, || Ok(loss()?.to_scalar()?))?;

        // In f32, as in a run.
        let config = student.config().clone();
        let run = Teacher::new(parts, &config, DType::F32, &CPU)?;
        ensure!(run.changed().len() == config.num_hidden_layers);
        let params = Params::stored(
            vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect(),
            None,
            DType::F32,
            &CPU,
        );
        let same = Transformer::new(&config, params.builder())?;
        let hidden = same.hidden(&ids, &pass, None)?;
        let got = run.loss(&same, &hidden, (&ids, &targets), &pass, kl)?.to_scalar::<f32>()?;
        ensure!((f64::from(got) - value).abs() < 1e-4, "{family}: {got} {value}");
    }
    Ok(())
}

#[test]
fn incompatible_teachers_are_errors() -> Result<()> {
    let read = |family: &str| pretrained::read(&fixture(family), &CPU);
    let refused = |family: &str, student: &ModelConfig| -> Result<String> {
        match Teacher::new(read(family)?, student, DType::F32, &CPU) {
            Ok(_) => anyhow::bail!("{family} was accepted"),
            Err(e) => Ok(e.to_string()),
        }
    };
    let same = refused("llama", &read("llama")?.config)?;
    ensure!(same.contains("no layer differs"), "{same}");
    let mut wide = read("llama")?.config;
    wide.hidden_size *= 2;
    let other = refused("llama", &wide)?;
    ensure!(
        other.contains("cannot learn from a teacher of") && other.contains(&wide.hidden_size.to_string())
    );
    Ok(())
}

/// A folder with a text and a copy `model` of a fixture, with the optional files of a model.
fn folder(family: &str) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(8_000).collect::<String>())?;
    let model = dir.path().join("model");
    fs::create_dir(&model)?;
    for entry in fs::read_dir(fixture(family))? {
        let entry = entry?;
        if entry.file_name() != "golden.safetensors" {
            // Not a copy, which would be as read-only as the sources may be.
            fs::write(model.join(entry.file_name()), fs::read(entry.path())?)?;
        }
    }
    fs::write(model.join("tokenizer_config.json"), r#"{"chat_template": "{{ messages }}"}"#)?;
    fs::write(model.join("generation_config.json"), r#"{"temperature": 0.25, "eos_token_id": 1}"#)?;
    Ok(dir)
}

const SHORT: &str =
    "--set train.batch=2 --set train.context=24 --set train.eval_every=5 --set train.uptrain.align=0.3";

#[test]
fn a_resumed_run_equals_an_uninterrupted_one_and_has_the_files_of_its_teacher() -> Result<()> {
    let folder = folder("qwen3")?;
    let dir = folder.path();
    for (k, flags) in [(1, ""), (4, "--layers last:1 --score energy --set train.accumulation=2")] {
        let start = format!(
            "convert model --attention gd --k {k} --uptrain --data text.txt --steps 12 {SHORT} {flags} --seed 5 --json"
        );
        let whole = json(dir, &format!("{start} --out whole{k}"))?;
        ensure!(whole["finished"] == true && whole["steps"] == 12, "{whole}");
        // During the layer alignment, at its end, and after it.
        for (n, at) in [2, 4, 9].into_iter().enumerate() {
            let out = format!("split{k}-{n}");
            let first = json(dir, &format!("{start} --stop-after {at} --out {out}"))?;
            ensure!(first["finished"] == false && first["step"] == at, "{first}");
            let end = json(dir, &format!("train --resume {out} --json"))?;
            ensure!(end["loss"] == whole["loss"] && end["sample"] == whole["sample"], "{end} {whole}");
            for file in ["model.safetensors", "config.json", "recipe.json", "checkpoint-12/state.safetensors"]
            {
                let read = |run: &str| fs::read(dir.join(run).join(file)).context(file);
                ensure!(read(&out)? == read(&format!("whole{k}"))?, "{file} differs after a stop at {at}");
            }
        }
        let plain = fs::read(dir.join(format!("whole{k}/model.safetensors")))?;
        json(dir, &format!("{start} --set train.checkpoint_blocks=true --out blocks{k}"))?;
        ensure!(plain == fs::read(dir.join(format!("blocks{k}/model.safetensors")))?, "checkpointed blocks");
        for place in ["", "checkpoint-12"] {
            for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
                let [saved, source] = [dir.join(format!("whole{k}")).join(place), dir.join("model")]
                    .map(|folder| fs::read_to_string(folder.join(file)));
                let parsed = |text: std::io::Result<String>| -> Result<Value> {
                    Ok(serde_json::from_str(&text.with_context(|| format!("{place} {file}"))?)?)
                };
                ensure!(parsed(saved)? == parsed(source)?, "{place} {file}");
            }
        }
        let steps = fs::read_to_string(dir.join(format!("whole{k}/train.jsonl")))?;
        let steps: Vec<Value> = steps.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let alignment: Vec<_> = steps.iter().filter_map(|line| line.get("aligned")?.as_bool()).collect();
        ensure!(alignment.len() == 12 && alignment.iter().filter(|a| **a).count() == 4, "{alignment:?}");
    }
    Ok(())
}

#[test]
fn another_mechanism_learns_from_the_teacher_and_resumes() -> Result<()> {
    let folder = folder("qwen3")?;
    let dir = folder.path();
    let start = format!(
        "convert model --attention ssmax --uptrain --data text.txt --steps 6 {SHORT} --seed 5 --json"
    );
    let whole = json(dir, &format!("{start} --out whole"))?;
    ensure!(whole["finished"] == true && whole["steps"] == 6, "{whole}");
    json(dir, &format!("{start} --stop-after 3 --out split"))?;
    json(dir, "train --resume split --json")?;
    let weights = |run: &str| fs::read(dir.join(run).join("model.safetensors"));
    ensure!(weights("whole")? == weights("split")?, "the weights of a resumed run differ");
    // The scales of the heads, which the teacher does not have, start at 0.43 and learn.
    let tensors = candle_core::safetensors::load(dir.join("whole/model.safetensors"), &CPU)?;
    let scales =
        tensors.get("model.layers.0.self_attn.mechanism.s").context("no scales")?.to_vec1::<f32>()?;
    ensure!(scales.iter().all(|s| *s != 0.43 && (s - 0.43).abs() < 0.2), "{scales:?}");
    Ok(())
}

#[test]
fn a_run_resumes_only_with_its_teacher() -> Result<()> {
    let folder = folder("qwen2")?;
    let dir = folder.path();
    let start = format!("convert model --attention gd --uptrain --data text.txt --steps 8 {SHORT} --json");
    json(dir, &format!("{start} --stop-after 5 --out run"))?;
    fs::rename(dir.join("model"), dir.join("moved"))?;
    let missing = error(dir, "train --resume run", 1)?;
    ensure!(missing.contains("model") && missing.contains("--set train.uptrain.original=PATH"), "{missing}");
    json(dir, "convert moved --attention softmax --dtype f16 --out other --json")?;
    let other = error(dir, "train --resume run --set train.uptrain.original=other", 1)?;
    ensure!(
        other.contains("model that this one learns from changed") && other.contains("its hash was"),
        "{other}"
    );
    let end = json(dir, "train --resume run --set train.uptrain.original=moved --json")?;
    ensure!(end["finished"] == true, "{end}");
    let restarted = error(dir, "train --config run/recipe.json --data text.txt --out new", 2)?;
    ensure!(restarted.contains("gd convert --uptrain"), "{restarted}");
    Ok(())
}

#[test]
fn invalid_flags_values_and_texts_are_errors() -> Result<()> {
    let folder = folder("mistral")?;
    let dir = folder.path();
    json(dir, "data prepare --data text.txt --tokenizer bytes --out bytes --json")?;
    for (args, code, words) in [
        ("--uptrain", 2, ["--attention", ""]),
        ("--attention gd --steps 3", 2, ["--uptrain", ""]),
        ("--attention gd --data text.txt", 2, ["--uptrain", ""]),
        ("--attention gd --uptrain --dtype bf16", 2, ["--dtype", "--uptrain"]),
        ("--attention gd --uptrain --set train.uptrain.align=1", 1, ["train.uptrain.align", "not 1"]),
        ("--attention gd --uptrain --set train.uptrain.kl=-2", 1, ["train.uptrain.kl", "not -2"]),
        ("--attention gd --uptrain --set train.uptrain.klm=2", 1, ["train.uptrain.klm", "did you mean"]),
        ("--attention gd --uptrain --set train.context=4096", 1, ["4096", "max_position_embeddings"]),
        ("--attention softmax --uptrain --set train.context=16 --data text.txt", 1, ["no layer differs", ""]),
        ("--attention gd --uptrain --set train.context=16 --data bytes", 1, ["bytes", "another tokenizer"]),
        ("--attention gd --uptrain --set train.context=16 --data nowhere.txt", 1, ["nowhere.txt", ""]),
    ] {
        let text = error(dir, &format!("convert model {args} --out new"), code)?;
        ensure!(words.iter().all(|w| text.contains(w)) && text.starts_with("error: "), "{args}: {text}");
        ensure!(!dir.join("new").exists(), "{args}");
    }
    Ok(())
}

/// Mean KL divergence of a model's predictions from those of `teacher`, in nats per token of a text.
fn divergence(teacher: &Path, model: &Path) -> Result<f64> {
    let [teacher, model] = [teacher, model].map(|folder| pretrained::load(folder, &CPU));
    let (teacher, model) = (teacher?, model?);
    let (mut sum, mut count) = (0.0, 0);
    let mask = Mask::causal(0);
    for ids in teacher.tokenizer.encode(&SAMPLE[..6_400])?.chunks_exact(32) {
        let ids = Tensor::new(ids, &CPU)?.unsqueeze(0)?;
        let logits =
            |model: &Transformer| -> Result<_> { rows(&model.forward(&ids, &Pass::new(&mask), None)?) };
        for (t, s) in logits(&teacher.model)?.iter().zip(logits(&model.model)?) {
            let (t, s) = (log_softmax(t), log_softmax(&s));
            sum += t.iter().zip(&s).map(|(t, s)| t.exp() * (t - s)).sum::<f64>();
            count += 1;
        }
    }
    Ok(sum / f64::from(count))
}

#[test]
fn a_model_with_one_key_recovers_the_predictions_of_its_teacher() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    fs::write(dir.join("text.txt"), SAMPLE.chars().take(60_000).collect::<String>())?;
    let mut small: Value = serde_json::from_str(SMALL)?;
    small["model"]["gd"] = serde_json::json!({ "mechanism": ["softmax"] });
    fs::write(dir.join("c.json"), small.to_string())?;
    json(dir, "train --config c.json --data text.txt --steps 300 --out model --json")?;
    json(dir, "convert model --attention gd --k 1 --out swapped --json")?;
    let train = |out: &str, more: &str| {
        let sizes =
            "--set train.batch=4 --set train.context=32 --set train.lr.peak=2e-3 --set train.uptrain.kl=20";
        let args = format!(
            "convert model --attention gd --k 1 --uptrain --data text.txt {sizes} {more} --out {out}"
        );
        json(dir, &format!("{args} --json"))
    };
    train("learned", "--steps 150")?;
    train("aligned", "--steps 60 --set train.uptrain.align=0.98")?;
    let kl = |model: &str| divergence(&dir.join("model"), &dir.join(model));
    let (swapped, learned) = (kl("swapped")?, kl("learned")?);
    // The relative alignment error from the log.
    let log = fs::read_to_string(dir.join("aligned/train.jsonl"))?;
    let steps: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let errors: Vec<f64> = steps
        .iter()
        .filter(|line| line["aligned"] == true)
        .filter_map(|line| line["loss"].as_f64())
        .collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&errors[..6]), mean(&errors[errors.len() - 6..]));
    println!(
        "divergence {swapped:.4}, after training {learned:.4}; error of the layers {first:.4}, at the end {last:.4}"
    );
    ensure!(kl("model")? < 1e-9 && swapped > 0.02 && learned < 0.7 * swapped, "{swapped}, {learned}");
    ensure!(errors.len() == 59 && last < 0.8 * first, "{errors:?}");
    Ok(())
}
