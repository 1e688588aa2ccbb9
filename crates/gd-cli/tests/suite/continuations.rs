//! `gd generate` on models whose continuation is given: every token has one successor.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::log_cases;
use serde_json::{Value, json};

/// Writes a model of `vocab` tokens with one layer that adds nothing, so that `next` are the pairs of a token and its
/// successor. Any other token is followed by token 0.
fn write_model(
    folder: &Path,
    tokenizer: &Value,
    vocab: usize,
    next: &[(u32, u32)],
    more: Value,
) -> Result<()> {
    let width = vocab + vocab % 2;
    let mut config = json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    for (key, value) in more.as_object().context("an object")? {
        config[key] = value.clone();
    }
    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), config.to_string())?;
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string())?;
    let (mut embedding, mut head) = (vec![0f32; vocab * width], vec![0f32; vocab * width]);
    for token in 0..vocab {
        let successor =
            next.iter().find(|(from, _)| *from as usize == token).map_or(0, |(_, to)| *to as usize);
        embedding[token * width + token] = 1.0;
        head[successor * width + token] = 1.0;
    }
    let matrix = |values: Vec<f32>| Tensor::from_vec(values, (vocab, width), &Device::Cpu);
    let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
    let ones = || Tensor::ones(width, DType::F32, &Device::Cpu);
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let tensors = HashMap::from([
        ("model.embed_tokens.weight".to_owned(), matrix(embedding)?),
        ("lm_head.weight".to_owned(), matrix(head)?),
        ("model.norm.weight".to_owned(), ones()?),
        (layer("input_layernorm"), ones()?),
        (layer("post_attention_layernorm"), ones()?),
        (layer("self_attn.q_proj"), zeros(16, width)?),
        (layer("self_attn.k_proj"), zeros(16, width)?),
        (layer("self_attn.v_proj"), zeros(16, width)?),
        (layer("self_attn.o_proj"), zeros(width, 16)?),
        (layer("mlp.gate_proj"), zeros(8, width)?),
        (layer("mlp.up_proj"), zeros(8, width)?),
        (layer("mlp.down_proj"), zeros(width, 8)?),
    ]);
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

