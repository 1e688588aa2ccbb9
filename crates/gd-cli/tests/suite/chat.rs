//! `gd chat` with lines from a pipe.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{ChildStdout, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};

use crate::generate::{model_of, models};
use crate::program::{command, failed, parsed, succeeded};

/// Saves a model with random weights, byte tokens and a chat template. The first layer does not select.
fn save(folder: &Path, template: Option<&str>) -> Result<()> {
    save_with(folder, template, 300)
}

/// The same with a context of `positions`.
fn save_with(folder: &Path, template: Option<&str>, positions: usize) -> Result<()> {
    let (model, params) = model_of(models()[3].1.clone(), positions, DType::F32)?;
    let mut loaded = Loaded::new(model, params, Tokenizer::bytes()?);
    if let Some(template) = template {
        loaded.files.insert("chat_template.jinja".into(), template.into());
    }
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    Ok(loaded.save(folder, &card.map(|key| (key, "test".to_owned())))?)
}

const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";

/// Runs `gd chat` with these arguments and lines.
fn chat(dir: &Path, args: &str, lines: &[&str]) -> Result<Output> {
    let mut program = command(dir, &format!("chat model --max-tokens 8 {args}"));
    let mut process = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    process.stdin.take().context("stdin")?.write_all(text.as_bytes())?;
    Ok(process.wait_with_output()?)
}

/// The lines of a chat with `--json`.
fn answers(dir: &Path, args: &str, lines: &[&str]) -> Result<Vec<Value>> {
    let text = succeeded(&chat(dir, &format!("--json {args}"), lines)?)?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[test]
fn turns_continue_each_other_and_read_only_what_is_new() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), Some(TEMPLATE))?;
    let greedy = "--temperature 0";
    let turns = answers(dir, greedy, &["/system Be brief", "Hi", "", "And then?"])?;
    ensure!(turns.len() == 2, "{turns:?}");
    let args = "generate model --chat --json --temperature 0 --max-tokens 8 --prompt Hi --system";
    let alone = parsed(&command(dir, args).arg("Be brief").output()?)?;
    ensure!(turns[0]["text"] == alone["text"] && turns[0]["finish_reason"] == "length", "{turns:?} {alone}");
    let first = turns[0]["prompt_tokens"].as_u64().context("a number")?;
    ensure!(turns[0]["reused_tokens"] == 0 && turns[1]["reused_tokens"].as_u64() >= Some(first), "{turns:?}");
    // The second turn has the tokens that the whole chat gives.
    let (text, a, b) =
        (turns[0]["text"].as_str().unwrap_or_default(), "s:Be brief\nu:Hi\na:", "\nu:And then?\na:");
    let args = "generate model --json --temperature 0 --max-tokens 8 --prompt";
    let whole = parsed(&command(dir, args).arg(format!("{a}{text}{b}")).output()?)?;
    ensure!(whole["text"] == turns[1]["text"], "{whole} {turns:?}");
    // Without --json, the answers alone.
    let shown = succeeded(&chat(dir, greedy, &["/system Be brief", "Hi"])?)?;
    ensure!(shown == format!("{text}\n"), "{shown:?}");
    Ok(())
}

#[test]
fn commands_save_load_reset_and_set() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), Some(TEMPLATE))?;
    let lines = [
        "/set temperature=0",
        "/system S",
        "Hi",
        "/save c.json",
        "/reset",
        "/load c.json",
        "More",
        "/reset",
        "Hi",
    ];
    let turns: Vec<Value> =
        answers(dir, "", &lines)?.into_iter().filter(|line| line.get("text").is_some()).collect();
    ensure!(turns.len() == 3 && turns[0]["text"] == turns[2]["text"], "{turns:?}");
    ensure!(turns[1]["prompt_tokens"].as_u64() > turns[0]["prompt_tokens"].as_u64(), "{turns:?}");
    let saved: Value = serde_json::from_str(&fs::read_to_string(dir.join("c.json"))?)?;
    let expected = json!({ "messages": [
        { "role": "system", "content": "S" },
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": turns[0]["text"] },
    ] });
    ensure!(saved == expected, "{saved}");
    let shown =
        succeeded(&chat(dir, "--seed 3", &["/set top_k=5", "/set top_k=none", "/set", "/quit", "Hi"])?)?;
    let settings =
        "temperature=0.8 top_k=none top_p=0.95 min_p=none repetition_penalty=1 max_tokens=8 seed=3\n";
    ensure!(shown == settings, "{shown:?}");
    let shown = succeeded(&chat(dir, "--temperature 0", &["Hi", "/trace"])?)?;
    ensure!(shown.contains("read by most heads") && shown.contains(" x"), "{shown}");
    Ok(())
}

