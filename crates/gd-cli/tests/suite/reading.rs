//! What the commands read as text: formats, standard input, chats, bad lines and the summary of the data.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

use anyhow::{Context, Result, ensure};
use gd_testing::log_cases;
use serde_json::{Value, json};

use crate::program::{SAMPLE, SMALL, command, error, failed, gd, json as parsed_json, parsed, succeeded};

/// A folder with the small configuration and a model of it that was trained for a step.
fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("small.json"), SMALL)?;
    fs::write(dir.path().join("text.txt"), SAMPLE.chars().take(6000).collect::<String>())?;
    succeeded(&gd(dir.path(), "train --config small.json --data text.txt --steps 1 --out model")?)?;
    Ok(dir)
}

/// Runs the program with this standard input.
fn with_stdin(dir: &Path, args: &str, input: &[u8]) -> Result<Output> {
    let mut program = command(dir, args);
    let mut child = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // A program that ends before it has read everything closes the pipe.
    let _ = child.stdin.take().context("no stdin")?.write_all(input);
    Ok(child.wait_with_output()?)
}

fn loss(result: &Value) -> Result<f64> {
    result["loss"].as_f64().with_context(|| format!("no loss: {result}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_same_text_has_the_same_loss_in_every_form() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let records: Vec<Value> = SAMPLE.split("\n\n").take(30).map(|text| json!({ "text": text })).collect();
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    let eval = "eval model --context 32 --json --data";
    fs::write(dir.join("a.jsonl"), &lines)?;
    let expected = parsed_json(dir, &format!("{eval} a.jsonl"))?;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(lines.as_bytes())?;
    let gzip = gzip.finish()?;
    let array = serde_json::to_vec_pretty(&records)?;
    let files: [(&str, Vec<u8>); 5] = [
        ("mark.jsonl", format!("\u{feff}{lines}").into_bytes()),
        ("array.json", array.clone()),
        ("lines.json", lines.clone().into_bytes()),
        ("a.jsonl.gz", gzip.clone()),
        ("a.jsonl.zst", zstd::encode_all(lines.as_bytes(), 1)?),
    ];
    let mut cases = 0;
    for (name, content) in &files {
        fs::write(dir.join(name), content)?;
        assert_eq!(parsed_json(dir, &format!("{eval} {name}"))?, expected, "{name}");
        cases += 1;
    }
    for (name, content) in [("lines", lines.as_bytes()), ("array", &array), ("gzip", &gzip)] {
        assert_eq!(parsed(&with_stdin(dir, &format!("{eval} -"), content)?)?, expected, "{name}");
        cases += 1;
    }
    let text = fs::read_to_string(dir.join("text.txt"))?;
    let expected = parsed_json(dir, &format!("{eval} text.txt"))?;
    let marked = format!("\u{feff}{text}");
    assert_eq!(parsed(&with_stdin(dir, &format!("{eval} -"), marked.as_bytes())?)?, expected);
    log_cases("reading", cases);
    // The result says what bits per byte count.
    assert_eq!(expected["text_tokens"].as_u64(), Some(text.len() as u64 - 1));
    let line = succeeded(&gd(dir, "eval model --context 32 --data text.txt")?)?;
    ensure!(
        line.contains(&format!("{} text tokens over {} bytes", text.len() - 1, text.len() - 1)),
        "{line}"
    );
    Ok(())
}

#[test]
fn training_reads_standard_input_and_resumes_with_it() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let text = fs::read(dir.join("text.txt"))?;
    let train = "train --config small.json --seed 3 --json --steps 6";
    let whole = parsed_json(dir, &format!("{train} --data text.txt --out a"))?;
    let piped = format!("{train} --data - --stop-after 3 --out b");
    parsed(&with_stdin(dir, &piped, &text)?)?;
    let message = error(dir, "train --resume b", 2)?;
    ensure!(message.contains("standard input") && message.contains("--data -"), "{message}");
    let resumed = parsed(&with_stdin(dir, "train --resume b --data - --json", &text)?)?;
    assert_eq!(loss(&resumed)?, loss(&whole)?);
    // The tokenizer is learned from the same text that is tokenized then.
    let made = parsed(&with_stdin(dir, "data prepare --data - --tokenizer bpe:300 --out c --json", &text)?)?;
    assert_eq!(made["index"]["vocab_size"], 300);
    Ok(())
}

#[test]
fn separators_keep_their_white_space() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let mails: String = (0..50).map(|i| format!("mail {i}\n--\nname\n-- \n")).collect();
    fs::create_dir(dir.join("mails"))?;
    fs::write(dir.join("mails/0.txt"), &mails)?;
    fs::write(dir.join("mails/1.txt"), &mails)?;
    for (separator, documents, out) in [("-- ", 100, "a"), ("--", 200, "b")] {
        let output = command(dir, "data prepare --data mails --json --out")
            .args([out, "--separator", separator])
            .output()?;
        let index = &parsed(&output)?["index"];
        let count = |part: &str| index[part]["documents"].as_u64().unwrap_or(0);
        assert_eq!(count("train") + count("valid"), documents, "{separator:?}");
    }
    // A separator that is no line is said.
    let output = gd(dir, "data prepare --data mails --out c --separator ***")?;
    succeeded(&output)?;
    ensure!(
        stderr(&output).contains("no line of the text files is the separator \"***\""),
        "{}",
        stderr(&output)
    );
    let output = command(dir, "data prepare --data mails --out d --separator").arg("a\nb").output()?;
    let message = failed(&output, 1)?;
    ensure!(message.contains("train.documents.separator must be a single line"), "{message}");
    Ok(())
}

