//! The tokenizer in a GGUF file's metadata.
//!
//! `tokenizer.ggml.model` names the kind: `gpt2` is byte-level BPE with its merges; `llama` is SentencePiece's
//! BPE, whose merges follow from the scores of the tokens. How text is cut before byte-level BPE is named by
//! `tokenizer.ggml.pre`; the patterns are those of the models' own `tokenizer.json` files and of
//! llama.cpp's src/llama-vocab.cpp.

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

/// The kinds of tokens, as `tokenizer.ggml.token_type` numbers them.
const CONTROL: i128 = 3;
const USER_DEFINED: i128 = 4;

/// The longest token of a SentencePiece vocabulary, in characters; its merges are searched at every place.
const LONGEST: usize = 1 << 10;

/// The space of SentencePiece.
const SPACE: &str = "\u{2581}";

/// Where a text is cut before byte-level BPE.
struct Cuts {
    /// Names of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// Each digit stands alone.
    digits: bool,
    /// Patterns whose matches are pieces, one after the other; none stands for GPT-2's.
    patterns: &'static [&'static str],
    /// Characters are composed first.
    nfc: bool,
    /// A piece that is a token is that token, whatever the merges say.
    whole: bool,
    /// A text starts with the begin token unless the file says otherwise.
    begin: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const CUTS: [Cuts; 5] = [
    Cuts {
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
        whole: false,
        begin: false,
    },
    Cuts {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        digits: true,
        patterns: &[],
        nfc: false,
        whole: false,
        begin: false,
    },
    Cuts {
        names: &["llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"],
        digits: false,
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        nfc: false,
        whole: true,
        begin: true,
    },
    Cuts {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        digits: false,
        patterns: &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        nfc: true,
        whole: false,
        begin: false,
    },
    // What llama.cpp takes where a file names nothing.
    Cuts {
        names: &["default"],
        digits: false,
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        nfc: false,
        whole: false,
        begin: false,
    },
];

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

fn invalid(e: tokenizers::Error) -> String {
    format!("the tokenizer contradicts itself: {e}")
}

/// The tokenizer. `rows` is the number of tokens that the model knows.
pub(super) fn tokenizer(header: &Header, rows: usize) -> Result<Tokenizer> {
    let tokens = header.texts(&key("tokens"))?.ok_or("key tokenizer.ggml.tokens is missing")?;
    if tokens.is_empty() || tokens.len() > rows {
        return Err(format!("{} tokens for a model that knows {rows}", tokens.len()));
    }
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some(twice) = tokens.iter().find(|token| !seen.insert(token.as_str())) {
        return Err(format!("token {twice:?} is there twice"));
    }
    drop(seen);
    let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
    let (mut inner, begin) = match header.text(&key("model"))? {
        Some("gpt2") => byte_level(header, vocab)?,
        Some("llama") => sentencepiece(header, tokens, vocab)?,
        Some(kind) => {
            return Err(format!("key tokenizer.ggml.model is {kind:?}; gpt2 and llama are supported"));
        }
        None => return Err("key tokenizer.ggml.model is missing".into()),
    };
    // Written out in the text they are one token, whatever stands around them.
    let types = header.integers(&key("token_type"))?.unwrap_or_default();
    if !types.is_empty() && types.len() != tokens.len() {
        return Err(format!("{} token types for {} tokens", types.len(), tokens.len()));
    }
    let of =
        |kind| tokens.iter().zip(&types).filter(move |(_, found)| **found == kind).map(|(token, _)| token);
    let special = of(CONTROL).map(|token| AddedToken::from(token.as_str(), true).normalized(false));
    inner.add_special_tokens(special).map_err(invalid)?;
    let plain = of(USER_DEFINED).map(|token| AddedToken::from(token.as_str(), false).normalized(false));
    inner.add_tokens(plain).map_err(invalid)?;
    let ends = |flag: &str, or: bool, id: &str| -> Result<Option<(String, u32)>> {
        if !header.flag(&key(flag))?.unwrap_or(or) {
            return Ok(None);
        }
        match header.size(&key(id))? {
            Some(id) => match tokens.get(id) {
                Some(token) => Ok(Some((token.clone(), id as u32))),
                None => Err(format!("token {id} is none of {}", tokens.len())),
            },
            None => Err(format!("key tokenizer.ggml.{id} is missing")),
        }
    };
    let begin = ends("add_bos_token", begin, "bos_token_id")?;
    let end = ends("add_eos_token", false, "eos_token_id")?;
    if begin.is_some() || end.is_some() {
        let piece = |(token, _): &(String, u32)| token.clone();
        let template = [begin.as_ref().map(piece), Some("$A".to_owned()), end.as_ref().map(piece)];
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

/// GPT-2's kind; and whether a text starts with the begin token.
fn byte_level(header: &Header, vocab: Vocab) -> Result<(tokenizers::Tokenizer, bool)> {
    let pre = header.text(&key("pre"))?.unwrap_or("default");
    let Some(cuts) = CUTS.iter().find(|cuts| cuts.names.contains(&pre)) else {
        let known = CUTS.map(|cuts| cuts.names.join(", ")).join(", ");
        return Err(format!(
            "key tokenizer.ggml.pre is {pre:?}, which is not supported (supported: {known})"
        ));
    };
    let lines = header.texts(&key("merges"))?.ok_or("key tokenizer.ggml.merges is missing")?;
    let mut merges = Merges::with_capacity(lines.len());
    for line in lines {
        // A token is at least one character long, which may be a space.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let Some(at) = line[first..].find(' ').map(|at| at + first) else {
            return Err(format!("merge {line:?} is no pair of tokens"));
        };
        let (left, right) = (&line[..at], &line[at + 1..]);
        // The library trusts that a merge gives a token.
        for token in [left, right, &[left, right].concat()] {
            if !vocab.contains_key(token) {
                return Err(format!("merge {line:?}: there is no token {token:?}"));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    let model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(cuts.whole).build();
    let mut inner = tokenizers::Tokenizer::new(model.map_err(invalid)?);
    let mut pieces: Vec<PreTokenizerWrapper> = Vec::new();
    if cuts.digits {
        pieces.push(Digits::new(true).into());
    }
    for pattern in cuts.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_owned());
        pieces.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(invalid)?.into());
    }
    pieces.push(ByteLevel::new(false, false, cuts.patterns.is_empty()).into());
    inner.with_pre_tokenizer(Some(PreTokenizers::new(pieces)));
    inner.with_decoder(Some(ByteLevel::new(false, false, false)));
    if cuts.nfc {
        inner.with_normalizer(Some(NFC)).map_err(invalid)?;
    }
    Ok((inner, cuts.begin))
}

/// SentencePiece's kind: of two neighbours the pair is merged whose token has the greatest score.
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
        if token.chars().count() > LONGEST {
            return Err(format!("token {id} has more than {LONGEST} characters"));
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
    let unknown =
        tokens.get(unknown).ok_or_else(|| format!("token {unknown} is none of {}", tokens.len()))?;
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
        steps.push(Prepend::new(SPACE.to_owned()).into());
    }
    steps.push(Replace::new(" ", SPACE).map_err(invalid)?.into());
    inner.with_normalizer(Some(Normalizers::new(steps))).map_err(invalid)?;
    let mut steps: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(invalid)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    inner.with_decoder(Some(Decoders::new(steps)));
    Ok((inner, true))
}
