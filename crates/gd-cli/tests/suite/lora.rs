//! Training of adapters, and what reads them.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::program::{command, error, gd, json as run_json, succeeded, train_small, write_mistral};
use crate::serve::Served;

const ARGS: &str = "train --from base --data text.txt --set train.batch=2 --set train.accumulation=1 --steps 20 \
                    --set train.lr.peak=1e-2 --lora r=4,alpha=8,dropout=0.1,targets=all-linear";
const EVAL: &str = "--data text.txt --json";

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

fn loss(dir: &Path, model: &str) -> Result<f64> {
    run_json(dir, &format!("eval {model} {EVAL}"))?["loss"].as_f64().context("a loss")
}

#[test]
fn an_adapter_is_trained_resumed_to_the_same_bits_merged_and_read() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    train_small(dir)?;
    let weights = read(&dir.join("base/model.safetensors"))?;
    let plan = run_json(dir, &format!("{ARGS} --out whole --dry-run --json"))?;
    let full = run_json(
        dir,
        "train --from base --data text.txt --set train.batch=2 --set train.accumulation=1 --dry-run --json",
    )?;
    let count = |plan: &Value, key: &str| plan[key].as_u64().with_context(|| format!("{key}: {plan}"));
    ensure!(count(&full, "trained_parameters")? == count(&full, "parameters")?, "{full}");
    let trained = count(&plan, "trained_parameters")?;
    ensure!(count(&plan, "parameters")? == count(&full, "parameters")? + trained, "{plan}");
    let text = succeeded(&gd(dir, &format!("{ARGS} --out whole --dry-run"))?)?;
    ensure!(text.contains(&format!("{trained} of them trained")), "{text}");

    succeeded(&gd(dir, &format!("{ARGS} --out whole"))?)?;
    let settings: Value = serde_json::from_slice(&read(&dir.join("whole/adapter_config.json"))?)?;
    ensure!(
        settings["r"] == 4 && settings["lora_alpha"] == 8.0 && settings["peft_type"] == "LORA",
        "{settings}"
    );
    ensure!(settings["lora_dropout"] == 0.1, "{settings}");
    ensure!(!dir.join("whole/model.safetensors").exists() && dir.join("whole/report.html").exists());
    ensure!(weights == read(&dir.join("base/model.safetensors"))?, "the base changed");

    // A run that was stopped is read from its checkpoint, and continues to the same bits, also where its base has moved.
    succeeded(&gd(dir, &format!("{ARGS} --out parts --stop-after 8"))?)?;
    let (before, between, after) = (loss(dir, "base")?, loss(dir, "parts")?, loss(dir, "whole")?);
    ensure!(after < before && between != before && between != after, "{before} {between} {after}");
    fs::rename(dir.join("base"), dir.join("moved"))?;
    let message = error(dir, "train --resume parts", 1)?;
    ensure!(message.contains("--set train.lora.base=PATH"), "{message}");
    let message = error(dir, &format!("eval whole {EVAL}"), 1)?;
    ensure!(message.contains("adapter_config.json") && message.contains("gd convert --adapter"), "{message}");
    succeeded(&gd(dir, "train --resume parts --set train.lora.base=moved")?)?;
    let whole = read(&dir.join("whole/adapter_model.safetensors"))?;
    ensure!(whole == read(&dir.join("parts/adapter_model.safetensors"))?, "other bits");

    // Merged, it is a model.
    succeeded(&gd(dir, "convert moved --adapter whole --out merged")?)?;
    let off = (loss(dir, "merged")? - after).abs();
    ensure!(off < 1e-6, "off by {off}");
    let read_adapter = run_json(dir, "generate parts --prompt It --max-tokens 4 --temperature 0 --json")?;
    let merged = run_json(dir, "generate merged --prompt It --max-tokens 4 --temperature 0 --json")?;
    ensure!(read_adapter["token_ids"] == merged["token_ids"], "{read_adapter} {merged}");

    // Another model is refused: by the run, and where the adapter is added.
    succeeded(&gd(dir, "train --config small.json --data text.txt --steps 2 --seed 5 --out base")?)?;
    let message = error(dir, "convert base --adapter whole --out wrong", 1)?;
    ensure!(message.contains("trained on another model than base"), "{message}");
    let message = error(dir, &format!("eval whole {EVAL}"), 1)?;
    ensure!(message.contains("trained on another model"), "{message}");
    succeeded(&gd(dir, &format!("{ARGS} --out third --stop-after 8"))?)?;
    let message = error(dir, "train --resume third --set train.lora.base=moved", 1)?;
    ensure!(message.contains("the model that the adapter belongs to changed"), "{message}");
    Ok(())
}

