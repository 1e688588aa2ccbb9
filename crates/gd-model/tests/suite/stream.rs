//! Decoding of ids that arrive one at a time, with every kind of decoder.

use gd_model::io::tokenizer::Tokenizer;
use gd_testing::log_cases;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use super::tokenizer::{bpe_once, llama_like, load_text};

/// A tokenizer with `▁` for spaces, byte fallback and two special tokens, and another decoder.
fn with_decoder(decoder: Value) -> Tokenizer {
    let mut file = llama_like();
    let vocab = file["model"]["vocab"].as_object_mut().unwrap();
    for token in
        ["▁▁", "é", "\u{fffd}", "##ing", "##b", "ok</w>", "c</w>", "<pad>", "|", "▁ok", " .", "<end>"]
    {
        let id = vocab.len();
        vocab.insert(token.into(), id.into());
    }
    let end = vocab["<end>"].clone();
    file["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": end, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    }));
    file["decoder"] = decoder;
    load_text(&file.to_string()).unwrap()
}

/// Every decoder of the library, alone and as public models combine them.
fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    let space = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let sequence = |decoders: Value| with_decoder(json!({"type": "Sequence", "decoders": decoders}));
    let metaspace = |scheme: &str| {
        with_decoder(
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true}),
        )
    };
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let strip = |start: u32| json!({"type": "Strip", "content": " ", "start": start, "stop": 0});
    let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let word_piece =
        |cleanup: bool| with_decoder(json!({"type": "WordPiece", "prefix": "##", "cleanup": cleanup}));
    vec![
        ("bytes", Tokenizer::bytes().unwrap()),
        ("byte-level BPE", bpe_once()),
        ("Llama", load_text(&llama_like().to_string()).unwrap()),
        ("Strip", sequence(json!([space, fallback, fuse, strip(1)]))),
        ("Strip of two", sequence(json!([space, fallback, fuse, strip(2)]))),
        ("without Strip", sequence(json!([space, fallback, fuse]))),
        ("Metaspace, always", metaspace("always")),
        ("Metaspace, first", metaspace("first")),
        ("Metaspace, never", metaspace("never")),
        (
            "Metaspace with bytes",
            sequence(json!([
                fallback, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            ])),
        ),
        ("ByteLevel", with_decoder(byte_level.clone())),
        ("ByteLevel in a sequence", sequence(json!([byte_level]))),
        ("WordPiece", word_piece(false)),
        ("WordPiece with cleanup", word_piece(true)),
        ("BPEDecoder", with_decoder(json!({"type": "BPEDecoder", "suffix": "</w>"}))),
        (
            "CTC",
            with_decoder(json!({
                "type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true,
            })),
        ),
        ("no decoder", with_decoder(Value::Null)),
    ]
}

fn streamed(tokenizer: &Tokenizer, prompt: &[u32], new: &[u32]) -> String {
    let mut decoder = tokenizer.stream_after(prompt).unwrap();
    let mut text: String = new.iter().filter_map(|&id| decoder.push(id).unwrap()).collect();
    text.extend(decoder.finish().unwrap());
    assert_eq!(decoder.finish().unwrap(), None);
    text
}

/// What follows the text of the prompt. The bytes at the end of a prompt may be broken by themselves and a part of a
/// character with those that follow.
fn rest(tokenizer: &Tokenizer, prompt: &[u32], new: &[u32]) -> String {
    let before = tokenizer.decode(prompt).unwrap();
    let all = tokenizer.decode(&[prompt, new].concat()).unwrap();
    let common = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    all[common..].to_owned()
}

#[test]
fn chunks_are_what_follows_the_prompt_when_all_is_decoded() {
    const CASES: u32 = 300;
    for (name, tokenizer) in tokenizers() {
        let size = tokenizer.vocab_size() as u32;
        // Besides any ids: bytes of characters, the tokens after the bytes, and ids beyond the vocabulary.
        let bytes = if size > 262 { 6 + 0x80..6 + 0x100 } else { 0x80..0x100u32 };
        let id = prop_oneof![4 => 0..size, 2 => bytes, 4 => size.saturating_sub(12)..size + 3, 2 => 0..6u32];
        let ids = (prop::collection::vec(id.clone(), 0..40), prop::collection::vec(id, 0..60));
        let mut runner =
            TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
        let result = runner.run(&ids, |(prompt, new)| {
            prop_assert_eq!(streamed(&tokenizer, &prompt, &new), rest(&tokenizer, &prompt, &new));
            prop_assert_eq!(streamed(&tokenizer, &[], &new), tokenizer.decode(&new).unwrap());
            Ok(())
        });
        if let Err(error) = result {
            panic!("{name}: {error}");
        }
        log_cases("stream", CASES as usize);
    }
}

#[test]
fn the_first_token_of_a_continuation_has_its_space() {
    for (name, tokenizer) in tokenizers() {
        let Some(id) = tokenizer.token_id("▁ok") else { continue };
        let Some(before) = tokenizer.token_id("a") else { continue };
        let expected = match name {
            "ByteLevel" | "ByteLevel in a sequence" => "▁ok",
            "WordPiece" | "WordPiece with cleanup" | "no decoder" => " ▁ok",
            "BPEDecoder" | "CTC" => "▁ok",
            _ => " ok",
        };
        assert_eq!(streamed(&tokenizer, &[before], &[id]), expected, "{name}");
        // Special tokens have no text, also if there are many of them between the two.
        let end = tokenizer.token_id("<end>").unwrap();
        let prompt = [&[before], &[end; 50][..]].concat();
        assert_eq!(streamed(&tokenizer, &prompt, &[end, id]), expected, "{name}");
    }
}

#[test]
fn a_word_after_a_broken_byte_is_returned_with_it() {
    let tokenizer = with_decoder(llama_like()["decoder"].clone());
    let id = |name: &str| tokenizer.token_id(name).unwrap();
    let mut decoder = tokenizer.stream_after(&[id("a")]).unwrap();
    let mut push = |name: &str| decoder.push(id(name)).unwrap();
    assert_eq!([push("<0xC3>"), push("<0xA9>"), push("b")], [None, None, Some("éb".into())]);
    assert_eq!([push("<0xC3>"), push("▁ok")], [None, Some("\u{fffd} ok".into())]);
    assert_eq!([push("<0xC3>"), push("<0xA9>"), push("<0xFF>")], [None, None, None]);
    assert_eq!(decoder.finish().unwrap(), Some("\u{fffd}".repeat(3)));
}

#[test]
fn an_id_beyond_the_vocabulary_has_no_text() {
    for (name, tokenizer) in tokenizers() {
        let size = tokenizer.vocab_size() as u32;
        assert_eq!(tokenizer.decode(&[size, u32::MAX]).unwrap(), "", "{name}");
        assert_eq!(streamed(&tokenizer, &[size], &[size + 1, u32::MAX]), "", "{name}");
    }
}