fn special(id: usize, name: &str) -> Value {
    json!({
        "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    })
}

/// The bytes, with special tokens after them.
fn byte_tokenizer(names: &[&str]) -> Result<Value> {
    let mut file: Value = serde_json::from_str(&Tokenizer::bytes()?.to_json()?)?;
    file["added_tokens"] = names.iter().enumerate().map(|(at, name)| special(256 + at, name)).collect();
    Ok(file)
}

/// Words with `▁` for the space before them. With `begin`, a text starts with the begin token.
fn word_tokenizer(begin: bool) -> Value {
    let words = ["<unk>", "<s>", "</s>", "▁Once", "▁upon", "▁a", "▁time"];
    let vocab: Value = words.iter().enumerate().map(|(id, word)| ((*word).to_owned(), json!(id))).collect();
    let spaces = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let first = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let processor = json!({
        "type": "TemplateProcessing", "single": [first, text], "pair": [first, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": spaces, "post_processor": if begin { processor } else { Value::Null },
        "decoder": spaces, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

/// The successors of a text of which each byte follows the one before it.
fn chain(text: &str) -> Vec<(u32, u32)> {
    let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
    bytes.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

struct Output {
    code: i32,
    out: String,
    err: String,
}

/// Runs `gd generate` greedily with a text on stdin.
fn run_with(dir: &Path, args: &[&str], stdin: &[u8]) -> Result<Output> {
    let mut program = Command::new(env!("CARGO_BIN_EXE_gd"));
    program.args(["generate", "model", "--temperature", "0"]).args(args).current_dir(dir);
    program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = program.spawn()?;
    child.stdin.take().context("stdin")?.write_all(stdin)?;
    let output = child.wait_with_output()?;
    let code = output.status.code().context("an exit code")?;
    Ok(Output { code, out: String::from_utf8(output.stdout)?, err: String::from_utf8(output.stderr)? })
}

fn run(dir: &Path, args: &[&str]) -> Result<Output> {
    run_with(dir, args, b"")
}

/// The stdout of a call that succeeds.
fn printed(dir: &Path, args: &[&str]) -> Result<String> {
    let Output { code, out, err } = run(dir, args)?;
    ensure!(code == 0, "{args:?}: {err}");
    Ok(out)
}

/// The lines of stdout of a call with `--json`.
fn lines(dir: &Path, args: &[&str], code: i32) -> Result<Vec<Value>> {
    let output = run(dir, &[args, &["--json"]].concat())?;
    ensure!(output.code == code, "{args:?}: {}", output.err);
    output.out.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[test]
fn a_continuation_has_the_space_before_its_first_word() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let next = [(1, 3), (3, 4), (4, 5), (5, 6), (6, 2)];
    for begin in [false, true] {
        write_model(
            &folder.path().join("model"),
            &word_tokenizer(begin),
            7,
            &next,
            json!({"eos_token_id": 2}),
        )?;
        let text = printed(folder.path(), &["--prompt", "Once"])?;
        ensure!(text == "Once upon a time\n", "{text:?}");
        let line = lines(folder.path(), &["--prompt", "Once", "--prompt", "Once upon"], 0)?;
        ensure!(line[0]["text"] == " upon a time" && line[1]["text"] == " a time", "{line:?}");
        ensure!(line[0]["finish_reason"] == "eos" && line[0]["stopped"] == false, "{line:?}");
    }
    // An empty prompt starts from the begin token, where it is named.
    let text = printed(folder.path(), &["--prompt", ""])?;
    ensure!(text == "Once upon a time\n", "{text:?}");
    let model = folder.path().join("model");
    write_model(&model, &word_tokenizer(false), 7, &next, json!({"eos_token_id": 2, "bos_token_id": 1}))?;
    ensure!(printed(folder.path(), &["--prompt", ""])? == "Once upon a time\n");
    write_model(&model, &word_tokenizer(false), 7, &next, json!({"eos_token_id": 2}))?;
    let output = run(folder.path(), &["--prompt", ""])?;
    ensure!(
        output.code == 1 && output.err.contains("no begin token") && output.out.is_empty(),
        "{}",
        output.err
    );
    fs::write(model.join("tokenizer_config.json"), r#"{"bos_token": {"content": "<s>"}}"#)?;
    ensure!(printed(folder.path(), &["--prompt", ""])? == "Once upon a time\n");
    Ok(())
}

#[test]
fn generation_ends_for_a_reason() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let tokenizer = byte_tokenizer(&["<|endoftext|>", "<|im_end|>", "<|other|>"])?;
    let next = [chain("abc"), vec![(99, 257), (257, 100), (100, 256)], chain("xyzw-")].concat();
    write_model(&dir.join("model"), &tokenizer, 260, &next, json!({"eos_token_id": 256}))?;
    let mut cases = 0;
    for (args, text, reason) in [
        (&[][..], "bcd", "eos"),
        (&["--stop", "<|im_end|>"], "bc", "stop"),
        (&["--stop", "c<|im_end|>"], "b", "stop"),
        (&["--stop", "<|im_end|>d"], "bc", "stop"),
        (&["--stop", "<|im_end|>x"], "bcd", "eos"),
        (&["--stop", "<|other|>", "--stop", "cd"], "b", "stop"),
        (&["--stop", "<|endoftext|>"], "bcd", "stop"),
        (&["--stop", "im_end"], "bcd", "eos"),
        (&["--max-tokens", "2"], "bc", "length"),
        (&["--max-tokens", "0"], "", "length"),
        (&["--stop", "c", "--max-tokens", "2"], "b", "stop"),
    ] {
        let line = &lines(dir, &[&["--prompt", "a"], args].concat(), 0)?[0];
        ensure!(line["text"] == text && line["finish_reason"] == reason, "{args:?}: {line}");
        ensure!(line["stopped"] == (reason == "stop"), "{args:?}: {line}");
        ensure!(printed(dir, &[&["--prompt", "a"], args].concat())? == format!("a{text}\n"), "{args:?}");
        cases += 1;
    }
    // The last position of the model ends a text, too.
    let line = &lines(dir, &["--prompt", "q"], 0)?[0];
    ensure!(line["finish_reason"] == "length" && line["tokens"] == 32, "{line}");
    // Text that begins with a hyphen.
    ensure!(lines(dir, &["--prompt", "- x", "--max-tokens", "1"], 0)?[0]["prompt"] == "- x");
    ensure!(lines(dir, &["--prompt", "--x", "--stop", "-", "--max-tokens", "9"], 0)?[0]["text"] == "yzw");
    ensure!(lines(dir, &["--prompt", "x", "--stop", "w-"], 0)?[0]["text"] == "yz");
    ensure!(
        lines(dir, &["--prompt", "x", "--stop=---", "--stop", "---", "--max-tokens", "2"], 0)?[0]["text"]
            == "yz"
    );
    log_cases("finish-reasons", cases);
    Ok(())
}

#[test]
fn ids_that_only_the_model_or_the_tokenizer_has_fail_no_other_prompt() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    // The model has 8 tokens more than the tokenizer.
    let next =
        [chain("abc"), vec![(99, 263), (263, 100), (100, 256)], vec![(120, 260), (260, 121), (121, 256)]]
            .concat();
    write_model(
        &dir.join("model"),
        &byte_tokenizer(&["<|end|>"])?,
        264,
        &next,
        json!({"eos_token_id": 256}),
    )?;
    let two = lines(dir, &["--prompt", "a", "--prompt", "x"], 0)?;
    ensure!(two[0]["text"] == "bcd" && two[1]["text"] == "y", "{two:?}");
    ensure!(printed(dir, &["--prompt", "x"])? == "xy\n");
    // The tokenizer has a token more than the model.
    write_model(&dir.join("model"), &byte_tokenizer(&["<pad>"])?, 256, &chain("abc"), json!({}))?;
    ensure!(printed(dir, &["--prompt", "a", "--max-tokens", "2"])? == "abc\n");
    let two = lines(dir, &["--prompt", "a<pad>", "--prompt", "a", "--max-tokens", "1"], 1)?;
    ensure!(two[1]["text"] == "b", "{two:?}");
    let error = two[0]["error"].as_str().unwrap_or_default();
    ensure!(error == "token 256 of the text is not in the vocabulary of 256 tokens of the model", "{error}");
    fs::write(dir.join("text.txt"), "abc<pad>abc")?;
    let output = Command::new(env!("CARGO_BIN_EXE_gd"))
        .args(["eval", "model", "--data", "text.txt"])
        .current_dir(dir)
        .output()?;
    let err = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && err.contains("token 256 of the text"), "{err}");
    Ok(())
}

#[test]
fn every_prompt_of_a_file_or_of_stdin_has_a_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    write_model(
        &dir.join("model"),
        &byte_tokenizer(&["<|end|>"])?,
        257,
        &chain("abcdefgh"),
        json!({"eos_token_id": 256}),
    )?;
    let write = |name: &str, content: &str| fs::write(dir.join(name), content);
    let long = "y".repeat(33);
    write(
        "p.jsonl",
        &format!(
            "\u{feff}{{\"prompt\":\"a\"}}\r\n{{\"prompt\":\"\"}}\n{{\"prompt\":\"  \"}}\n{{\"prompt\":\"{long}\"}}\n{{\"prompt\":\"b\"}}"
        ),
    )?;
    let args = ["--prompts", "p.jsonl", "--max-tokens", "1"];
    let all = lines(dir, &args, 1)?;
    let texts: Vec<_> = all.iter().map(|line| line["text"].as_str()).collect();
    ensure!(texts == [Some("b"), None, Some("\0"), None, Some("c")], "{all:?}");
    ensure!(all[1]["line"] == 2 && all[3]["line"] == 4 && all[3]["prompt"] == long, "{all:?}");
    let error = |line: &Value| line["error"].as_str().unwrap_or_default().to_owned();
    ensure!(error(&all[1]).contains("no begin token") && error(&all[3]).contains("33 tokens"), "{all:?}");
    let plain = run(dir, &args)?;
    ensure!(plain.code == 1 && plain.out == "ab\n\n  \0\n\nbc\n", "{:?}", plain.out);
    ensure!(plain.err.contains("p.jsonl:2: ") && plain.err.contains("p.jsonl:4: "), "{}", plain.err);
    ensure!(
        plain.err.ends_with('\n') && plain.err.contains("error: 2 of 5 prompts have no answer"),
        "{}",
        plain.err
    );

    // Messages have colors on demand only, because stderr is no terminal.
    ensure!(!plain.err.contains('\x1b'), "{:?}", plain.err);
    let colored = |choice| run(dir, &[&args[..], &["--color", choice]].concat());
    ensure!(colored("always")?.err.contains("\x1b["), "{:?}", colored("always")?.err);
    ensure!(!colored("never")?.err.contains('\x1b') && colored("blue")?.code == 2);

    // Lines that hold no prompt are errors before anything is generated.
    for (content, message) in [
        ("{\"prompt\":\"a\"}\n\n{\"prompt\":\"b\"}\n", "bad.jsonl:2: an empty line"),
        (
            "{\"prompt\":\"a\"}\n{\"prompt\":3}\nx\n",
            "bad.jsonl:2: \"prompt\" is not a string (the first of 2 bad lines)",
        ),
        ("{\"text\":\"a\"}\n", "bad.jsonl:1: no field \"prompt\""),
        ("", "bad.jsonl: the file is empty"),
    ] {
        write("bad.jsonl", content)?;
        let output = run(dir, &["--prompts", "bad.jsonl", "--json"])?;
        ensure!(output.code == 1 && output.out.is_empty() && output.err.contains(message), "{}", output.err);
    }

    // Text files, stdin, and the mark at their start.
    write("p.txt", "\u{feff}a\r\nb\r\n\r\n")?;
    let all = lines(dir, &["--prompts", "p.txt", "--max-tokens", "1"], 0)?;
    ensure!(all.len() == 2 && all[0]["prompt"] == "a" && all[1]["prompt"] == "b", "{all:?}");
    for (args, stdin, expected) in [
        (["--prompt", "-"], "\u{feff}ab\n", "abc\n"),
        (["--prompt", "-"], "a\nb", "a\nbc\n"),
        (["--prompts", "-"], "a\n- b\n", "ab\n\n- bc\n"),
        (["--prompts", "-"], "{\"prompt\": \"a\"}\n{\"prompt\": \"x\\nb\"}\n", "ab\n\nx\nbc\n"),
        (["--prompts", "-"], "{a\n{\"prompt\": \"a\"}\n", "{ab\n\n{\"prompt\": \"a\"}\0\n"),
    ] {
        let output = run_with(dir, &[&args[..], &["--max-tokens", "1"]].concat(), stdin.as_bytes())?;
        ensure!(
            output.code == 0 && output.out == expected,
            "{args:?} {stdin:?}: {:?} {}",
            output.out,
            output.err
        );
    }
    let output = run_with(dir, &["--prompt", "-"], b"a\xff")?;
    ensure!(output.code == 1 && output.err.contains("stdin: invalid UTF-8 at byte 1"), "{}", output.err);
    let output = run_with(dir, &["--prompt", "-", "--prompts", "-"], b"a")?;
    ensure!(output.code == 2 && output.err.contains("stdin"), "{}", output.err);
    Ok(())
}

#[test]
fn a_template_gets_variables_and_fails_for_its_prompt_alone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let model = dir.join("model");
    write_model(
        &model,
        &byte_tokenizer(&["<|end|>"])?,
        257,
        &chain("abcdefgh"),
        json!({"eos_token_id": 256}),
    )?;
    let template = "{% if messages[-1].content == 'x' %}{{ raise_exception('not x') }}{% endif %}\
                    {{ 'a' if enable_thinking is defined and enable_thinking else 'd' }}";
    fs::write(model.join("chat_template.jinja"), template)?;
    let chat = ["--chat", "--prompt", "x", "--prompt", "y", "--max-tokens", "1"];
    let two = lines(dir, &chat, 1)?;
    ensure!(
        two[0]["error"].as_str().is_some_and(|e| e.contains("not x")) && two[1]["text"] == "e",
        "{two:?}"
    );
    let kwargs = ["--chat-template-kwargs", r#"{"enable_thinking": true}"#];
    ensure!(lines(dir, &[&chat[..], &kwargs].concat(), 1)?[1]["text"] == "b");
    for (args, message) in [
        (&["--chat", "--chat-template-kwargs", "[]"][..], "--chat-template-kwargs: "),
        (&["--chat-template-kwargs", "{}"], "--chat"),
    ] {
        let output = run(dir, &[&["--prompt", "y"], args].concat())?;
        ensure!(output.code == 2 && output.err.contains(message), "{}", output.err);
    }
    Ok(())
}