#[test]
fn every_command_reads_the_folder_of_an_adapter_as_the_merged_model() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    train_small(dir)?;
    fs::write(dir.join("base/chat_template.jinja"), "{% for m in messages %}{{ m.content }};{% endfor %}a:")?;
    succeeded(&gd(dir, &format!("{ARGS} --out adapter"))?)?;
    succeeded(&gd(dir, "convert base --adapter adapter --out merged")?)?;
    let of = |model: &str| -> Result<[Value; 4]> {
        let generated = "--prompt It --max-tokens 12 --temperature 0 --logprobs 2 --json";
        let mut generated = run_json(dir, &format!("generate {model} {generated}"))?;
        let fields = generated.as_object_mut().context("an object")?;
        fields.retain(|name, _| !name.ends_with("per_second"));
        let mut chat = command(dir, &format!("chat {model} --max-tokens 8 --temperature 0 --json"));
        let mut chat = chat.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        chat.stdin.take().context("stdin")?.write_all(b"Who?\nAnd then?\n")?;
        let lines = succeeded(&chat.wait_with_output()?)?;
        let lines = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        ensure!(lines.len() == 2 && lines[1]["tokens"] == 8, "{lines:?}");
        let body = json!({
            "messages": [{ "role": "user", "content": "Who?" }],
            "max_tokens": 8, "temperature": 0, "logprobs": true, "sources": true,
        });
        let served = Served::of(dir, model, "")?.answer("/v1/chat/completions", &body)?;
        ensure!(served["choices"][0]["message"]["content"] == lines[0]["text"], "{served} {lines:?}");
        let traced = format!("trace {model} --prompt It --max-tokens 8 --temperature 0 --out {model}.trace");
        succeeded(&gd(dir, &traced)?)?;
        let checked = run_json(dir, &format!("verify {model}.trace --model {model} --json"))?;
        Ok([generated, Value::from(lines), served["choices"].clone(), checked["root"].clone()])
    };
    let (base, adapter, merged) = (of("base")?, of("adapter")?, of("merged")?);
    ensure!(adapter == merged, "{adapter:#?} {merged:#?}");
    ensure!(base[0] != adapter[0] && base[2] != adapter[2], "the adapter changes nothing: {base:?}");
    ensure!(loss(dir, "adapter")? == loss(dir, "merged")?);
    Ok(())
}

#[test]
fn an_adapter_of_another_family_is_one_of_peft() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    write_mistral(dir)?;
    let args = ARGS.replace("targets=all-linear", "targets=q_proj,down_proj");
    succeeded(&gd(dir, &format!("{args} --out run"))?)?;
    let settings: Value = serde_json::from_slice(&read(&dir.join("run/adapter_config.json"))?)?;
    ensure!(settings["target_modules"] == json!(["down_proj", "q_proj"]), "{settings}");
    let file = safetensors::SafeTensors::deserialize(&read(&dir.join("run/adapter_model.safetensors"))?)?
        .names()
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<_>>();
    ensure!(file.len() == 8, "{file:?}");
    ensure!(file.contains(&"base_model.model.model.layers.1.mlp.down_proj.lora_B.weight".into()), "{file:?}");
    ensure!(loss(dir, "run")? < loss(dir, "base")?);
    // The adapter of a run as the base of another one.
    let again = args.replace("--from base", "--from run");
    succeeded(&gd(dir, &format!("{again} --out again"))?)?;
    ensure!(loss(dir, "again")? < loss(dir, "run")?);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    train_small(dir)?;
    for (args, code, names) in [
        ("--data text.txt --lora r=4", 2, "--from"),
        ("--from base --data text.txt --lora rank=4", 2, "r=N, alpha=X, dropout=P and targets"),
        ("--from base --data text.txt --lora dropout=1", 1, "train.lora.dropout"),
        ("--from base --data text.txt --lora r=0", 1, "train.lora.r"),
        ("--from base --data text.txt --lora targets=query", 1, "allowed are down_proj, gate_proj"),
        (
            "--from base --data text.txt --lora r=4 --set train.ema.decay=0.9",
            1,
            "train.ema cannot be combined",
        ),
        ("--config small.json --data text.txt --set train.lora.base=base", 2, "use --from and --lora"),
    ] {
        let message = error(dir, &format!("train {args} --out new"), code)?;
        ensure!(message.contains(names), "{args}: {message}");
        ensure!(!dir.join("new").exists(), "{args} writes a folder");
    }
    Ok(())
}
