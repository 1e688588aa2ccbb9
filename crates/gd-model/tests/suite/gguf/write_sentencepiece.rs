//! SentencePiece tokenizers in written files: a text has the same tokens as before, or the file is refused.

use std::fs;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::gguf_file;
use gd_model::io::gguf::{self, Quantization};
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::log_cases;
use serde_json::{Value as Json, json};

use super::CPU;
use super::tokens::sentencepiece;
use super::write::initial;

/// Tokens beside the special ones and the bytes of [`tokenizer_json`].
const PIECES: [&str; 12] = ["▁", "a", "b", "ab", "▁a", "▁ab", "ba", "aba", "▁▁", "é", "<", "<a"];
/// All pairs of these tokens that together are a token. The order is that of no other property.
const MERGES: [[&str; 2]; 9] = [
    ["b", "a"],
    ["▁", "▁"],
    ["a", "b"],
    ["▁", "a"],
    ["ab", "a"],
    ["a", "ba"],
    ["▁a", "b"],
    ["▁", "ab"],
    ["<", "a"],
];

/// The `tokenizer.json` of a SentencePiece vocabulary, with this normalizer and pre-tokenizer.
fn tokenizer_json(normalizer: &Json, pre_tokenizer: &Json) -> Json {
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter().chain(bytes);
    let tokens = tokens.chain(PIECES.map(str::to_owned));
    let vocab: serde_json::Map<String, Json> =
        tokens.zip(0..).map(|(token, id)| (token, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "decoder": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
        "model": { "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": MERGES },
    })
}

fn prepend() -> Json {
    json!({ "type": "Prepend", "prepend": "▁" })
}

fn replace() -> Json {
    json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" })
}

fn metaspace(scheme: &str, split: bool) -> Json {
    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split })
}

fn read(json: &Json) -> Result<Tokenizer> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, json.to_string())?;
    Ok(Tokenizer::load(&path)?)
}

/// The tokenizer of a written file, and the file's metadata.
fn written(tokenizer: Tokenizer, vocab_size: usize) -> Result<(Tokenizer, gguf_file::Content)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("m.gguf");
    let ends = |config: &mut Json| {
        (config["bos_token_id"], config["eos_token_id"]) = (json!(1), json!(2));
        config["vocab_size"] = json!(vocab_size);
    };
    initial(ends, tokenizer)?.write_gguf(&path, Quantization::Q8_0)?;
    let content = gguf_file::Content::read(&mut fs::File::open(&path)?)?;
    Ok((gguf::read(&path, &CPU)?.tokenizer, content))
}

fn floats(content: &gguf_file::Content, key: &str) -> Result<Vec<f32>> {
    let values = content.metadata.get(key).with_context(|| key.to_owned())?.to_vec()?;
    Ok(values.iter().map(gguf_file::Value::to_f32).collect::<candle_core::Result<_>>()?)
}

/// All texts of up to 6 characters of this alphabet.
fn all_texts() -> Vec<String> {
    const ALPHABET: [char; 5] = ['a', 'b', ' ', 'é', '<'];
    let mut texts = vec![String::new()];
    let mut from = 0;
    for _ in 0..6 {
        let longer: Vec<String> =
            texts[from..].iter().flat_map(|text| ALPHABET.map(|c| format!("{text}{c}"))).collect();
        from = texts.len();
        texts.extend(longer);
    }
    texts
}

#[test]
fn texts_have_the_tokens_of_the_tokenizer_json() -> Result<()> {
    let texts = all_texts();
    ensure!(texts.len() == 19_531, "{} texts", texts.len());
    let both = json!({ "type": "Sequence", "normalizers": [prepend(), replace()] });
    let mut cases = 0;
    for (normalizer, pre_tokenizer) in [
        (both, Json::Null),
        (Json::Null, metaspace("first", false)),
        (Json::Null, metaspace("always", false)),
        (Json::Null, metaspace("never", false)),
        (replace(), Json::Null),
    ] {
        let json = tokenizer_json(&normalizer, &pre_tokenizer);
        let tokenizer = read(&json)?;
        let (back, content) = written(tokenizer.clone(), tokenizer.vocab_size())?;
        // A Metaspace puts nothing before a text that starts with a space; SentencePiece and llama.cpp do.
        let as_sentencepiece = |text: &&String| {
            !text.starts_with(' ') || pre_tokenizer.is_null() || pre_tokenizer["prepend_scheme"] == "never"
        };
        for text in texts.iter().filter(as_sentencepiece) {
            let (expected, ids) = (tokenizer.encode(text)?, back.encode(text)?);
            ensure!(ids == expected, "{pre_tokenizer} {text:?}: {ids:?}, {expected:?}");
            cases += 1;
        }
        for text in ["<s>a</s>", "</s><unk>"] {
            ensure!(back.encode_written(text)?[0] == tokenizer.encode_written(text)?[0], "{text}");
        }
        let number = |key: &str| anyhow::Ok(content.metadata.get(key).context("a key")?.to_u32()?);
        ensure!(
            number("tokenizer.ggml.unknown_token_id")? == 0 && number("tokenizer.ggml.bos_token_id")? == 1
        );
        let kinds = content.metadata["tokenizer.ggml.token_type"].to_vec()?;
        let kinds: Vec<i32> =
            kinds.iter().map(gguf_file::Value::to_i32).collect::<candle_core::Result<_>>()?;
        ensure!(kinds[..4] == [2, 3, 3, 6] && kinds[258..260] == [6, 1], "{kinds:?}");
        // In the order of the merges: ba, ▁▁, ab, ▁a, aba, ▁ab, <a.
        let scores = floats(&content, "tokenizer.ggml.scores")?;
        ensure!(
            scores[259..] == [0.0, 0.0, 0.0, -2.0, -3.0, -5.0, 0.0, -4.0, -1.0, 0.0, 0.0, -6.0],
            "{scores:?}"
        );
    }
    log_cases("gguf-sentencepiece", cases);
    Ok(())
}

