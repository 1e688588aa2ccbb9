//! Every command on the pages about fine-tuning, chatting and serving runs, in the order of the page.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::Loaded;
use gd_tests::repository::commands;

use crate::generate::{model_of, models};
use crate::program::{SAMPLE, succeeded, write_chats};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";

/// What stands for the files that the pages name.
fn prepare(dir: &Path) -> Result<()> {
    let (model, params) = model_of(models()[3].1.clone(), 300, DType::F32)?;
    let mut loaded = Loaded::new(model, params, Tokenizer::bytes()?);
    loaded.files.insert("chat_template.jinja".into(), TEMPLATE.into());
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let cached = "hf/hub/models--HuggingFaceTB--SmolLM2-135M";
    fs::create_dir_all(dir.join(cached).join("refs"))?;
    fs::write(dir.join(cached).join("refs/main"), "1f")?;
    fs::create_dir_all(dir.join(cached).join("snapshots"))?;
    fs::create_dir(dir.join("out"))?;
    for folder in ["MODEL", "out/book", &format!("{cached}/snapshots/1f")] {
        loaded.save(&dir.join(folder), &card.map(|key| (key, "test".to_owned())))?;
    }
    let quantised = "hf/hub/models--ORG--NAME";
    fs::create_dir_all(dir.join(quantised).join("refs"))?;
    fs::write(dir.join(quantised).join("refs/main"), "2e")?;
    fs::create_dir_all(dir.join(quantised).join("snapshots/2e"))?;
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/gguf/q8_0.gguf");
    fs::copy(&gguf, dir.join(quantised).join("snapshots/2e/model-q8_0.gguf"))
        .with_context(|| gguf.display().to_string())?;
    write_chats(dir)?;
    fs::write(dir.join("more.txt"), &SAMPLE[..5_000])?;
    Ok(fs::write(dir.join("key.txt"), "secret\n")?)
}

/// The arguments with fewer steps and tokens, and a free port.
fn shortened(words: &[String]) -> Vec<String> {
    let mut words = words.to_vec();
    for (flag, value) in [("--steps", "2"), ("--port", "0")] {
        if let Some(at) = words.iter().position(|word| word == flag) {
            words[at + 1] = value.into();
        }
    }
    let more = match words.first().map(String::as_str) {
        Some("train") if words.iter().any(|word| word == "--steps" || word == "--dry-run") => vec![],
        Some("train") => vec!["--steps", "2"],
        Some("generate" | "chat") => vec!["--max-tokens", "4"],
        Some("serve") if !words.iter().any(|word| word == "--port") => vec!["--port", "0"],
        _ => vec![],
    };
    if words[0] == "train" {
        let settings = ["train.batch=1", "train.accumulation=1", "train.context=32", "train.lr.warmup=0"];
        words.extend(settings.iter().flat_map(|setting| ["--set".into(), (*setting).into()]));
    }
    words.extend(more.into_iter().map(str::to_owned));
    words
}

fn run(dir: &Path, words: &[String]) -> Result<()> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    program.args(words).current_dir(dir).env("HF_HOME", dir.join("hf")).env("HF_HUB_OFFLINE", "1");
    program.env_remove("HF_HUB_CACHE").env_remove("GD_API_KEY");
    let mut process = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = process.stdin.take().context("stdin")?;
    if words[0] == "serve" {
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("stdout")?).read_line(&mut line)?;
        ensure!(line.contains("http://"), "it says {line:?}");
        let pid = process.id().to_string();
        ensure!(Command::new("kill").args(["-TERM", &pid]).status()?.success(), "kill");
        return succeeded(&process.wait_with_output()?).map(drop);
    }
    if words[0] == "chat" {
        writeln!(stdin, "Who are you?")?;
    }
    drop(stdin);
    succeeded(&process.wait_with_output()?).map(drop)
}

#[test]
fn every_command_of_the_guides_runs() -> Result<()> {
    for (name, page, expected) in [
        ("fine-tuning.md", include_str!("../../../../docs/src/fine-tuning.md"), 10),
        ("chatting.md", include_str!("../../../../docs/src/chatting.md"), 3),
        ("serving.md", include_str!("../../../../docs/src/serving.md"), 2),
    ] {
        let folder = tempfile::tempdir()?;
        prepare(folder.path())?;
        let mut count = 0;
        for command in commands(name, page) {
            match command.words[0].as_str() {
                "gd" => {}
                // It is run by hand, because it fetches the data of its tasks.
                "echo" | "scripts/bench/lm_eval.sh" => continue,
                other => bail!("{name}:{}: {other} is not run here", command.line),
            }
            let words = shortened(&command.words[1..]);
            run(folder.path(), &words)
                .with_context(|| format!("{name}:{}: {}", command.line, words.join(" ")))?;
            count += 1;
        }
        ensure!(count >= expected, "{name}: only {count} commands found");
    }
    Ok(())
}
