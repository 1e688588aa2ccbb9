//! The metadata of a SentencePiece tokenizer, for llama.cpp: the scores of its tokens and how it treats spaces.
//!
//! SentencePiece merges the pair of adjacent symbols whose token has the highest score, whatever its two parts are. A
//! `tokenizer.json` lists pairs in the order in which they are merged instead: for a vocabulary of SentencePiece, all
//! pairs of its tokens by descending score of the token, then by descending length of the left and of the right part
//! (`SentencePieceExtractor` of transformers).

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use super::tokenizer::SENTENCEPIECE_SPACE;

type Result<T> = std::result::Result<T, String>;

/// The scores of the tokens by id, which the order of the merges follows from. The tokens of the first merges have the
/// score 0, the next ones -1. Tokens whose merges alternate in the list have equal scores. What no merge results in needs
/// no score and has 0.
///
/// # Errors
/// Names the tokens whose merges have another order than that of scores, or are missing.
pub(super) fn scores(json: &Json, merges: &[(String, String)], tokens: &[String]) -> Result<Vec<f32>> {
    let results: Vec<String> = merges.iter().map(|(left, right)| [left.as_str(), right].concat()).collect();
    let last: HashMap<&str, usize> = results.iter().map(String::as_str).zip(0..).collect();
    let (mut scores, mut score, mut end, mut alternating) = (HashMap::new(), 0.0, 0, false);
    for (at, token) in results.iter().enumerate() {
        if at > end {
            (score, alternating) = (score - 1.0, false);
        } else if at > 0 && token != &results[at - 1] {
            alternating = true;
        }
        end = end.max(last[token.as_str()]);
        scores.insert(token.as_str(), score);
        let lengths = |at: usize| (merges[at].0.chars().count(), merges[at].1.chars().count());
        if alternating && lengths(at) > lengths(at - 1) {
            return Err(format!(
                "the merges of the token {token:?} are among those of other tokens, and not in the order of equal scores"
            ));
        }
    }
    let pairs: HashSet<(&str, &str)> =
        merges.iter().map(|(left, right)| (left.as_str(), right.as_str())).collect();
    let vocab = json["model"]["vocab"].as_object().ok_or("the tokenizer has no vocabulary")?;
    let added: HashSet<&str> = json["added_tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|token| token["content"].as_str())
        .collect();
    // Added tokens are found in a text before anything is merged.
    for token in vocab.keys().filter(|token| !added.contains(token.as_str())) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocab.contains_key(left) && vocab.contains_key(right) && !pairs.contains(&(left, right)) {
                return Err(format!(
                    "the tokenizer does not merge {left:?} and {right:?}; by its scores llama.cpp would, to the token {token:?}"
                ));
            }
        }
    }
    Ok(tokens.iter().map(|token| scores.get(token.as_str()).copied().unwrap_or(0.0)).collect())
}

/// Whether a text gets a space before it. A `Metaspace` does so unless the text already starts with one; llama.cpp, as
/// SentencePiece, always, so that such a text has other tokens there.
///
/// # Errors
/// Names a normalizer and a pre-tokenizer that are not those of SentencePiece.
pub(super) fn adds_space_prefix(json: &Json) -> Result<bool> {
    let (normalizer, pre) = (&json["normalizer"], &json["pre_tokenizer"]);
    let steps = match normalizer["normalizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None if normalizer.is_null() => Vec::new(),
        None => vec![normalizer],
    };
    let prepends = |step: &Json| step["type"] == "Prepend" && step["prepend"] == SENTENCEPIECE_SPACE;
    let replaces = |step: &Json| {
        step["type"] == "Replace"
            && step["pattern"]["String"] == " "
            && step["content"] == SENTENCEPIECE_SPACE
    };
    match steps[..] {
        [first, second] if prepends(first) && replaces(second) && pre.is_null() => Ok(true),
        [only] if replaces(only) && pre.is_null() => Ok(false),
        // With `split`, tokens do not extend over words, which scores do not express.
        [] if pre["type"] == "Metaspace"
            && pre["replacement"] == SENTENCEPIECE_SPACE
            && pre["split"] == false =>
        {
            Ok(pre["prepend_scheme"] != "never")
        }
        _ => Err(format!(
            "the tokenizer has the normalizer {normalizer} and the pre-tokenizer {pre}, which GGUF lacks"
        )),
    }
}