#[test]
fn bad_lines_are_capped_counted_and_left_out_on_demand() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let bad: String = (0..20_000).map(|i| format!("{{\"id\": {i}, \"body\": \"line {i}\"}}\n")).collect();
    fs::write(dir.join("bad.jsonl"), &bad)?;
    let output = gd(dir, "eval model --data bad.jsonl")?;
    let message = failed(&output, 1)?;
    for part in [
        "bad.jsonl:1: no field \"text\"; the record has \"body\", \"id\"",
        "20000 bad lines",
        "--text-field",
        "--skip-bad-lines",
    ] {
        ensure!(message.contains(part), "{part}: {message}");
    }
    ensure!(stderr(&output).lines().count() < 12, "{}", stderr(&output));
    parsed_json(dir, "eval model --data bad.jsonl --text-field body --json")?;
    let good: String = (0..200).map(|i| format!("{{\"text\": \"a good line {i}\"}}\n")).collect();
    fs::write(dir.join("mixed.jsonl"), good + &bad)?;
    let train = "train --config small.json --data mixed.jsonl --steps 2 --out run";
    error(dir, train, 1)?;
    let output = gd(dir, &format!("{train} --skip-bad-lines"))?;
    succeeded(&output)?;
    let text = stderr(&output);
    ensure!(text.contains("1 file, 200 documents, ") && text.contains("left out: 20000 bad lines"), "{text}");
    // The run keeps the setting, so that it can be resumed.
    succeeded(&gd(dir, "train --resume run")?)?;
    Ok(())
}

#[test]
fn chats_are_read_with_the_template_of_the_model() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }, { "role": "assistant", "content": "yo" }] });
    fs::write(dir.join("chats.jsonl"), format!("{chat}\n").repeat(40))?;
    let rendered = json!({ "text": "[user]hi[assistant]yo" });
    fs::write(dir.join("texts.jsonl"), format!("{rendered}\n").repeat(40))?;
    for args in ["eval model --data chats.jsonl", "train --config small.json --data chats.jsonl --out x"] {
        let message = error(dir, args, 1)?;
        ensure!(
            message.contains("chats.jsonl:1: the record is a chat") && message.contains("chat template"),
            "{message}"
        );
    }
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}";
    fs::write(dir.join("model/chat_template.jinja"), template)?;
    let eval = |file: &str| parsed_json(dir, &format!("eval model --json --data {file}"));
    assert_eq!(eval("chats.jsonl")?, eval("texts.jsonl")?);
    // Prepared data is made with the template beside the tokenizer, named by its file or folder.
    let prepare = "data prepare --valid-fraction 0 --json --data";
    let expected = parsed_json(dir, &format!("{prepare} texts.jsonl --out texts"))?;
    for tokenizer in ["model/tokenizer.json", "model"] {
        let out = tokenizer.replace('/', "-");
        let made =
            parsed_json(dir, &format!("{prepare} chats.jsonl --tokenizer {tokenizer} --out data-{out}"))?;
        assert_eq!(made["index"]["train"], expected["index"]["train"], "{tokenizer}");
    }
    Ok(())
}

#[test]
fn a_dry_run_shows_the_data_and_fails_where_training_would() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    fs::write(dir.join("empty.txt"), "")?;
    fs::write(dir.join("short.txt"), "a short text\n")?;
    fs::create_dir(dir.join("other"))?;
    fs::write(dir.join("other/mine.txt"), "x")?;
    let dry = "train --dry-run --config small.json";
    let plan = parsed_json(dir, &format!("{dry} --data text.txt empty.txt --json"))?;
    let data = &plan["data"];
    let bytes = fs::metadata(dir.join("text.txt"))?.len();
    assert_eq!((&data["files"], &data["documents"], &data["empty_files"]), (&json!(2), &json!(1), &json!(1)));
    assert_eq!(data["bytes"], bytes);
    let tokens = |part: &str| data[part]["tokens"].as_u64().unwrap_or(0);
    assert_eq!(tokens("train") + tokens("valid"), bytes);
    let text = succeeded(&gd(dir, &format!("{dry} --data text.txt empty.txt --set model.vocab_size=300"))?)?;
    for part in [
        "data: 2 files, 1 document, ",
        "left out: 1 empty file",
        " tokens in 1 document; validation: ",
        "vocabulary: 256 tokens, as the tokenizer has; model.vocab_size is 300",
    ] {
        ensure!(text.contains(part), "{part}: {text}");
    }
    let before = fs::read_dir(dir)?.count();
    for (args, code) in [
        ("--data short.txt", 1),
        ("--data empty.txt", 1),
        ("--data text.txt --set train.context=99", 1),
        ("--data text.txt --set model.gd.select.candidates=3", 1),
        ("--data text.txt --out other", 1),
    ] {
        let (dry, real) = (
            error(dir, &format!("{dry} {args}"), code)?,
            error(dir, &format!("train --config small.json {args}"), code)?,
        );
        assert_eq!(dry, real, "{args}");
    }
    let message = error(dir, &format!("{dry} --data text.txt --out text.txt/x"), 1)?;
    ensure!(message.contains("text.txt: cannot write"), "{message}");
    assert_eq!(fs::read_dir(dir)?.count(), before);
    Ok(())
}
