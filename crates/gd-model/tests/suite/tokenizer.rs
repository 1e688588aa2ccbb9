//! Tokenizers: exact round trips, one stored format, streaming, and files that must be refused.

use gd_model::Error;
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::properties;
use proptest::prelude::*;

const SAMPLE: &str = include_str!("../../models/text/sample.txt");

/// The start of the sample text, for a small vocabulary.
fn corpus() -> Vec<String> {
    SAMPLE.split_inclusive('\n').take(300).map(str::to_string).collect()
}

fn bpe() -> Tokenizer {
    Tokenizer::train_bpe(corpus().iter(), 600).unwrap()
}

fn reload(tokenizer: &Tokenizer) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    Tokenizer::load(&path).unwrap()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.stream();
    let mut text = String::new();
    for &id in ids {
        text.extend(decoder.push(id).unwrap());
    }
    text.extend(decoder.finish().unwrap());
    text
}

#[test]
fn byte_ids_are_byte_values() {
    let tokenizer = Tokenizer::bytes().unwrap();
    assert_eq!(tokenizer.vocab_size(), 256);
    let text = "Ahab — \u{0}\t\r\n «кит» 鯨 🐋";
    let bytes: Vec<u32> = text.bytes().map(u32::from).collect();
    assert_eq!(tokenizer.encode(text).unwrap(), bytes);
    // Copying the bytes gives the same ids as the encoder of the library for the stored file.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    tokenizer.save(&path).unwrap();
    let library = tokenizers::Tokenizer::from_file(&path).unwrap();
    assert_eq!(library.encode_fast(text, true).unwrap().get_ids(), bytes);
    assert_eq!(library.decode(&bytes, true).unwrap(), text);
}

#[test]
fn documents_end_with_the_end_of_text_token() {
    let tokenizer = reload(&bpe());
    let end = tokenizer.end_of_text().unwrap();
    assert_eq!((end as usize, tokenizer.vocab_size()), (599, 600));
    let text = tokenizer.encode("Call me").unwrap();
    let document = tokenizer.encode_document("Call me").unwrap();
    assert_eq!(document, [&text[..], &[end]].concat());
    assert_eq!(tokenizer.decode(&document).unwrap(), "Call me");
    assert_eq!(stream(&tokenizer, &document), "Call me");
    assert!(tokenizer.encode_document("").unwrap().is_empty());
    let bytes = Tokenizer::bytes().unwrap();
    assert_eq!((bytes.end_of_text(), bytes.encode_document("ab").unwrap()), (None, vec![97, 98]));
}

#[test]
fn whole_sample_round_trips() {
    for tokenizer in [Tokenizer::bytes().unwrap(), bpe()] {
        let again = reload(&tokenizer);
        let ids = tokenizer.encode(SAMPLE).unwrap();
        assert_eq!(again.encode(SAMPLE).unwrap(), ids);
        assert_eq!(again.decode(&ids).unwrap(), SAMPLE);
        assert_eq!(again.vocab_size(), tokenizer.vocab_size());
    }
}

#[test]
fn bpe_compresses_and_depends_on_the_text_alone() {
    let tokenizer = bpe();
    assert_eq!(tokenizer.vocab_size(), 600);
    let ids = tokenizer.encode(SAMPLE).unwrap();
    assert!(ids.len() * 2 < SAMPLE.len(), "{} tokens for {} bytes", ids.len(), SAMPLE.len());
    for threads in 1..=3 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(bpe).to_json().unwrap(), tokenizer.to_json().unwrap());
    }
}

#[test]
fn a_bpe_vocabulary_has_a_range() {
    for vocab in [0, 1, 256, (1 << 24) + 1, 1 << 31, 1 << 62, usize::MAX] {
        let error = Tokenizer::train_bpe([SAMPLE].into_iter(), vocab).map(drop).unwrap_err().to_string();
        assert!(error.contains("from 257 to 16777216") && error.contains(&vocab.to_string()), "{error}");
    }
}

#[test]
fn a_long_word_is_learned_from_in_parts_of_512_bytes() {
    let part = |c: &str| format!("c{}b", c.repeat(510));
    let word = ["d", "e", "f", "g", "h"].map(part).concat();
    let tokens = |text: &str| {
        let tokenizer = Tokenizer::train_bpe([text].into_iter(), 400).unwrap();
        tokenizer.encode("bc").unwrap().len()
    };
    // The pair occurs four times, between the parts alone.
    assert_eq!(tokens(&word), 2);
    assert_eq!(tokens(&word[256..]), 1);
}

