//! Calls of the program by tests. The arguments are separated by spaces; `dir` is the working directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// The configuration of a model that trains in a second.
pub(crate) const SMALL: &str = include_str!("../../../gd-model/tests/fixtures/small.json");
/// The text that ships with the repository.
pub(crate) const SAMPLE: &str = include_str!("../../text/sample.txt");

/// The words of a command line. The path of the repository may contain spaces.
pub(crate) fn words(args: &str) -> Vec<String> {
    const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");
    let without_spaces = args.replace(REPOSITORY, "\0");
    without_spaces.split_whitespace().map(|word| word.replace('\0', REPOSITORY)).collect()
}

/// The checkpoint of another family among the fixtures.
pub(crate) fn mistral() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama/mistral")
}

/// Writes a text and the checkpoint of another family, `base`.
pub(crate) fn write_mistral(dir: &Path) -> Result<()> {
    fs::create_dir(dir.join("base"))?;
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let content = fs::read(mistral().join(name)).with_context(|| name.to_owned())?;
        fs::write(dir.join("base").join(name), content)?;
    }
    Ok(fs::write(dir.join("text.txt"), &SAMPLE[..20_000])?)
}

/// Writes a text and trains the small model on it, `base`.
pub(crate) fn train_small(dir: &Path) -> Result<()> {
    fs::write(dir.join("small.json"), SMALL)?;
    fs::write(dir.join("text.txt"), &SAMPLE[..20_000])?;
    succeeded(&gd(dir, "train --config small.json --data text.txt --steps 8 --out base")?)?;
    Ok(())
}

/// Writes chats of a question and an answer, `chats.jsonl`.
pub(crate) fn write_chats(dir: &Path) -> Result<()> {
    let chat = |at: usize| {
        let messages = json!([
            { "role": "user", "content": format!("What is {at}?") },
            { "role": "assistant", "content": format!("A number, {}.", at * 7) },
        ]);
        format!("{}\n", json!({ "messages": messages }))
    };
    Ok(fs::write(dir.join("chats.jsonl"), (0..60).map(chat).collect::<String>())?)
}

pub(crate) fn command(dir: &Path, args: &str) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    program.args(words(args)).current_dir(dir);
    program
}

pub(crate) fn gd(dir: &Path, args: &str) -> Result<Output> {
    Ok(command(dir, args).output()?)
}

/// The stdout of a call that must have succeeded.
pub(crate) fn succeeded(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// The stdout of a call that must have succeeded, as JSON.
pub(crate) fn parsed(output: &Output) -> Result<Value> {
    Ok(serde_json::from_str(&succeeded(output)?)?)
}

/// The last line of stderr of a call that must have failed with this exit code.
pub(crate) fn failed(output: &Output, code: i32) -> Result<String> {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{:?}: {text}", output.status);
    Ok(text.lines().last().unwrap_or_default().to_owned())
}

/// Runs a call that must succeed and returns its stdout as JSON.
pub(crate) fn json(dir: &Path, args: &str) -> Result<Value> {
    parsed(&gd(dir, args)?)
}

/// Runs a call that must fail with this exit code and returns the last line of its stderr.
pub(crate) fn error(dir: &Path, args: &str, code: i32) -> Result<String> {
    failed(&gd(dir, args)?, code)
}
