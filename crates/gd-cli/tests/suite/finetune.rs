//! Training that goes on from a model.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::program::{
    SAMPLE, error, gd, json as run_json, succeeded, train_small, write_chats, write_mistral,
};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}";

/// Trains the small model, with a chat template beside it, and writes chats.
fn prepare(dir: &Path) -> Result<()> {
    train_small(dir)?;
    fs::write(dir.join("base/chat_template.jinja"), TEMPLATE)?;
    write_chats(dir)
}

fn steps(folder: &Path) -> Result<Vec<Value>> {
    let log = fs::read_to_string(folder.join("train.jsonl"))?;
    let lines =
        log.lines().map(|line| Ok(serde_json::from_str::<Value>(line)?)).collect::<Result<Vec<_>>>()?;
    Ok(lines.into_iter().filter(|line| line.get("event").is_none()).collect())
}

#[test]
fn a_run_goes_on_from_a_model_and_resumes_to_the_same_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    prepare(dir)?;
    let args = "train --from base --data text.txt --set train.batch=2 --set train.accumulation=1 --steps 6";
    succeeded(&gd(dir, &format!("{args} --out whole"))?)?;
    // The first loss is that of the model: it has learned the text, and a new one is at ln 256.
    let (trained, tuned) = (steps(&dir.join("base"))?, steps(&dir.join("whole"))?);
    let loss = |step: &Value| step["loss"].as_f64().unwrap_or(f64::NAN);
    let (first, last) = (loss(&trained[0]), loss(&trained[trained.len() - 1]));
    ensure!(loss(&tuned[0]) < (first + last) / 2.0, "{} after {first} to {last}", loss(&tuned[0]));
    for name in ["config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"] {
        ensure!(fs::read(dir.join("base").join(name))? == fs::read(dir.join("whole").join(name))?, "{name}");
    }
    succeeded(&gd(dir, &format!("{args} --out parts --stop-after 3"))?)?;
    // The model that it started with is not needed any more.
    fs::rename(dir.join("base"), dir.join("moved"))?;
    succeeded(&gd(dir, "train --resume parts")?)?;
    for name in ["model.safetensors", "config.json", "chat_template.jinja", "generation_config.json"] {
        ensure!(fs::read(dir.join("whole").join(name))? == fs::read(dir.join("parts").join(name))?, "{name}");
    }
    Ok(())
}

#[test]
fn a_model_of_another_family_stays_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    write_mistral(dir)?;
    let args = "train --from base --data text.txt --set train.batch=1 --set train.accumulation=1 --steps 4";
    succeeded(&gd(dir, &format!("{args} --out whole"))?)?;
    succeeded(&gd(dir, &format!("{args} --out parts --stop-after 2"))?)?;
    succeeded(&gd(dir, "train --resume parts")?)?;
    for name in ["model.safetensors", "config.json"] {
        ensure!(fs::read(dir.join("whole").join(name))? == fs::read(dir.join("parts").join(name))?, "{name}");
    }
    let config = |folder: &str| -> Result<Value> {
        Ok(serde_json::from_str(&fs::read_to_string(dir.join(folder).join("config.json"))?)?)
    };
    ensure!(config("base")? == config("whole")? && config("whole")?["model_type"] == "mistral");
    Ok(())
}

#[test]
fn a_gguf_file_is_trained_on_whole_and_by_an_adapter() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/gguf/q8_0.gguf");
    fs::copy(&file, dir.join("model.gguf")).with_context(|| file.display().to_string())?;
    fs::write(dir.join("text.txt"), &SAMPLE[..5_000])?;
    let loss = |model: &str| -> Result<f64> {
        run_json(dir, &format!("eval {model} --data text.txt --json"))?["loss"].as_f64().context("a loss")
    };
    let args = "train --from model.gguf --data text.txt --set train.batch=2 --set train.accumulation=1 \
                --set train.context=16 --set train.lr.peak=1e-2 --steps 12";
    succeeded(&gd(dir, &format!("{args} --out whole"))?)?;
    succeeded(&gd(dir, &format!("{args} --lora r=4,targets=all-linear --out adapter"))?)?;
    let (before, whole, adapter) = (loss("model.gguf")?, loss("whole")?, loss("adapter")?);
    ensure!(whole < before && adapter < before, "{before} {whole} {adapter}");
    Ok(())
}

#[test]
fn of_chats_the_turns_of_the_assistant_are_learned() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    prepare(dir)?;
    let shown = run_json(dir, "data inspect chats.jsonl --model base --json")?;
    let tokens = shown["shown"][0].as_array().context("tokens")?;
    let learned: String = tokens
        .iter()
        .filter(|token| token["learned"] == true)
        .filter_map(|token| token["text"].as_str())
        .collect();
    ensure!(learned == "A number, 0.;", "{learned:?}");
    let text = succeeded(&gd(dir, "data inspect chats.jsonl --model base")?)?;
    ensure!(text.starts_with("u:What is 0?;a:[[A number, 0.;]]\n---\n"), "{text}");
    let args =
        "train --from base --data chats.jsonl --set train.batch=2 --set train.accumulation=1 --steps 40";
    let args = format!("{args} --set train.lr.peak=3e-3");
    succeeded(&gd(dir, &format!("{args} --out chats"))?)?;
    let logged = steps(&dir.join("chats"))?;
    let loss = |at: usize| logged[at]["loss"].as_f64().unwrap_or(f64::NAN);
    ensure!(loss(39) < loss(0) * 0.7, "{} after {}", loss(39), loss(0));
    // The questions are not learned: the loss of a question stays, that of an answer falls.
    let of = |model: &str| -> Result<(f64, f64)> {
        succeeded(&gd(dir, &format!("eval {model} --data chats.jsonl --per-token losses.jsonl --json"))?)?;
        let (mut question, mut answer) = ((0.0, 0), (0.0, 0));
        for line in fs::read_to_string(dir.join("losses.jsonl"))?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let at = line["position"].as_u64().context("a position")?;
            // "u:What is " and the first characters of the answer after "?;a:".
            let sum = if at < 10 {
                &mut question
            } else if at > 16 {
                &mut answer
            } else {
                continue;
            };
            *sum = (sum.0 + line["loss"].as_f64().context("a loss")?, sum.1 + 1);
        }
        Ok((question.0 / f64::from(question.1), answer.0 / f64::from(answer.1)))
    };
    let (before, after) = (of("base")?, of("chats")?);
    ensure!(after.1 < before.1 * 0.7, "answers: {before:?} {after:?}");
    ensure!(after.0 > before.0 * 0.8, "questions: {before:?} {after:?}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    prepare(dir)?;
    fs::write(
        dir.join("user.jsonl"),
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a long enough text without an answer, of which nothing is learned\"}]}\n",
    )?;
    for (args, code, names) in [
        ("--from none --data text.txt", 1, "none"),
        ("--from base", 2, "--data"),
        ("--from base --data text.txt --resume base", 2, "--resume"),
        ("--from base --data text.txt --set train.context=65", 1, "train.context"),
        ("--from base --data user.jsonl --set train.valid_fraction=0", 1, "no turn of an assistant"),
    ] {
        let message = error(dir, &format!("train {args} --out new"), code)?;
        ensure!(message.contains(names), "{args}: {message}");
        ensure!(!dir.join("new").exists(), "{args} writes a folder");
    }
    fs::remove_file(dir.join("base/chat_template.jinja"))?;
    let message = error(dir, "train --from base --data chats.jsonl --out new", 1)?;
    ensure!(message.contains("chat template"), "{message}");
    Ok(())
}