/// Equal and unusual scores, and a model with more tokens than the tokenizer.
#[test]
fn the_scores_of_a_file_are_kept() -> Result<()> {
    let pieces = [("a", -9.0), ("▁", -9.5), ("a▁", -2.0), ("▁a", -2.0), ("aa▁", -3.25)];
    let tokenizer = sentencepiece(&pieces, &[])?;
    let (back, content) = written(tokenizer.clone(), tokenizer.vocab_size() + 3)?;
    let scores = floats(&content, "tokenizer.ggml.scores")?;
    ensure!(scores[259..] == [-9.0, -9.5, -2.0, -2.0, -3.25, 0.0, 0.0, 0.0], "{scores:?}");
    for text in ["a a a", "aa a", "a  a", "", "a <unk> a", "</s>a", "a[PAD264]"] {
        ensure!(back.encode(text)? == tokenizer.encode(text)?, "{text:?}");
    }
    Ok(())
}

/// Transformers lists the merges of tokens with equal scores by the lengths of their parts.
#[test]
fn tokens_whose_merges_alternate_have_equal_scores() -> Result<()> {
    let mut alternating = MERGES;
    alternating.swap(5, 6);
    let mut json = tokenizer_json(&replace(), &Json::Null);
    json["model"]["merges"] = json!(alternating);
    let tokenizer = read(&json)?;
    let (back, content) = written(tokenizer.clone(), tokenizer.vocab_size())?;
    // ba, ▁▁, ab, ▁a, then aba and ▁ab, then <a.
    let scores = floats(&content, "tokenizer.ggml.scores")?;
    ensure!(
        scores[259..] == [0.0, 0.0, 0.0, -2.0, -3.0, -4.0, 0.0, -4.0, -1.0, 0.0, 0.0, -5.0],
        "{scores:?}"
    );
    // From left to right, where the tokenizer.json has an order of pairs.
    let names = |tokenizer: &Tokenizer| super::tokens::names(tokenizer, " aba");
    ensure!(names(&back)? == names(&tokenizer)?, "{} {}", names(&back)?, names(&tokenizer)?);
    Ok(())
}

#[test]
fn what_scores_cannot_express_is_refused() -> Result<()> {
    let both = json!({ "type": "Sequence", "normalizers": [prepend(), replace()] });
    let json = |change: &dyn Fn(&mut Json)| {
        let mut json = tokenizer_json(&both, &Json::Null);
        change(&mut json);
        json
    };
    let merges = |merges: &[[&str; 2]]| json(&|json| json["model"]["merges"] = json!(merges));
    let mut apart = MERGES;
    apart.swap(4, 6);
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": false });
    for (json, expected) in [
        (merges(&apart), "the merges of the token \"aba\" are among those of other tokens"),
        (merges(&MERGES[..8]), "does not merge \"<\" and \"a\""),
        (json(&|json| json["normalizer"] = prepend()), "the normalizer {\"prepend\""),
        (json(&|json| json["normalizer"] = json!({ "type": "NFC" })), "NFC"),
        (
            json(&|json| json["pre_tokenizer"] = metaspace("first", false)),
            "the pre-tokenizer {\"prepend_scheme\"",
        ),
        (tokenizer_json(&Json::Null, &metaspace("first", true)), "Metaspace"),
        (tokenizer_json(&Json::Null, &Json::Null), "the normalizer null"),
        (json(&|json| json["model"] = unigram.clone()), "the tokenizer is \"Unigram\""),
    ] {
        let tokenizer = read(&json)?;
        let size = tokenizer.vocab_size();
        let error = written(tokenizer, size).err().context("an error was expected")?.to_string();
        ensure!(error.contains("m.gguf") && error.contains(expected), "{error}");
    }
    Ok(())
}