#[test]
fn stream_yields_whole_characters_only() {
    let tokenizer = Tokenizer::bytes().unwrap();
    let mut decoder = tokenizer.stream();
    let chunks: Vec<Option<String>> = "a—🐋".bytes().map(|b| decoder.push(u32::from(b)).unwrap()).collect();
    let expected = [Some("a"), None, None, Some("—"), None, None, None, Some("🐋")];
    assert_eq!(chunks, expected.map(|p| p.map(str::to_string)));
    assert_eq!(decoder.finish().unwrap(), None);
}

proptest! {
    #![proptest_config(properties(256))]

    #[test]
    fn any_text_round_trips(text in any::<String>()) {
        for tokenizer in [Tokenizer::bytes().unwrap(), bpe_once()] {
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(&tokenizer.decode(&ids).unwrap(), &text);
            prop_assert_eq!(&stream(&tokenizer, &ids), &text);
        }
    }

    // A model may generate any bytes. Invalid sequences become U+FFFD, in a stream as in a decoded text.
    #[test]
    fn any_ids_stream_as_they_decode(ids in prop::collection::vec(0u32..600, 0..60), high in any::<bool>()) {
        let bytes: Vec<u32> = ids.iter().map(|i| if high { 0x80 + i % 0x80 } else { i % 256 }).collect();
        let raw = Tokenizer::bytes().unwrap();
        prop_assert_eq!(stream(&raw, &bytes), raw.decode(&bytes).unwrap());
        let bpe = bpe_once();
        prop_assert_eq!(stream(&bpe, &ids), bpe.decode(&ids).unwrap());
    }
}

pub(crate) fn bpe_once() -> Tokenizer {
    static BPE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    BPE.get_or_init(bpe).clone()
}

/// A tokenizer as that of Llama: `▁` for spaces, bytes as `<0xNN>`, a begin token added by the post-processor.
pub(crate) fn llama_like() -> serde_json::Value {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "▁", "a", "b", "▁a"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"]]}
    })
}

pub(crate) fn load_text(text: &str) -> Result<Tokenizer, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, text).unwrap();
    Tokenizer::load(&path)
}

#[test]
fn a_loaded_tokenizer_applies_its_own_rules() {
    let tokenizer = load_text(&llama_like().to_string()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 6 + 256);
    assert_eq!(tokenizer.token_id("<s>"), Some(1));
    let text = "a b 🐋a a—b bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb a 鯨";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids[..2], [1, 5]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    assert_eq!(stream(&tokenizer, &ids), text);
}

#[test]
fn damaged_files_are_errors_of_one_line() {
    let mut merge_too_long = llama_like();
    // The library panics if the result of a merge is longer than every token.
    merge_too_long["model"]["merges"] = serde_json::json!([["<0x00>", "<0x01>"]]);
    let mut no_tokens = llama_like();
    no_tokens["added_tokens"] = serde_json::json!([]);
    no_tokens["model"]["vocab"] = serde_json::json!({});
    no_tokens["model"]["merges"] = serde_json::json!([]);
    let cases = [
        ("", "EOF"),
        ("not json", "expected"),
        ("{}", "missing"),
        (r#"{"a": 1}"#, "expected"),
        (&merge_too_long.to_string(), "range"),
        (&no_tokens.to_string(), "no tokens"),
    ];
    for (text, expected) in cases {
        let error = load_text(text).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
        let line = error.to_string();
        assert!(line.contains("tokenizer.json") && line.contains(expected) && !line.contains('\n'), "{line}");
    }
    let error = Tokenizer::load(std::path::Path::new("no/such/tokenizer.json")).unwrap_err();
    assert_eq!(error.to_string(), "no/such/tokenizer.json: no such tokenizer file");
}

#[test]
fn values_outside_the_range_are_named() {
    assert!(Tokenizer::train_bpe(corpus().iter(), 256).unwrap_err().to_string().contains("not 256"));
    assert!(Tokenizer::train_bpe([""].iter(), 300).unwrap_err().to_string().contains("empty"));
}
