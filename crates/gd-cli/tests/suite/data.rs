//! `gd data`, and training on prepared data.

use std::fs;

use anyhow::Result;

use crate::program::{SAMPLE, SMALL, gd, json};

/// A folder with the small configuration and the first paragraphs of the sample text, as JSONL and as text with
/// separators.
fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let paragraphs: Vec<&str> = SAMPLE.split("\n\n").filter(|p| p.len() > 20).take(120).collect();
    let line = |p: &&str| format!("{}\n", serde_json::json!({ "id": 1, "body": p }));
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("lines.jsonl"), paragraphs.iter().map(line).collect::<String>())?;
    fs::write(dir.path().join("text.txt"), paragraphs.join("\n---\n"))?;
    Ok(dir)
}

const LINES: &str = "--data lines.jsonl --text-field body";

#[test]
fn training_on_prepared_data_equals_training_on_its_text() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let made = json(
        dir,
        &format!("data prepare {LINES} --valid-fraction 0.1 --shard-tokens 900 --out data --json"),
    )?;
    let index = &made["index"];
    assert_eq!(
        index["train"]["documents"].as_u64().unwrap() + index["valid"]["documents"].as_u64().unwrap(),
        120
    );
    assert!(index["train"]["shards"].as_array().unwrap().len() > 5, "{made}");
    assert_eq!(json(dir, "data inspect data --json")?["index"], *index);
    let train = "train --config small.json --seed 3 --json";
    let shards = json(dir, &format!("{train} --data data --out a"))?;
    let text = json(dir, &format!("{train} {LINES} --out b"))?;
    for key in ["loss", "tokens", "bits_per_byte", "sample"] {
        assert_eq!(shards[key], text[key], "{key}");
    }
    let loss = json(dir, "eval a --data data --context 32 --json")?;
    assert_eq!(loss["loss"], shards["loss"]);
    // The separators of the text give the same documents.
    let documents = json(dir, "eval a --data text.txt --separator --- --context 32 --json")?;
    let lines = json(dir, &format!("eval a {LINES} --context 32 --json"))?;
    assert!((documents["loss"].as_f64().unwrap() - lines["loss"].as_f64().unwrap()).abs() < 0.1);
    Ok(())
}

#[test]
fn a_trained_vocabulary_is_copied_from_the_data_to_the_model() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let made = json(dir, &format!("data prepare {LINES} --tokenizer bpe:400 --out data --json"))?;
    assert_eq!(made["index"]["vocab_size"], 400);
    json(dir, "train --config small.json --data data --steps 3 --out model --json")?;
    json(dir, "eval model --data data --json")?;
    for file in ["data", "model"] {
        assert!(dir.join(file).join("tokenizer.json").is_file());
    }
    let again = format!("data prepare {LINES} --tokenizer model/tokenizer.json --out again --json");
    assert_eq!(json(dir, &again)?["index"], made["index"]);
    // Data with another tokenizer is an error.
    json(dir, &format!("data prepare {LINES} --out bytes --json"))?;
    let output = gd(dir, "eval model --data bytes --json")?;
    let error = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("bytes: prepared with another tokenizer than the model's"), "{error}");
    Ok(())
}

#[test]
fn invalid_data_is_an_error_and_writes_nothing() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    json(dir, &format!("data prepare {LINES} --out good --json"))?;
    json(dir, &format!("data prepare {LINES} --out cut --json"))?;
    let shard = dir.join("cut/train-00000.tokens");
    let bytes = fs::read(&shard)?;
    fs::write(&shard, &bytes[..bytes.len() - 1])?;
    let before = fs::read_dir(dir)?.count();
    let prepare = |flags: &str| format!("data prepare --out new {flags}");
    let train = |flags: &str| format!("train --config small.json --out new {flags}");
    for (args, code, words) in [
        (prepare("--data nowhere.txt"), 1, &["nowhere.txt: no such"][..]),
        (prepare("--data lines.jsonl"), 1, &["lines.jsonl:1: no field \"text\"", "120 bad lines"]),
        (prepare("--data text.txt --tokenizer bpe:many"), 2, &["bpe:many"]),
        (prepare("--data text.txt --tokenizer bpe:256"), 1, &["not 256"]),
        (prepare("--data text.txt --tokenizer small.json"), 1, &["small.json", "tokenizer.json"]),
        (prepare("--data text.txt --valid-fraction 1"), 2, &["--valid-fraction 1"]),
        (prepare("--data text.txt --shard-tokens 0"), 2, &["--shard-tokens"]),
        (format!("data prepare {LINES} --out cut"), 1, &["cut: exists"]),
        ("data inspect cut".into(), 1, &["cut/train-00000.tokens: truncated"]),
        ("data inspect .".into(), 1, &["index.json: no such"]),
        (train("--data cut"), 1, &["cut/train-00000.tokens: truncated"]),
        (train("--data good text.txt"), 2, &["good is prepared data"]),
        (train("--data lines.jsonl"), 1, &["lines.jsonl:1: no field"]),
    ] {
        let output = gd(dir, &args)?;
        let error = String::from_utf8(output.stderr)?;
        let last = error.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(code), "gd {args}: {error}");
        assert!(last.starts_with("error: ") && words.iter().all(|w| last.contains(w)), "gd {args}: {error}");
        assert!(output.stdout.is_empty(), "gd {args}");
        assert_eq!(fs::read_dir(dir)?.count(), before, "gd {args} wrote a file");
    }
    Ok(())
}
