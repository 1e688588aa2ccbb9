//! Tokenizers in GGUF files: SentencePiece with equal scores and with special tokens in a text, and pre-tokenizers.
//!
//! The tokens of fixtures/pre_tokenizers.json are those of llama.cpp, see scripts/golden/pre_tokenizers.py.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use gd_model::io::gguf;
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::log_cases;

use super::{CPU, Metadata, metadata, texts, weights, write};

/// The tokenizer of a file with these keys and this number of tokens.
fn tokenizer(folder: &Path, metadata: &Metadata, tokens: usize) -> Result<Tokenizer> {
    let path = folder.join("m.gguf");
    write(&path, metadata, &weights(true, tokens)?, GgmlDType::Q8_0)?;
    Ok(gguf::read(&path, &CPU)?.tokenizer)
}

/// A SentencePiece vocabulary: special tokens, bytes, and tokens with scores. `keys` are added to the metadata.
pub(super) fn sentencepiece(pieces: &[(&str, f32)], keys: &[(&str, Value)]) -> Result<Tokenizer> {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens = vec!["<unk>", "<s>", "</s>"];
    let mut kinds = vec![2, 3, 3];
    tokens.extend(bytes.iter().map(String::as_str));
    kinds.extend([6; 256]);
    tokens.extend(pieces.iter().map(|(piece, _)| *piece));
    kinds.extend(vec![1; pieces.len()]);
    let mut scores = vec![Value::F32(0.0); 259];
    scores.extend(pieces.iter().map(|(_, score)| Value::F32(*score)));
    let mut metadata = metadata();
    metadata
        .retain(|key, _| !["tokenizer.ggml.merges", "tokenizer.ggml.eos_token_id"].contains(&key.as_str()));
    metadata.extend([
        ("tokenizer.ggml.model".to_owned(), Value::String("llama".into())),
        ("tokenizer.ggml.tokens".to_owned(), texts(&tokens)),
        ("tokenizer.ggml.scores".to_owned(), Value::Array(scores)),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(kinds.into_iter().map(Value::I32).collect())),
    ]);
    metadata.extend(keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    tokenizer(tempfile::tempdir()?.path(), &metadata, tokens.len())
}

pub(super) fn names(tokenizer: &Tokenizer, text: &str) -> Result<String> {
    let ids = tokenizer.encode(text)?;
    Ok(ids.iter().map(|&id| tokenizer.token(id).unwrap_or_default()).collect::<Vec<_>>().join(" "))
}

/// The pieces of llama.cpp for these texts.
#[test]
fn equal_scores_are_merged_from_left_to_right() -> Result<()> {
    let pieces = [("a", -9.0), ("▁", -9.0), ("a▁", -2.0), ("▁a", -2.0), ("aa▁", -3.0)];
    let tokenizer = sentencepiece(&pieces, &[])?;
    for (text, expected) in [
        ("a a", "<s> ▁a ▁a"),
        ("aa a", "<s> ▁a a▁ a"),
        ("a  a", "<s> ▁a ▁ ▁a"),
        ("a <unk> a", "<s> ▁a ▁ <unk> ▁ ▁a"),
        ("</s>a", "<s> </s> ▁a"),
        ("a<s>a", "<s> ▁a <s> ▁a"),
        ("é", "<s> ▁ <0xC3> <0xA9>"),
        ("", "<s>"),
    ] {
        assert_eq!(names(&tokenizer, text)?, expected, "{text:?}");
    }
    // With one of the scores greater, its token comes first everywhere.
    let first = |piece: &str| -> Result<Tokenizer> {
        sentencepiece(&pieces.map(|(name, score)| (name, if name == piece { -1.0 } else { score })), &[])
    };
    assert_eq!(names(&first("a▁")?, "a a a")?, "<s> ▁ a▁ a▁ a");
    assert_eq!(names(&first("▁a")?, "a a a")?, "<s> ▁a ▁a ▁a");
    Ok(())
}

#[test]
fn the_first_tokens_of_sentencepiece_need_no_keys() -> Result<()> {
    let pieces = [("a", -1.0), ("▁", -1.0)];
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    for (keys, expected) in [
        (vec![], "<s> ▁ a"),
        (vec![("bos_token_id", Value::I32(-1))], "<s> ▁ a"),
        (vec![("unknown_token_id", Value::U32(u32::MAX))], "<s> ▁ a"),
        (vec![("add_bos_token", Value::Bool(false))], "▁ a"),
        (vec![("add_eos_token", Value::Bool(true))], "<s> ▁ a </s>"),
        (vec![("add_space_prefix", Value::Bool(false))], "<s> a"),
    ] {
        let keys: Vec<(String, Value)> = keys.into_iter().map(|(name, value)| (key(name), value)).collect();
        let keys: Vec<(&str, Value)> =
            keys.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        assert_eq!(names(&sentencepiece(&pieces, &keys)?, "a")?, expected, "{keys:?}");
    }
    Ok(())
}

/// The number of tokens and a hash of their ids: the ids are the digits of a number in base 1000003, modulo 2^32.
fn digest(ids: &[u32]) -> (u64, u64) {
    let hash = ids.iter().fold(0u64, |hash, id| (hash * 1_000_003 + u64::from(*id)) % (1 << 32));
    (ids.len() as u64, hash)
}

#[test]
fn texts_have_the_tokens_of_llama_cpp_with_every_pre_tokenizer() -> Result<()> {
    let golden: serde_json::Value = serde_json::from_str(include_str!("../../fixtures/pre_tokenizers.json"))?;
    let list = |key: &str| -> Result<Vec<String>> {
        let values = golden[key].as_array().with_context(|| key.to_owned())?;
        values.iter().map(|value| Ok(value.as_str().context("a text")?.to_owned())).collect()
    };
    let (tokens, merges, written) = (list("tokens")?, list("merges")?, list("texts")?);
    ensure!(written.len() == 150, "{} texts", written.len());
    let strings = |list: &[String]| Value::Array(list.iter().cloned().map(Value::String).collect());
    let mut metadata = metadata();
    metadata.extend([
        ("tokenizer.ggml.tokens".to_owned(), strings(&tokens)),
        ("tokenizer.ggml.merges".to_owned(), strings(&merges)),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(vec![Value::I32(1); tokens.len()])),
        ("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(false)),
    ]);
    let (folder, mut cases) = (tempfile::tempdir()?, 0);
    for (pre, expected) in golden["digests"].as_object().context("digests")? {
        metadata.insert("tokenizer.ggml.pre".into(), Value::String(pre.clone()));
        let tokenizer = tokenizer(folder.path(), &metadata, tokens.len())?;
        let expected = expected.as_array().context("a list")?;
        ensure!(expected.len() == written.len());
        for (text, expected) in written.iter().zip(expected) {
            let actual = digest(&tokenizer.encode(text)?);
            let expected =
                (expected[0].as_u64().context("a count")?, expected[1].as_u64().context("a hash")?);
            ensure!(actual == expected, "{pre}, {text:?}: {actual:?} instead of {expected:?}");
            cases += 1;
        }
    }
    log_cases("gguf-pre-tokenizers", cases);
    Ok(())
}
