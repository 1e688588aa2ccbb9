//! Tokenizers, stored as `tokenizer.json`.
//!
//! This module creates two kinds: bytes (256 tokens, id = byte value) and byte-level BPE, whose last token is
//! [`END_OF_TEXT`]. Both restore any UTF-8 text exactly, except that BPE encodes the text `<|endoftext|>` as that token. Any
//! other `tokenizer.json` can be loaded, with its own rules for special tokens.

mod growth;
mod stream;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, Encoding, ModelWrapper, OffsetType};

pub use self::stream::StreamDecoder;
use crate::config::BPE_VOCAB;
use crate::error::{Error, Result};
use crate::io::files::{read_file, write_file};
use crate::io::panic::catch_panic;
use crate::io::sentencepiece::Scores;

/// The number of byte values, which is the size of the smallest vocabulary.
pub const BYTES: usize = 256;

/// The end-of-text token of the vocabularies that this module creates.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The usual names of an end-of-text token.
const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"];

/// The maximal id may exceed twice the number of tokens by this. An embedding has a row for every id, used or not.
const MAX_UNUSED_IDS: usize = 1 << 16;

/// The length of a run of text from which on a vocabulary is learned from its parts.
const MAX_WORD_BYTES: usize = 512;

/// The `tokenizer.json` of [`Tokenizer::bytes`].
static BYTES_JSON: LazyLock<String> =
    LazyLock::new(|| Tokenizer::bytes().and_then(|bytes| bytes.to_json()).unwrap_or_default());

/// Converts text to token ids and back. See the [module documentation](self).
///
/// ```
/// use gd_model::io::tokenizer::Tokenizer;
///
/// let bytes = Tokenizer::bytes()?;
/// assert_eq!(bytes.encode("né")?, [110, 195, 169]);
/// assert_eq!(bytes.decode(&[110, 195, 169])?, "né");
///
/// let bpe = Tokenizer::train_bpe(["the cat, the hat, the mat"].into_iter(), 262)?;
/// assert!(bpe.encode("the cat")?.len() < "the cat".len());
/// assert_eq!(bpe.decode(&bpe.encode("the cat")?)?, "the cat");
/// # Ok::<(), gd_model::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The maximal id plus one: the number of rows of an embedding.
    vocab: usize,
    /// Whether this is the tokenizer of [`Tokenizer::bytes`], which encodes by copying the bytes.
    raw: bool,
    /// Whether the decoder is the byte-level alphabet, with which the bytes of a token do not depend on its neighbours.
    bytewise: bool,
    /// Whether its normaliser could make a text much longer.
    can_grow: bool,
    /// The scores of a SentencePiece vocabulary, which decide the order of merges in the place of the model's ranks.
    scores: Option<Arc<Scores>>,
}

impl Tokenizer {
    /// The tokenizer whose 256 tokens are the bytes, with id = byte value.
    pub fn bytes() -> Result<Self> {
        let vocab: [(String, u32); BYTES] = std::array::from_fn(|b| (ALPHABET[b].to_string(), b as u32));
        let model = BPE::builder().vocab_and_merges(vocab, vec![]).build();
        let mut inner = tokenizers::Tokenizer::new(model.map_err(invalid)?);
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        inner.with_decoder(Some(ByteLevel::new(false, false, false)));
        Ok(Self::wrap(inner, true))
    }

