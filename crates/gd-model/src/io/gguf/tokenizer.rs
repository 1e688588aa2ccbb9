//! The tokenizer in the metadata of a GGUF file.
//!
//! `tokenizer.ggml.model` is the kind: `gpt2` is byte-level BPE with its merges; `llama` is SentencePiece BPE, whose merges
//! follow from the scores of the tokens. `tokenizer.ggml.pre` is the pre-tokenizer of byte-level BPE. The patterns are those
//! of the `tokenizer.json` files of the models and of llama.cpp's src/llama-vocab.cpp.

use std::collections::HashSet;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::header::Header;
use crate::io::tokenizer::Tokenizer;

type Result<T> = std::result::Result<T, String>;

/// Values of `tokenizer.ggml.token_type`.
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

/// The maximal length in characters of a token of a SentencePiece vocabulary. The search for its merges tries every split
/// of the token.
const MAX_TOKEN_CHARS: usize = 1 << 10;

/// The character that stands for a space in SentencePiece.
const SENTENCEPIECE_SPACE: &str = "\u{2581}";

/// A pre-tokenizer of byte-level BPE.
struct PreTokenizer {
    /// Its names in `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Whether each digit is a token of its own.
    digits: bool,
    /// The patterns that split the text, applied in this order; empty for the pattern of GPT-2.
    patterns: &'static [&'static str],
    /// Whether the text is normalized to NFC first.
    nfc: bool,
    /// Whether a segment that is a token becomes this token regardless of the merges (`ignore_merges`).
    ignore_merges: bool,
    /// Whether a text starts with the begin token by default.
    add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const PRE_TOKENIZERS: [PreTokenizer; 5] = [
    PreTokenizer {
        names: &[
            "gpt-2",
            "gpt2",
            "phi-2",
            "jina-es",
            "jina-de",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
        ],
        digits: false,
        patterns: &[],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        digits: true,
        patterns: &[],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"],
        digits: false,
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        digits: false,
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    // The default of llama.cpp.
    PreTokenizer {
        names: &["default"],
        digits: false,
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
];

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

fn invalid(e: tokenizers::Error) -> String {
    format!("the tokenizer is inconsistent: {e}")
}

/// Builds the tokenizer. `vocab_size` is the number of rows of the model's embedding.
pub(super) fn tokenizer(header: &Header, vocab_size: usize) -> Result<Tokenizer> {
    let tokens = header.texts(&key("tokens"))?.ok_or("key tokenizer.ggml.tokens is missing")?;
    if tokens.is_empty() || tokens.len() > vocab_size {
        return Err(format!("{} tokens for a model with a vocabulary of {vocab_size}", tokens.len()));
    }
    let mut unique = HashSet::with_capacity(tokens.len());
    if let Some(duplicate) = tokens.iter().find(|token| !unique.insert(token.as_str())) {
        return Err(format!("token {duplicate:?} occurs twice"));
    }
    drop(unique);
    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    let (mut inner, add_bos) = match header.text(&key("model"))? {
        Some("gpt2") => byte_level(header, vocab)?,
        Some("llama") => sentencepiece(header, tokens, vocab)?,
        Some(kind) => {
            return Err(format!("key tokenizer.ggml.model is {kind:?}; gpt2 and llama are supported"));
        }
        None => return Err("key tokenizer.ggml.model is missing".into()),
    };
    // Control and user-defined tokens in a text are never split.
    let types = header.integers(&key("token_type"))?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(format!("{} token types for {} tokens", types.len(), tokens.len()));
    }
    let of = |kind| {
        tokens.iter().zip(&types).filter(move |(_, token_kind)| **token_kind == kind).map(|(token, _)| token)
    };
    let special = of(CONTROL).map(|token| AddedToken::from(token.as_str(), true).normalized(false));
    inner.add_special_tokens(special).map_err(invalid)?;
    let plain = of(USER_DEFINED).map(|token| AddedToken::from(token.as_str(), false).normalized(false));
    inner.add_tokens(plain).map_err(invalid)?;
    let added = |flag: &str, default: bool, id: &str| -> Result<Option<(String, u32)>> {
        if !header.flag(&key(flag))?.unwrap_or(default) {
            return Ok(None);
        }
        match header.size(&key(id))? {
            Some(id) => match tokens.get(id) {
                Some(token) => Ok(Some((token.clone(), id as u32))),
                None => Err(format!("token {id} is not in the vocabulary of {}", tokens.len())),
            },
            None => Err(format!("key tokenizer.ggml.{id} is missing")),
        }
    };
    let begin = added("add_bos_token", add_bos, "bos_token_id")?;
    let end = added("add_eos_token", false, "eos_token_id")?;
    if begin.is_some() || end.is_some() {
        let text = |(token, _): &(String, u32)| token.clone();
        let template = [begin.as_ref().map(text), Some("$A".to_owned()), end.as_ref().map(text)];
        let processing = TemplateProcessing::builder()
            .try_single(template.into_iter().flatten().collect::<Vec<_>>())
            .and_then(|builder| {
                let mut special: Vec<_> = begin.into_iter().chain(end).collect();
                special.dedup();
                builder.special_tokens(special).build().map_err(|e| e.to_string())
            })
            .map_err(|e| format!("the begin and end tokens: {e}"))?;
        inner.with_post_processor(Some(processing));
    }
    Tokenizer::checked(inner)
}

/// Builds a byte-level BPE tokenizer as that of GPT-2. Also returns whether a text starts with the begin token by default.
fn byte_level(header: &Header, vocab: Vocab) -> Result<(tokenizers::Tokenizer, bool)> {
    let pre = header.text(&key("pre"))?.unwrap_or("default");
    let Some(pre_tokenizer) = PRE_TOKENIZERS.iter().find(|candidate| candidate.names.contains(&pre)) else {
        let supported = PRE_TOKENIZERS.map(|candidate| candidate.names.join(", ")).join(", ");
        return Err(format!(
            "key tokenizer.ggml.pre is {pre:?}, which is not supported (supported: {supported})"
        ));
    };
    let lines = header.texts(&key("merges"))?.ok_or("key tokenizer.ggml.merges is missing")?;
    let mut merges = Merges::with_capacity(lines.len());
    for line in lines {
        // The first token of the pair has at least one character, which may be a space.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let Some(at) = line[first..].find(' ').map(|at| at + first) else {
            return Err(format!("merge {line:?} is no pair of tokens"));
        };
        let (left, right) = (&line[..at], &line[at + 1..]);
        // The library does not check that the result of a merge is a token.
        for token in [left, right, &[left, right].concat()] {
            if !vocab.contains_key(token) {
                return Err(format!("merge {line:?}: there is no token {token:?}"));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model =
        BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(pre_tokenizer.ignore_merges).build();
    let mut inner = tokenizers::Tokenizer::new(model.map_err(invalid)?);
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    if pre_tokenizer.digits {
        steps.push(Digits::new(true).into());
    }
    for pattern in pre_tokenizer.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(invalid)?.into());
    }
    steps.push(ByteLevel::new(false, false, pre_tokenizer.patterns.is_empty()).into());
    inner.with_pre_tokenizer(Some(PreTokenizers::new(steps)));
    inner.with_decoder(Some(ByteLevel::new(false, false, false)));
    if pre_tokenizer.nfc {
        inner.with_normalizer(Some(NFC)).map_err(invalid)?;
    }
    Ok((inner, pre_tokenizer.add_bos))
}

/// Builds a SentencePiece BPE tokenizer. Of all adjacent pairs, the one whose merged token has the highest score is merged
/// first. Also returns whether a text starts with the begin token by default.
fn sentencepiece(header: &Header, tokens: &[String], vocab: Vocab) -> Result<(tokenizers::Tokenizer, bool)> {
    let scores = header.floats(&key("scores"))?.ok_or("key tokenizer.ggml.scores is missing")?;
    if scores.len() != tokens.len() {
        return Err(format!("{} scores for {} tokens", scores.len(), tokens.len()));
    }
    if let Some(i) = scores.iter().position(|score| score.is_nan()) {
        return Err(format!("the score of token {i} is NaN"));
    }
    let mut pairs: Vec<(usize, u32, u32)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if token.chars().count() > MAX_TOKEN_CHARS {
            return Err(format!("token {id} has more than {MAX_TOKEN_CHARS} characters"));
        }
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (vocab.get(&token[..at]), vocab.get(&token[at..])) {
                pairs.push((id, left, right));
            }
        }
    }
    pairs.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.1, a.2).cmp(&(b.1, b.2))));
    let text = |id: u32| tokens[id as usize].clone();
    let merges = pairs.into_iter().map(|(_, left, right)| (text(left), text(right))).collect();
    let unknown = header.size(&key("unknown_token_id"))?.unwrap_or(0);
    let unknown = tokens
        .get(unknown)
        .ok_or_else(|| format!("token {unknown} is not in the vocabulary of {}", tokens.len()))?;
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(unknown.clone())
        .fuse_unk(true)
        .byte_fallback(true)
        .build();
    let mut inner = tokenizers::Tokenizer::new(model.map_err(invalid)?);
    let prefix = header.flag(&key("add_space_prefix"))?.unwrap_or(true);
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        steps.push(Prepend::new(SENTENCEPIECE_SPACE.to_owned()).into());
    }
    steps.push(Replace::new(" ", SENTENCEPIECE_SPACE).map_err(invalid)?.into());
    inner.with_normalizer(Some(Normalizers::new(steps))).map_err(invalid)?;
    let mut steps: Vec<DecoderWrapper> = vec![
        Replace::new(SENTENCEPIECE_SPACE, " ").map_err(invalid)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(Decoders::new(steps)));
    Ok((inner, true))
}