/// What a program shows, up to this text.
fn read_to(screen: &mut impl Read, text: &str) -> Result<String> {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(text.as_bytes()) {
        ensure!(screen.read(&mut byte)? == 1, "no {text:?} in {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&seen).into_owned())
}

/// `script` gives the program a terminal. Keys are sent when what is before them is on the screen.
#[test]
fn in_a_terminal_lines_are_edited_and_ctrl_c_stops_an_answer_and_not_the_chat() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save_with(&dir.join("model"), Some(TEMPLATE), 100_000)?;
    // Without exec, a shell that waits for the program (dash) ends by the Ctrl-C that it got meanwhile, too.
    let line = format!("exec '{}' chat model --temperature 0 --history h", env!("CARGO_BIN_EXE_gd"));
    let mut script = Command::new("timeout");
    script.args(["120", "script", "-qfec", &line, "/dev/null"]).current_dir(dir).env("TERM", "xterm");
    let mut process = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut keys = process.stdin.take().context("stdin")?;
    let screen = &mut process.stdout.take().context("stdout")?;
    // Keys that are sent when the program waits for a line: it takes nothing that is typed before.
    let mut send = |screen: &mut ChildStdout, after: &str, line: &[u8]| -> Result<()> {
        read_to(screen, after)?;
        Ok(keys.write_all(line)?)
    };
    let prompt = "> \r\x1b[2C";
    // Two letters too many are removed; a digit is written before the last one.
    send(screen, prompt, b"/set max_tokens=9xy\x7f\x7f\r")?;
    send(screen, prompt, b"/set\r")?;
    read_to(screen, "max_tokens=9 seed=")?;
    send(screen, prompt, b"/set max_tokens=9000\x1b[D5\r")?;
    send(screen, prompt, b"/set\r")?;
    read_to(screen, "max_tokens=90050 seed=")?;
    send(screen, prompt, b"Hi\r")?;
    read_to(screen, "\n")?;
    // The answer has begun, and would have 90,050 tokens.
    screen.read_exact(&mut [0; 40])?;
    send(screen, "", b"\x03")?;
    send(screen, prompt, b"/set\r")?;
    read_to(screen, "max_tokens=90050 seed=")?;
    // At the prompt, Ctrl-C ends nothing either, and an arrow key gives an earlier line.
    send(screen, prompt, b"\x03")?;
    read_to(screen, "ends the chat")?;
    send(screen, prompt, b"/set max_tokens=3\r")?;
    send(screen, prompt, b"\x1b[A\x1b[A\x1b[A\r")?;
    read_to(screen, "Hi")?;
    send(screen, prompt, b"/quit\r")?;
    std::io::copy(screen, &mut std::io::sink())?;
    let status = process.wait()?;
    ensure!(status.success(), "{status}");
    let history = fs::read_to_string(dir.join("h"))?;
    let last: Vec<&str> = history.lines().rev().take(3).collect();
    ensure!(last == ["/quit", "Hi", "/set max_tokens=3"], "{history:?}");
    Ok(())
}

#[test]
fn mistakes_are_errors_that_name_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), Some(TEMPLATE))?;
    fs::write(dir.join("bad.json"), "{\"messages\": 3}")?;
    for (line, names) in [
        ("/sistem", "there is no command /sistem"),
        ("/load none.json", "none.json"),
        ("/load bad.json", "bad.json"),
        ("/set temperature=-1", "temperature must be"),
        ("/set warmth=1", "warmth"),
        ("/set top_k=x", "/set top_k=x"),
        ("/trace", "no answer"),
        (&"long ".repeat(100), "the context of 300"),
    ] {
        let error = failed(&chat(dir, "", &[line])?, 1)?;
        ensure!(error.contains(names), "{line}: {error}");
        // With --json, the chat goes on.
        let lines = answers(dir, "", &[line, "Hi"])?;
        ensure!(
            lines.len() == 2 && lines[0]["error"].is_string() && lines[1]["text"].is_string(),
            "{lines:?}"
        );
    }
    save(&dir.join("model"), None)?;
    let error = failed(&chat(dir, "", &["Hi"])?, 2)?;
    ensure!(error.contains("model has no chat template"), "{error}");
    Ok(())
}