    /// Trains byte-level BPE of at most `vocab` tokens, including [`END_OF_TEXT`], on `texts`. There are fewer tokens
    /// ([`Tokenizer::vocab_size`]) if no pair of tokens occurs twice any more. The result depends on the texts only. A run of
    /// more than 512 bytes with or without white space is learned from in parts, because the time of the library grows with
    /// the square of the length of a word.
    ///
    /// # Errors
    /// A vocabulary of less than 257 or more than 16,777,216 tokens, or texts that are all empty.
    pub fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab: usize) -> Result<Self>
    where
        S: AsRef<str> + Send,
    {
        if !BPE_VOCAB.contains(&vocab) {
            let allowed = format!("from {} to {}", BPE_VOCAB.start(), BPE_VOCAB.end());
            return Err(Error::out_of_range("a BPE vocabulary", vocab, allowed));
        }
        let mut texts = texts.filter(|t| !t.as_ref().is_empty()).flat_map(parts).peekable();
        if texts.peek().is_none() {
            return Err(Error::Invalid("a BPE vocabulary cannot be learned from an empty text".into()));
        }
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab - 1)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .show_progress(false)
            .build();
        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
        inner.with_decoder(Some(ByteLevel::new(false, false, true)));
        let mut trainer = tokenizers::models::TrainerWrapper::from(trainer);
        inner.train(&mut trainer, texts).map_err(invalid)?;
        inner.add_special_tokens([AddedToken::from(END_OF_TEXT, true)]).map_err(invalid)?;
        Ok(Self::wrap(inner, false))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Unreadable`]; [`Error::Foreign`] for a file that is not a valid tokenizer.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read_file(path, "tokenizer file")?;
        let foreign = |reason: String| Error::Foreign { path: path.into(), kind: "tokenizer.json", reason };
        Self::from_json(&bytes).map_err(foreign)
    }

    /// The tokenizer of the content of a `tokenizer.json`. The error is the reason why it cannot be used.
    pub(crate) fn from_json(json: &[u8]) -> std::result::Result<Self, String> {
        // A damaged file can cause a panic in the library, which slices without checks in places.
        catch_panic(|| {
            growth::check_file(json)?;
            Self::checked(tokenizers::Tokenizer::from_bytes(json).map_err(|e| e.to_string())?)
        })
        .flatten()
    }

    /// Wraps a tokenizer from a file, without truncation and padding. The error is the reason why it cannot be used.
    pub(crate) fn checked(mut inner: tokenizers::Tokenizer) -> std::result::Result<Self, String> {
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let vocab = inner.get_vocab(true);
        let (count, max_id) = (vocab.len(), vocab.values().copied().max().unwrap_or(0) as usize);
        if count == 0 {
            return Err("it has no tokens".into());
        }
        if max_id > 2 * count + MAX_UNUSED_IDS {
            return Err(format!("{count} tokens, but an id of {max_id}"));
        }
        let raw = json(&inner).map_err(|e| e.to_string())? == *BYTES_JSON;
        Ok(Self::wrap(inner, raw))
    }

    /// The tokenizer with the merges in the order of `scores`, for a model BPE without a pre-tokenizer.
    pub(crate) fn with_scores(mut self, scores: Scores) -> Self {
        self.scores = Some(Arc::new(scores));
        self
    }

    /// The scores of the tokens by id, if the order of merges is that of scores.
    pub(crate) fn scores(&self) -> Option<&[f64]> {
        self.scores.as_deref().map(Scores::by_id)
    }

    /// Whether a text may have other tokens with the `tokenizer.json` of this tokenizer, because tokens with equal scores
    /// are merged from left to right, and a file states one order of all merges.
    pub(crate) fn has_equal_scores(&self) -> bool {
        self.scores.as_ref().is_some_and(|scores| scores.has_equal())
    }

    /// The tokenizer with added tokens, which are never split. A token that the vocabulary lacks gets the id
    /// [`Tokenizer::next_added_id`].
    ///
    /// # Errors
    /// [`Error::Invalid`] with the reason of the `tokenizers` library.
    pub(crate) fn with_added_tokens(mut self, tokens: Vec<AddedToken>) -> Result<Self> {
        if tokens.is_empty() {
            return Ok(self);
        }
        self.inner.add_tokens(tokens).map_err(invalid)?;
        Ok(Self { scores: self.scores, ..Self::wrap(self.inner, false) })
    }

    /// The id that the library gives to the next added token that the vocabulary lacks.
    pub(crate) fn next_added_id(&self) -> u32 {
        let size = u32::try_from(self.inner.get_vocab_size(false)).unwrap_or(u32::MAX);
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        added.keys().max().map_or(size, |max| size.max(max.saturating_add(1)))
    }

    /// Whether a token is an added one.
    pub(crate) fn is_added(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().get_vocab().contains_key(token)
    }

    /// Writes a `tokenizer.json`. An existing file is replaced atomically.
    ///
    /// # Errors
    /// [`Error::Unwritable`].
    pub fn save(&self, path: &Path) -> Result<()> {
        write_file(path, self.to_json()?.as_bytes())
    }

    /// The content of the `tokenizer.json`.
    ///
    /// # Errors
    /// An error of the `tokenizers` library.
    pub fn to_json(&self) -> Result<String> {
        json(&self.inner)
    }

    /// The ids of `text`, with the special tokens that the post-processor of the tokenizer adds, such as a begin token.
    /// Tokenizers that this module creates add none.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the reason of the `tokenizers` library.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// Whether this is the tokenizer of [`Tokenizer::bytes`], whose ids of a text are its bytes.
    pub(crate) fn is_bytes(&self) -> bool {
        self.raw
    }

    /// The ids of `text` without additional special tokens, for a text that contains them, such as a rendered chat
    /// template.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_written(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    /// As [`Tokenizer::encode_written`], with the bytes in the text that each token stands for.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_ranges(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        if self.raw {
            return Ok(text.bytes().enumerate().map(|(at, byte)| (byte.into(), at..at + 1)).collect());
        }
        let encoding = catch_panic(|| self.encoding(text, false, OffsetType::Byte))
            .map_err(|panic| Error::Invalid(format!("tokenizer: {panic}")))?
            .map_err(invalid)?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    fn ids(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if self.raw {
            return Ok(text.bytes().map(u32::from).collect());
        }
        // A damaged file may cause a panic for some texts only.
        let encoding = catch_panic(|| self.encoding(text, add_special, OffsetType::None))
            .map_err(|panic| Error::Invalid(format!("tokenizer: {panic}")))?;
        Ok(encoding.map_err(invalid)?.get_ids().to_vec())
    }

    fn encoding(&self, text: &str, add_special: bool, offsets: OffsetType) -> tokenizers::Result<Encoding> {
        if let Some(normalizer) = self.inner.get_normalizer().filter(|_| self.can_grow) {
            growth::check(normalizer, text)?;
        }
        let (Some(scores), ModelWrapper::BPE(model)) = (&self.scores, self.inner.get_model()) else {
            return match offsets {
                OffsetType::None => self.inner.encode_fast(text, add_special),
                _ => self.inner.encode(text, add_special),
            };
        };
        // The steps of `encode_fast` with another order of merges.
        let added = self.inner.get_added_vocabulary();
        let mut parts = added.extract_and_normalize(self.inner.get_normalizer(), text);
        parts.tokenize(|part| Ok(scores.tokenize(model, part.get())))?;
        self.inner.post_process(parts.into_encoding(None, 0, offsets)?, None, add_special)
    }

    /// The ids of a document: those of its text, followed by the end-of-text token if the vocabulary has one. An empty text
    /// has no ids.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut ids = self.encode(text)?;
        ids.extend(self.end_of_text().filter(|end| ids.last() != Some(end)));
        Ok(ids)
    }

    /// The ids of the tokens that are added around the text of a document: those of the post-processor, such as a begin
    /// token, and the end-of-text token.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn framing(&self) -> Result<Vec<u32>> {
        // A letter, because some tokenizers add nothing to an empty text.
        let (bare, mut framing) = (self.encode_written("a")?, self.encode("a")?);
        if let Some(at) = framing.windows(bare.len().max(1)).position(|window| window == bare) {
            framing.drain(at..at + bare.len());
        } else {
            framing.clear();
        }
        framing.extend(self.end_of_text());
        Ok(framing)
    }

    /// The id of the end-of-text token: `<|endoftext|>`, `<|end_of_text|>`, `</s>` or `<eos>`; `None` if the vocabulary has
    /// none of them.
    pub fn end_of_text(&self) -> Option<u32> {
        END_OF_TEXT_NAMES.iter().find_map(|name| self.token_id(name))
    }

    /// The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD. Ids that are not in the vocabulary
    /// have no text: a model may have more of them than its tokenizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the reason of the `tokenizers` library.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        // Some decoders of the library need a token.
        if !ids.iter().any(|&id| self.text_token(id).is_some()) {
            return Ok(String::new());
        }
        catch_panic(|| self.inner.decode(ids, true))
            .map_err(|panic| Error::Invalid(format!("tokenizer: {panic}")))?
            .map_err(invalid)
    }

    /// The maximal id plus one: the number of rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The id of a token, special or not, by its name in `tokenizer.json`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The name of a token in `tokenizer.json`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The special tokens by name. They have no text when ids are decoded.
    pub fn special_tokens(&self) -> BTreeMap<String, u32> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (token.content, id)).collect()
    }

    /// A decoder of ids that arrive one at a time.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// A decoder of ids that follow those of a prompt. Its chunks together are the text that follows the text of the prompt
    /// when all ids are decoded together.
    ///
    /// ```
    /// use gd_model::io::tokenizer::Tokenizer;
    ///
    /// let bytes = Tokenizer::bytes()?;
    /// let mut decoder = bytes.stream_after(&bytes.encode("caf")?)?;
    /// assert_eq!(decoder.push(0xc3)?, None);
    /// assert_eq!(decoder.push(0xa9)?, Some("é".into()));
    /// # Ok::<(), gd_model::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn stream_after(&self, prompt: &[u32]) -> Result<StreamDecoder<'_>> {
        StreamDecoder::after(self, prompt)
    }

    fn wrap(inner: tokenizers::Tokenizer, raw: bool) -> Self {
        let vocab = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let bytewise = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            && matches!(inner.get_model(), ModelWrapper::BPE(_));
        let can_grow = inner.get_normalizer().is_some_and(growth::can_grow);
        Self { inner, vocab, raw, bytewise, can_grow, scores: None }
    }

    /// The name of a token that has a text when it is decoded; `None` for a special token and an id without a token.
    fn text_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id).filter(|token| !self.inner.get_added_vocabulary().is_special_token(token))
    }

    /// The bytes of a token of a bytewise tokenizer; none for a special token and an id without a token.
    fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.text_token(id) else { return Vec::new() };
        // An added token may contain characters outside of the alphabet. As in the decoder of the library, it then stands
        // for its own text.
        token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into_bytes())
    }
}

