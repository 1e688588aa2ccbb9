//! Limits on how much a tokenizer from a file may lengthen a text.
//!
//! A normaliser may replace a text by a longer one, and a sequence of them may do so again and again: 40 that double it make a
//! terabyte of a byte. So the length after each step is bounded before the step is made.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::normalizers::Replace;
use tokenizers::{DecoderWrapper, NormalizedString, Normalizer, NormalizerWrapper};

/// The factor by which a text may become longer, and the number of bytes that are allowed in addition.
const MAX_FACTOR: usize = 64;
const ADDITIONAL_BYTES: usize = 1 << 20;
/// The factor by which a decoder may lengthen the text of a token.
const MAX_DECODER_FACTOR: usize = 1 << 10;
/// The factor of the Unicode normal forms: U+FDFA of 3 bytes becomes 33 bytes.
const UNICODE_FACTOR: usize = 11;

/// The parts of a `tokenizer.json` that can lengthen a text, and the texts that are normalized when it is loaded.
#[derive(Deserialize)]
struct Written {
    normalizer: Option<NormalizerWrapper>,
    decoder: Option<DecoderWrapper>,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    content: String,
}

/// Checks a `tokenizer.json` before the library loads it, which normalizes the added tokens.
pub(super) fn check_file(bytes: &[u8]) -> Result<(), String> {
    // The library reports what cannot be read.
    let Ok(Written { normalizer, decoder, added_tokens }) = serde_json::from_slice(bytes) else {
        return Ok(());
    };
    if let Some(normalizer) = normalizer.filter(can_grow) {
        added_tokens.iter().try_for_each(|token| check(&normalizer, &token.content))?;
    }
    match decoder.as_ref().map_or(1, decoder_factor) {
        factor if factor > MAX_DECODER_FACTOR => Err(format!(
            "its decoder may make a text {factor} times as long; at most {MAX_DECODER_FACTOR} is possible"
        )),
        _ => Ok(()),
    }
}

/// Whether a normaliser could make a text longer than allowed, so that [`check`] is necessary.
pub(super) fn can_grow(normalizer: &NormalizerWrapper) -> bool {
    let length = |before: usize, step: &NormalizerWrapper| longest(step, before);
    steps(normalizer).into_iter().fold(ADDITIONAL_BYTES, length) > MAX_FACTOR * ADDITIONAL_BYTES
}

