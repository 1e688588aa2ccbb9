//! The metadata of a tokenizer, for llama.cpp: byte-level BPE with a pre-tokenizer that has a name in GGUF.

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value;
use serde_json::Value as Json;

use super::CHAT_TEMPLATE;
use super::pre_tokenizer::PreTokenizer;
use super::tokenizer::{CONTROL, USER_DEFINED, key};
use super::write::{Metadata, Model};
use crate::io::chat_template::ChatTemplate;

type Result<T> = std::result::Result<T, String>;

/// Values of `tokenizer.ggml.token_type` beside those that are read.
const NORMAL: i128 = 1;
const UNUSED: i128 = 5;

/// Adds the keys of the tokenizer, of the special tokens and of the chat template.
///
/// # Errors
/// What the format does not have.
pub(super) fn describe(model: &Model<'_>, metadata: &mut Metadata) -> Result<()> {
    let json = model.tokenizer.to_json().map_err(|e| e.to_string())?;
    let json: Json = serde_json::from_str(&json).map_err(|e| format!("the tokenizer: {e}"))?;
    let (kind, byte_fallback) = (&json["model"]["type"], json["model"]["byte_fallback"] == Json::Bool(true));
    if kind != "BPE" || byte_fallback {
        let what = if byte_fallback { "SentencePiece".into() } else { kind.to_string() };
        return Err(format!(
            "the tokenizer is {what}; byte-level BPE can be written (the convert_hf_to_gguf.py of llama.cpp writes others)"
        ));
    }
    if !json["normalizer"].is_null() && json["normalizer"]["type"] != "NFC" {
        return Err(format!(
            "the tokenizer has the normalizer {}, which GGUF lacks",
            json["normalizer"]["type"]
        ));
    }
    let merges = json["model"]["merges"].as_array().map(Vec::as_slice).unwrap_or_default();
    let merges = merges.iter().map(merge).collect::<Result<Vec<_>>>()?;
    if merges.is_empty() {
        return Err("the tokenizer has no merges; GGUF has no tokenizer of single bytes".into());
    }
    let mut add = |name: &str, value: Value| {
        metadata.insert(key(name), value);
    };
    add("model", Value::String("gpt2".into()));
    add("pre", Value::String(pre_tokenizer(&json)?.into()));
    let (tokens, types) = tokens(&json, model.config.vocab_size)?;
    add("tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
    add("token_type", Value::Array(types.into_iter().map(|kind| Value::I32(kind as i32)).collect()));
    add("merges", Value::Array(merges.into_iter().map(Value::String).collect()));
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

/// A merge in one line.
fn merge(json: &Json) -> Result<String> {
    let pair = || Some([json[0].as_str()?, json[1].as_str()?].join(" "));
    json.as_str()
        .map(str::to_owned)
        .or_else(pair)
        .ok_or_else(|| format!("the tokenizer has the merge {json}"))
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