/// A text to learn a vocabulary from, or a part of it.
enum Part<S> {
    Whole(S),
    Cut(String),
}

impl<S: AsRef<str>> AsRef<str> for Part<S> {
    fn as_ref(&self) -> &str {
        match self {
            Self::Whole(text) => text.as_ref(),
            Self::Cut(text) => text,
        }
    }
}

/// Cuts a text in its runs of more than [`MAX_WORD_BYTES`] with or without white space.
fn parts<S: AsRef<str>>(text: S) -> Vec<Part<S>> {
    let whole = text.as_ref();
    let (mut cuts, mut run, mut was_space) = (vec![0], 0, false);
    for (at, c) in whole.char_indices() {
        if c.is_whitespace() != was_space {
            (run, was_space) = (at, !was_space);
        } else if at - run >= MAX_WORD_BYTES {
            cuts.push(at);
            run = at;
        }
    }
    if cuts.len() == 1 {
        return vec![Part::Whole(text)];
    }
    cuts.push(whole.len());
    cuts.windows(2).map(|ends| Part::Cut(whole[ends[0]..ends[1]].to_owned())).collect()
}

/// The character that stands for each byte in a byte-level `tokenizer.json` (the byte-to-Unicode table of GPT-2): a
/// printable Latin-1 character stands for itself; the other bytes are numbered from U+0100 on.
static ALPHABET: LazyLock<[char; BYTES]> = LazyLock::new(|| {
    let mut free = 0x100u32..;
    std::array::from_fn(|byte| match byte as u8 {
        b @ (b'!'..=b'~' | 0xa1..=0xac | 0xae..) => char::from(b),
        _ => free.next().and_then(char::from_u32).unwrap_or(char::REPLACEMENT_CHARACTER),
    })
});

/// The byte that a character of [`ALPHABET`] stands for.
fn byte_of(c: char) -> Option<u8> {
    static BYTE: LazyLock<std::collections::HashMap<char, u8>> =
        LazyLock::new(|| (0..=u8::MAX).map(|b| (ALPHABET[usize::from(b)], b)).collect());
    BYTE.get(&c).copied()
}

fn json(inner: &tokenizers::Tokenizer) -> Result<String> {
    inner.to_string(true).map_err(invalid)
}

fn invalid(e: tokenizers::Error) -> Error {
    Error::Invalid(format!("tokenizer: {e}"))
}
