//! The added tokens that a checkpoint names beside its `tokenizer.json`.
//!
//! | file | content |
//! |---|---|
//! | `tokenizer_config.json` | `added_tokens_decoder`: tokens with their properties by id; special tokens by name (`eos_token`, …) |
//! | `added_tokens.json` | ids by token |
//! | `special_tokens_map.json` | special tokens by name |
//!
//! As in `transformers`, an added token that the vocabulary lacks gets the next free id, an added token in a text is never
//! split, and the properties in `added_tokens_decoder` take precedence over those in `tokenizer.json`. A special token that
//! is named without an id is used if it is in the vocabulary.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use super::checkpoint::{TOKENIZER_CONFIG, load_json};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result, shorten};

const ADDED_TOKENS: &str = "added_tokens.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

/// The names of special tokens.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The key of the list of all other special tokens.
const ADDITIONAL: &str = "additional_special_tokens";

/// Adds the tokens that the files in `folder` name to the tokenizer of the folder. Tokens whose ids do not continue the
/// vocabulary are left out with a warning.
///
/// # Errors
/// [`Error::Foreign`] for a file that is not JSON or has values of other types.
pub fn apply(folder: &Path, tokenizer: Tokenizer) -> Result<Tokenizer> {
    let mut tokens: BTreeMap<u32, AddedToken> = BTreeMap::new();
    let mut special = BTreeSet::new();
    for name in [ADDED_TOKENS, TOKENIZER_CONFIG, SPECIAL_TOKENS] {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let content = load_json(&path)?;
        let foreign = |reason: String| Error::Foreign { path: path.clone(), kind: "JSON", reason };
        special.extend(special_tokens(&content));
        if name == ADDED_TOKENS {
            let new = ids_by_token(&content).map_err(foreign)?;
            tokens.extend(new.into_iter().filter(|(_, token)| !tokenizer.is_added(&token.content)));
        } else {
            tokens.extend(tokens_by_id(content.get("added_tokens_decoder")).map_err(foreign)?);
        }
    }
    let (mut added, mut left_out) = (Vec::new(), Vec::new());
    let mut next = tokenizer.next_added_id();
    for (id, mut token) in tokens {
        token.special |= special.remove(&token.content);
        let expected = tokenizer.token_id(&token.content).unwrap_or(next);
        if id != expected {
            left_out.push(format!("{:?} (id {id}, {expected} expected)", token.content));
            continue;
        }
        next += u32::from(id == next);
        added.push(token);
    }
    if !left_out.is_empty() {
        let (at, list) = (folder.display(), shorten(&left_out));
        tracing::warn!(
            "{at}: {} added tokens do not fit to the vocabulary and are left out: {list}",
            left_out.len()
        );
    }
    let named = |token: &String| tokenizer.token_id(token).is_some() && !tokenizer.is_added(token);
    added.extend(special.into_iter().filter(named).map(|token| AddedToken::from(token, true)));
    tokenizer.with_added_tokens(added)
}

/// The tokens of `added_tokens.json`.
fn ids_by_token(content: &Value) -> std::result::Result<BTreeMap<u32, AddedToken>, String> {
    let keys = content.as_object().ok_or("it is no table of tokens and ids")?;
    let token = |(token, id): (&String, &Value)| {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| format!("the id of {token:?} is no number from 0 on"))?;
        Ok((id, AddedToken::from(token.as_str(), false)))
    };
    keys.iter().map(token).collect()
}

/// The tokens of `added_tokens_decoder`.
fn tokens_by_id(decoder: Option<&Value>) -> std::result::Result<BTreeMap<u32, AddedToken>, String> {
    let token = |(id, properties): (&String, &Value)| {
        let invalid = || format!("added_tokens_decoder.{id} {properties} is no token with an id");
        let content = properties.get("content").and_then(Value::as_str).ok_or_else(invalid)?;
        let flag = |name: &str| properties.get(name).and_then(Value::as_bool);
        let special = flag("special").unwrap_or(false);
        let token = AddedToken::from(content, special)
            .normalized(flag("normalized").unwrap_or(!special))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false));
        Ok((id.parse().map_err(|_| invalid())?, token))
    };
    decoder.and_then(Value::as_object).into_iter().flatten().map(token).collect()
}

/// The special tokens of `tokenizer_config.json` or `special_tokens_map.json`. A token is a text, or an object with the text
/// as `content`.
fn special_tokens(content: &Value) -> impl Iterator<Item = String> {
    let additional = content.get(ADDITIONAL).and_then(Value::as_array).into_iter().flatten();
    let named = NAMES.iter().filter_map(|name| content.get(name));
    named.chain(additional).filter_map(|token| {
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(text.to_owned()).filter(|text| !text.is_empty())
    })
}
