//! The tokenizer in the metadata of a GGUF file.
//!
//! `tokenizer.ggml.model` is the kind: `gpt2` is byte-level BPE with its merges; `llama` is SentencePiece BPE, whose merges
//! follow from the scores of the tokens. `tokenizer.ggml.pre` is the pre-tokenizer of byte-level BPE.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::header::Header;
use super::pre_tokenizer::PreTokenizer;
use super::special_tokens::SpecialTokens;
use crate::io::sentencepiece::Scores;
use crate::io::tokenizer::Tokenizer;

type Result<T> = std::result::Result<T, String>;

/// Values of `tokenizer.ggml.token_type`.
pub(super) const UNKNOWN: i128 = 2;
pub(super) const CONTROL: i128 = 3;
pub(super) const USER_DEFINED: i128 = 4;

/// The maximal length in characters of a token of a SentencePiece vocabulary. The search for its merges tries every split
/// of the token.
const MAX_TOKEN_CHARS: usize = 1 << 10;

/// The first tokens of a SentencePiece vocabulary.
const SENTENCEPIECE_TOKENS: [&str; 3] = ["<unk>", "<s>", "</s>"];

/// The character that stands for a space in SentencePiece.
pub(super) const SENTENCEPIECE_SPACE: &str = "\u{2581}";

/// The key of this name.
pub(super) fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

fn invalid(e: tokenizers::Error) -> String {
    format!("the tokenizer is inconsistent: {e}")
}

/// Builds the tokenizer, and finds its special tokens. `path` is for warnings.
pub(super) fn tokenizer(path: &Path, header: &Header) -> Result<(Tokenizer, SpecialTokens)> {
    let tokens = tokens(header)?;
    let tokens: &[String] = &tokens;
    let types = header.integers(&key("token_type"))?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(format!("{} token types for {} tokens", types.len(), tokens.len()));
    }
    let is_sentencepiece = match header.text(&key("model"))? {
        Some("gpt2") => false,
        Some("llama") => true,
        Some(kind) => {
            return Err(format!("key tokenizer.ggml.model is {kind:?}; gpt2 and llama are supported"));
        }
        None => return Err("key tokenizer.ggml.model is missing".into()),
    };
    let defaults: &[&str] = if is_sentencepiece { &SENTENCEPIECE_TOKENS } else { &[] };
    let may_end = |id: usize| types.get(id).is_none_or(|kind| [CONTROL, USER_DEFINED].contains(kind));
    let special = SpecialTokens::read(path, header, tokens, defaults, may_end)?;
    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    let (mut inner, add_bos, scores) = if is_sentencepiece {
        let (inner, scores) = sentencepiece(header, tokens, vocab, special.unknown)?;
        (inner, true, Some(scores))
    } else {
        let (inner, add_bos) = byte_level(header, vocab)?;
        (inner, add_bos, None)
    };
    // Control, unknown and user-defined tokens in a text are never split.
    let of = |kinds: &'static [i128]| {
        tokens
            .iter()
            .zip(&types)
            .filter(move |(_, kind)| kinds.contains(kind))
            .map(|(token, _)| token.as_str())
    };
    let control = of(&[CONTROL, UNKNOWN]).map(|token| AddedToken::from(token, true).normalized(false));
    inner.add_special_tokens(control).map_err(invalid)?;
    let plain = of(&[USER_DEFINED]).map(|token| AddedToken::from(token, false).normalized(false));
    inner.add_tokens(plain).map_err(invalid)?;
    let added = |flag: &str, default: bool, id: Option<usize>, name: &str| -> Result<Option<(String, u32)>> {
        let flag = header.flag(&key(flag))?;
        if flag == Some(true) && id.is_none() && header.index(&key(name), tokens.len())?.is_none() {
            return Err(format!("key tokenizer.ggml.{name} is missing"));
        }
        Ok(id.filter(|_| flag.unwrap_or(default)).map(|id| (tokens[id].clone(), id as u32)))
    };
    let begin = added("add_bos_token", add_bos, special.begin, "bos_token_id")?;
    let end = added("add_eos_token", false, special.end, "eos_token_id")?;
    if begin.is_some() || end.is_some() {
        inner.with_post_processor(Some(surrounded(begin, end)?));
    }
    let tokenizer = Tokenizer::checked(inner)?;
    Ok(match scores {
        Some(scores) => (tokenizer.with_scores(scores), special),
        None => (tokenizer, special),
    })
}

/// The tokens by id. As in llama.cpp, an empty token gets a name that no text has.
fn tokens(header: &Header) -> Result<Cow<'_, [String]>> {
    let tokens = header.texts(&key("tokens"))?.ok_or("key tokenizer.ggml.tokens is missing")?;
    if tokens.is_empty() {
        return Err("key tokenizer.ggml.tokens is an empty list".into());
    }
    let tokens = match tokens.iter().any(String::is_empty) {
        false => Cow::Borrowed(tokens),
        true => {
            let named = |(id, token): (usize, &String)| match token.is_empty() {
                true => format!("[EMPTY_{id}]"),
                false => token.clone(),
            };
            tokens.iter().enumerate().map(named).collect()
        }
    };
    let mut unique = HashSet::with_capacity(tokens.len());
    match tokens.iter().find(|token| !unique.insert(token.as_str())) {
        Some(duplicate) => Err(format!("token {duplicate:?} occurs twice")),
        None => Ok(tokens),
    }
}

/// The post-processor that puts a begin token before a text and an end token after it.
fn surrounded(begin: Option<(String, u32)>, end: Option<(String, u32)>) -> Result<TemplateProcessing> {
    let text = |(token, _): &(String, u32)| token.clone();
    let template = [begin.as_ref().map(text), Some("$A".to_owned()), end.as_ref().map(text)];
    TemplateProcessing::builder()
        .try_single(template.into_iter().flatten().collect::<Vec<_>>())
        .and_then(|builder| {
            let mut special: Vec<_> = begin.into_iter().chain(end).collect();
            special.dedup();
            builder.special_tokens(special).build().map_err(|e| e.to_string())
        })
        .map_err(|e| format!("the begin and end tokens: {e}"))
}

/// Builds a byte-level BPE tokenizer as that of GPT-2. Also returns whether a text starts with the begin token by default.
fn byte_level(header: &Header, vocab: Vocab) -> Result<(tokenizers::Tokenizer, bool)> {
    let pre_tokenizer = PreTokenizer::find(header.text(&key("pre"))?.unwrap_or("default"))?;
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
    Ok((inner, pre_tokenizer.add_bos))
}

/// Builds a SentencePiece BPE tokenizer, and returns the scores that decide the order of its merges.
fn sentencepiece(
    header: &Header,
    tokens: &[String],
    vocab: Vocab,
    unknown: Option<usize>,
) -> Result<(tokenizers::Tokenizer, Scores)> {
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
    let merged: Vec<usize> = pairs.iter().map(|(id, ..)| *id).collect();
    let merges = pairs.into_iter().map(|(_, left, right)| (text(left), text(right))).collect();
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .unk_token(tokens[unknown.unwrap_or(0)].clone())
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
    Ok((inner, Scores::new(scores, merged.into_iter())))
}
