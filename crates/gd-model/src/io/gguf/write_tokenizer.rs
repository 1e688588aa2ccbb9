//! The metadata of a tokenizer, for llama.cpp: byte-level BPE with a pre-tokenizer that has a name in GGUF, and SentencePiece.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;

use super::CHAT_TEMPLATE;
use super::pre_tokenizer::PreTokenizer;
use super::tokenizer::{CONTROL, UNKNOWN, USER_DEFINED, key};
use super::write::{Metadata, Model};
use super::write_sentencepiece as sentencepiece;
use crate::io::chat_template::ChatTemplate;

type Result<T> = std::result::Result<T, String>;

/// Values of `tokenizer.ggml.token_type` beside those that are read.
const NORMAL: i128 = 1;
const UNUSED: i128 = 5;
const BYTE: i128 = 6;

/// Adds the keys of the tokenizer, of the special tokens and of the chat template.
///
/// # Errors
/// What the format does not have.
pub(super) fn describe(model: &Model<'_>, metadata: &mut Metadata) -> Result<()> {
    let json = model.tokenizer.to_json().map_err(|e| e.to_string())?;
    let json: Json = serde_json::from_str(&json).map_err(|e| format!("the tokenizer: {e}"))?;
    let kind = &json["model"]["type"];
    if kind != "BPE" {
        return Err(format!(
            "the tokenizer is {kind}; byte-pair encoding can be written (the convert_hf_to_gguf.py of llama.cpp writes others)"
        ));
    }
    let merges = json["model"]["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let merges = merges.iter().map(merge).collect::<Result<Vec<_>>>()?;
    if merges.is_empty() {
        return Err("the tokenizer has no merges; GGUF has no tokenizer of single bytes".into());
    }
    let (tokens, mut types) = tokens(&json, model.config.vocab_size)?;
    let mut add = |name: &str, value: Value| {
        metadata.insert(key(name), value);
    };
    if json["model"]["byte_fallback"] == Json::Bool(true) {
        add("model", Value::String("llama".into()));
        add("pre", Value::String("default".into()));
        add("add_space_prefix", Value::Bool(sentencepiece::adds_space_prefix(&json)?));
        let mut scores = match model.tokenizer.scores() {
            Some(scores) => scores.iter().map(|&score| score as f32).collect(),
            None => sentencepiece::scores(&json, &merges, &tokens)?,
        };
        scores.resize(tokens.len(), 0.0);
        add("scores", Value::Array(scores.into_iter().map(Value::F32).collect()));
        let unknown = json["model"]["unk_token"].as_str();
        for (id, (token, kind)) in tokens.iter().zip(&mut types).enumerate() {
            if Some(token.as_str()) == unknown {
                *kind = UNKNOWN;
                add("unknown_token_id", Value::U32(id as u32));
            } else if is_byte(token) {
                *kind = BYTE;
            }
        }
    } else {
        if !json["normalizer"].is_null() && json["normalizer"]["type"] != "NFC" {
            return Err(format!(
                "the tokenizer has the normalizer {}, which GGUF lacks",
                json["normalizer"]["type"]
            ));
        }
        add("model", Value::String("gpt2".into()));
        add("pre", Value::String(pre_tokenizer(&json)?.into()));
        let merges = merges.into_iter().map(|(left, right)| Value::String(format!("{left} {right}")));
        add("merges", Value::Array(merges.collect()));
    }
    add("tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    add("token_type", Value::Array(types.into_iter().map(|kind| Value::I32(kind as i32)).collect()));
    let id = |name: &str| {
        let first = |ids: &Json| ids.as_array().map_or(ids.as_u64(), |ids| ids.first()?.as_u64());
        first(&model.generation[name]).or_else(|| first(model.config.origin.as_ref()?.get(name)?))
    };
    let begin = id("bos_token_id");
    for (name, id) in [("bos_token_id", begin), ("eos_token_id", id("eos_token_id"))] {
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()) {
            add(name, Value::U32(id));
        }
    }
    let framing = model.tokenizer.framing().map_err(|e| e.to_string())?;
    let adds_begin =
        begin.is_some_and(|begin| framing.first().is_some_and(|first| u64::from(*first) == begin));
    let adds_begin =
        adds_begin && model.tokenizer.encode("a").is_ok_and(|ids| ids.first() == framing.first());
    add("add_bos_token", Value::Bool(adds_begin));
    if let Some(template) = ChatTemplate::source(model.files).map_err(|e| e.to_string())? {
        metadata.insert(CHAT_TEMPLATE.to_owned(), Value::String(template));
    }
    Ok(())
}

/// The tokens by id, and their types. Ids of the model that the tokenizer lacks get names that no text has.
fn tokens(json: &Json, vocab_size: usize) -> Result<(Vec<String>, Vec<i128>)> {
    let mut by_id: BTreeMap<usize, (String, i128)> = BTreeMap::new();
    let id = |id: &Json| id.as_u64().map(|id| id as usize).ok_or("the tokenizer has a token without an id");
    for (token, number) in json["model"]["vocab"].as_object().into_iter().flatten() {
        by_id.insert(id(number)?, (token.clone(), NORMAL));
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == Json::Bool(true) { CONTROL } else { USER_DEFINED };
        by_id.insert(id(&added["id"])?, (added["content"].as_str().unwrap_or_default().to_owned(), kind));
    }
    if let Some((last, _)) = by_id.last_key_value().filter(|(last, _)| **last >= vocab_size) {
        return Err(format!("the tokenizer has the token {last}, the model {vocab_size} tokens"));
    }
    let of = |id| by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
    Ok((0..vocab_size).map(of).unzip())
}

/// The two tokens of a merge.
fn merge(json: &Json) -> Result<(String, String)> {
    let line = || json.as_str()?.split_once(' ');
    let pair = || Some((json[0].as_str()?, json[1].as_str()?));
    let (left, right) = line().or_else(pair).ok_or_else(|| format!("the tokenizer has the merge {json}"))?;
    Ok((left.to_owned(), right.to_owned()))
}

/// Whether this is the token of a byte in SentencePiece, such as `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// The name of the pre-tokenizer.
fn pre_tokenizer(json: &Json) -> Result<&'static str> {
    let pre = &json["pre_tokenizer"];
    let steps = match pre["type"] == "Sequence" {
        true => pre["pretokenizers"].as_array().cloned().unwrap_or_default(),
        false => vec![pre.clone()],
    };
    let unnamed = || format!("the pre-tokenizer {pre} has no name in GGUF");
    let (mut digits, mut patterns) = (false, Vec::new());
    for (at, step) in steps.iter().enumerate() {
        match step["type"].as_str() {
            Some("Digits") if at == 0 && step["individual_digits"] == Json::Bool(true) => digits = true,
            Some("Split") if step["behavior"] == "Isolated" && step["invert"] == Json::Bool(false) => {
                patterns.push(step["pattern"]["Regex"].as_str().ok_or_else(unnamed)?.to_owned());
            }
            Some("ByteLevel") if at + 1 == steps.len() && step["add_prefix_space"] == Json::Bool(false) => {
                if (step["use_regex"] == Json::Bool(false)) == patterns.is_empty() {
                    return Err(unnamed());
                }
            }
            _ => return Err(unnamed()),
        }
    }
    let ignore_merges = json["model"]["ignore_merges"] == Json::Bool(true);
    PreTokenizer::name_of(digits, &patterns, ignore_merges).ok_or_else(unnamed)
}