/// Checks that a text does not become too long, step by step.
pub(super) fn check(normalizer: &NormalizerWrapper, text: &str) -> Result<(), String> {
    let limit = text.len().saturating_mul(MAX_FACTOR).saturating_add(ADDITIONAL_BYTES);
    let mut normalized = NormalizedString::from(text);
    for step in steps(normalizer) {
        let length = match step {
            NormalizerWrapper::Replace(replace) => replaced(replace, normalized.get()),
            other => longest(other, normalized.get().len()),
        };
        if length > limit {
            return Err(format!(
                "its normalizer may make {length} bytes of a text of {}; at most {limit} are possible",
                text.len()
            ));
        }
        step.normalize(&mut normalized).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// The steps of a normaliser in their order.
fn steps(normalizer: &NormalizerWrapper) -> Vec<&NormalizerWrapper> {
    match normalizer {
        NormalizerWrapper::Sequence(sequence) => sequence.as_ref().iter().flat_map(steps).collect(),
        step => vec![step],
    }
}

/// The maximal length in bytes of a text of `before` bytes after a step.
fn longest(step: &NormalizerWrapper, before: usize) -> usize {
    match step {
        NormalizerWrapper::Sequence(sequence) => {
            sequence.as_ref().iter().fold(before, |length, step| longest(step, length))
        }
        NormalizerWrapper::Replace(replace) => match text_pattern(replace) {
            Some(pattern) => {
                let more = replace.content.len().saturating_sub(pattern.len());
                before.saturating_add((before / pattern.len()).saturating_mul(more))
            }
            None => after_regex(replace, before),
        },
        NormalizerWrapper::Prepend(prepend) => before.saturating_add(prepend.prepend.len()),
        NormalizerWrapper::Precompiled(map) => before.saturating_mul(longest_of_map(map)),
        NormalizerWrapper::BertNormalizer(_)
        | NormalizerWrapper::NFC(_)
        | NormalizerWrapper::NFD(_)
        | NormalizerWrapper::NFKC(_)
        | NormalizerWrapper::NFKD(_) => before.saturating_mul(UNICODE_FACTOR),
        NormalizerWrapper::Lowercase(_) => before.saturating_mul(3),
        NormalizerWrapper::ByteLevel(_) => before.saturating_mul(2),
        NormalizerWrapper::StripNormalizer(_)
        | NormalizerWrapper::StripAccents(_)
        | NormalizerWrapper::Nmt(_) => before,
    }
}

/// The length of `text` after the replacement: exact for a pattern that is a text, else the maximum.
fn replaced(replace: &Replace, text: &str) -> usize {
    match text_pattern(replace) {
        Some(pattern) => {
            let count = text.matches(pattern.as_str()).count();
            let added = count.saturating_mul(replace.content.len());
            (text.len() - count * pattern.len()).saturating_add(added)
        }
        None => after_regex(replace, text.len()),
    }
}

/// The maximal length if a regular expression matches between all bytes.
fn after_regex(replace: &Replace, before: usize) -> usize {
    before.saturating_add(before.saturating_add(1).saturating_mul(replace.content.len()))
}

/// The pattern of a replacement if it is a text and not empty.
fn text_pattern(replace: &Replace) -> Option<String> {
    let json = serde_json::to_value(replace).ok()?;
    let pattern = json.get("pattern")?.get("String")?.as_str()?;
    (!pattern.is_empty()).then(|| pattern.to_owned())
}

/// The length of the longest text that a map of SentencePiece gives a character. The map is the size of a trie (u32), the trie,
/// and the texts, which end with a zero byte.
fn longest_of_map(map: &tokenizers::normalizers::Precompiled) -> usize {
    let longest = || -> Option<usize> {
        let json = serde_json::to_value(map).ok()?;
        let bytes: Vec<u8> = match json.get("precompiled_charsmap")? {
            Value::String(text) => {
                base64::engine::Engine::decode(&base64::prelude::BASE64_STANDARD, text).ok()?
            }
            _ => return None,
        };
        let (size, rest) = bytes.split_first_chunk::<4>()?;
        let texts = rest.get(u32::from_le_bytes(*size) as usize..)?;
        texts.split(|b| *b == 0).map(<[u8]>::len).max()
    };
    longest().unwrap_or(usize::MAX).max(1)
}

/// The factor by which a decoder may lengthen the text of a token.
fn decoder_factor(decoder: &DecoderWrapper) -> usize {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            let factors = sequence.get_decoders().iter().map(decoder_factor);
            factors.fold(1, usize::saturating_mul)
        }
        DecoderWrapper::Replace(replace) => {
            let replaced = text_pattern(replace).map_or(1, |pattern| pattern.len());
            replace.content.len().div_ceil(replaced).saturating_add(1)
        }
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalizer(steps: usize, pattern: &str, content: &str) -> NormalizerWrapper {
        let step = format!(r#"{{"type": "Replace", "pattern": {pattern}, "content": "{content}"}}"#);
        let steps = vec![step; steps].join(",");
        serde_json::from_str(&format!(r#"{{"type": "Sequence", "normalizers": [{steps}]}}"#)).unwrap()
    }

    #[test]
    fn usual_normalizers_cannot_grow_and_doubling_ones_are_stopped() {
        let usual = r#"{"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "NFKC"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}"#;
        assert!(!can_grow(&serde_json::from_str(usual).unwrap()));
        for pattern in [r#"{"String": "a"}"#, r#"{"Regex": "a"}"#] {
            let doubling = normalizer(40, pattern, "aa");
            assert!(can_grow(&doubling));
            let error = check(&doubling, "a").unwrap_err();
            assert!(error.contains("of a text of 1;"), "{error}");
            // A text without the pattern does not grow.
            assert!(check(&normalizer(40, r#"{"String": "a"}"#, "aa"), "b").is_ok());
        }
        let long = normalizer(1, r#"{"String": "a"}"#, &"x".repeat(1000));
        assert!(can_grow(&long) && check(&long, &"a".repeat(2000)).is_err());
        assert!(check(&long, &"ab ".repeat(3)).is_ok());
    }

    #[test]
    fn a_file_is_checked_before_it_is_loaded() {
        let step = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
        let steps = vec![step; 40].join(",");
        let sequence = |key: &str| format!(r#"{{"type": "Sequence", "{key}": [{steps}]}}"#);
        let file = format!(
            r#"{{"normalizer": {}, "added_tokens": [{{"content": "a", "id": 3}}]}}"#,
            sequence("normalizers")
        );
        assert!(check_file(file.as_bytes()).unwrap_err().contains("normalizer"));
        let file = format!(r#"{{"decoder": {}}}"#, sequence("decoders"));
        assert!(check_file(file.as_bytes()).unwrap_err().contains("decoder"));
        assert!(check_file(b"{}").is_ok() && check_file(b"[").is_ok());
    }
}
