//! Text to token ids and back, always stored as a `tokenizer.json`.
//!
//! Two kinds are made here: raw bytes (256 tokens, id = byte value) and byte-level BPE, whose last token is
//! the end of a text. Both give back any UTF-8 exactly (BPE takes the name of that token for the token).
//! Any other `tokenizer.json` loads as well, with its own rules for special tokens.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{LazyLock, Once};

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, ModelWrapper};

use crate::error::{Error, Result};
use crate::io::files::write_file;

/// The number of different bytes, and so the least vocabulary.
pub const BYTES: usize = 256;

/// The token that ends a document in the vocabularies made here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// What others call theirs.
const ENDS: [&str; 4] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"];

/// Ids that no token has, beyond as many as there are tokens.
const MOST_HOLES: usize = 1 << 16;

/// The `tokenizer.json` of the 256 bytes.
static BYTES_JSON: LazyLock<String> =
    LazyLock::new(|| Tokenizer::bytes().and_then(|bytes| bytes.to_json()).unwrap_or_default());

/// A tokenizer; see the module's text.
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
    /// One more than the greatest id: the number of rows an embedding needs.
    vocab: usize,
    /// Id = byte value and nothing else: encoding is then a copy.
    raw: bool,
    /// The decoder is the byte-level alphabet, so a token's bytes are known without its neighbours.
    bytewise: bool,
}

impl Tokenizer {
    /// The 256 bytes as tokens, id = byte value.
    pub fn bytes() -> Result<Self> {
        let vocab: [(String, u32); BYTES] = std::array::from_fn(|b| (ALPHABET[b].to_string(), b as u32));
        let model = BPE::builder().vocab_and_merges(vocab, vec![]).build();
        let mut inner = tokenizers::Tokenizer::new(model.map_err(invalid)?);
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        inner.with_decoder(Some(ByteLevel::new(false, false, false)));
        Ok(Self::wrap(inner, true))
    }

    /// Byte-level BPE of at most `vocab` tokens, [`END_OF_TEXT`] among them, learned from `texts`. A short text
    /// gives fewer tokens, since no pair is left to merge; [`Tokenizer::vocab_size`] tells. The result depends
    /// on the texts alone.
    pub fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab: usize) -> Result<Self>
    where
        S: AsRef<str> + Send,
    {
        if vocab <= BYTES {
            return Err(Error::out_of_range("a BPE vocabulary", vocab, format!("at least {}", BYTES + 1)));
        }
        let mut texts = texts.filter(|t| !t.as_ref().is_empty()).peekable();
        if texts.peek().is_none() {
            return Err(Error::Invalid("a BPE vocabulary cannot be learned from an empty text".into()));
        }
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab - 1)
            // A pair that occurs once teaches nothing.
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
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::read(path, "tokenizer file", e))?;
        let foreign = |reason: String| Error::Foreign { path: path.into(), kind: "tokenizer.json", reason };
        // The library slices without checks in places, so that a broken file can panic inside it.
        quietly(|| Self::checked(tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| e.to_string())?))
            .map_err(contradicts)
            .flatten()
            .map_err(foreign)
    }

    /// A tokenizer from elsewhere, if it can be used; else the reason.
    pub(crate) fn checked(mut inner: tokenizers::Tokenizer) -> std::result::Result<Self, String> {
        // Texts are cut and put together here, and none is shortened or filled up behind our back.
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        inner.with_padding(None);
        let vocab = inner.get_vocab(true);
        let (count, greatest) = (vocab.len(), vocab.values().copied().max().unwrap_or(0) as usize);
        if count == 0 {
            return Err("it has no tokens".into());
        }
        // The library lists the ids that no token has, and an embedding needs a row for each.
        if greatest > 2 * count + MOST_HOLES {
            return Err(format!("{count} tokens, but an id of {greatest}"));
        }
        let raw = json(&inner).map_err(|e| e.to_string())? == *BYTES_JSON;
        Ok(Self::wrap(inner, raw))
    }

    /// Writes a `tokenizer.json`; an existing file is replaced only when the new one is complete.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_file(path, self.to_json()?.as_bytes())
    }

    /// The text of the `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        json(&self.inner)
    }

    /// The ids of `text`, with the special tokens that the tokenizer's own rules add (none, for those made
    /// here).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// The ids of `text` in which special tokens are written out, as in a chat: none is added.
    pub fn encode_written(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if self.raw {
            return Ok(text.bytes().map(u32::from).collect());
        }
        // What a file from elsewhere sets up may fail at some text only.
        let encoding = quietly(|| self.inner.encode_fast(text, add_special))
            .map_err(|panic| Error::Invalid(format!("tokenizer: {}", contradicts(panic))))?;
        Ok(encoding.map_err(invalid)?.get_ids().to_vec())
    }

    /// The ids of a whole document: those of its text, and the end-of-text token if there is one. Nothing for
    /// an empty text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let mut ids = self.encode(text)?;
        ids.extend(self.end_of_text().filter(|end| ids.last() != Some(end)));
        Ok(ids)
    }

    /// The token that ends a document, if the vocabulary has one by a usual name.
    pub fn end_of_text(&self) -> Option<u32> {
        ENDS.iter().find_map(|name| self.token_id(name))
    }

    /// The text of `ids`, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        for &id in ids {
            self.check(id)?;
        }
        quietly(|| self.inner.decode(ids, true))
            .map_err(|panic| Error::Invalid(format!("tokenizer: {}", contradicts(panic))))?
            .map_err(invalid)
    }

    /// One more than the greatest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// The id of a token given by its stored name, special tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The stored name of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// A decoder for ids that come one at a time.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, bytes: Vec::new(), window: Vec::new(), shown: 0 }
    }

    fn wrap(inner: tokenizers::Tokenizer, raw: bool) -> Self {
        let vocab = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        let bytewise = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            && matches!(inner.get_model(), ModelWrapper::BPE(_));
        Self { inner, vocab, raw, bytewise }
    }

    fn check(&self, id: u32) -> Result<()> {
        if (id as usize) < self.vocab {
            return Ok(());
        }
        Err(Error::UnknownToken { token: id, vocab_size: self.vocab })
    }

    /// The bytes of one token of a bytewise tokenizer; nothing for a special token.
    fn token_bytes(&self, id: u32) -> Vec<u8> {
        if self.raw {
            return vec![id as u8];
        }
        let Some(token) = self.inner.id_to_token(id) else { return Vec::new() };
        if self.inner.get_added_vocabulary().is_special_token(&token) {
            return Vec::new();
        }
        // A token that leaves the alphabet (an added one) stands for itself, as in the library's decoder.
        token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into_bytes())
    }
}

/// Decodes a stream of ids; every piece it yields is whole characters, and the pieces joined with
/// [`StreamDecoder::finish`] are what [`Tokenizer::decode`] gives for all ids at once.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytewise tokenizers: the start of a character that is not complete yet.
    bytes: Vec<u8>,
    /// Others: the last ids, decoded together because a token's text may depend on its neighbours …
    window: Vec<u32>,
    /// … and how many bytes of the window's text have been yielded.
    shown: usize,
}

/// How many ids a decoder that depends on neighbours may look back at.
const LOOK_BACK: usize = 16;

impl StreamDecoder<'_> {
    /// Takes one id; yields the text that is now certain, if there is any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.tokenizer.check(id)?;
        let text = if self.tokenizer.bytewise {
            self.bytes.extend(self.tokenizer.token_bytes(id));
            self.whole_characters()
        } else {
            self.window.push(id);
            self.settled()?
        };
        Ok((!text.is_empty()).then_some(text))
    }

    /// What is still held back; an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let text = if self.tokenizer.bytewise {
            String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
        } else {
            let text = self.tokenizer.decode(&std::mem::take(&mut self.window))?;
            text.get(std::mem::take(&mut self.shown)..).unwrap_or_default().to_string()
        };
        Ok((!text.is_empty()).then_some(text))
    }

    fn whole_characters(&mut self) -> String {
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            // An invalid sequence that reaches the end may still be completed by the next token.
            let rest = &self.bytes[used..];
            if rest.is_empty()
                || std::str::from_utf8(rest).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
            {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            used += chunk.invalid().len();
        }
        self.bytes.drain(..used);
        text
    }

    fn settled(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        // A trailing U+FFFD is a character of which the last bytes are still to come.
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.window.len() < 2 * LOOK_BACK {
            return Ok(String::new());
        }
        let new = text.get(self.shown..).unwrap_or_default().to_string();
        self.shown = text.len();
        if self.window.len() >= 2 * LOOK_BACK {
            self.window.drain(..LOOK_BACK);
            self.shown = self.tokenizer.decode(&self.window)?.len();
        }
        Ok(new)
    }
}

/// The printable character that stands for each byte in a byte-level `tokenizer.json`: itself where it is
/// printable Latin-1, else the next free one from U+0100 on.
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

/// What a panic of the library says.
fn contradicts(panic: Option<String>) -> String {
    panic.unwrap_or_else(|| "the file contradicts itself".into())
}

thread_local! {
    /// Whether a panic on this thread is about to be caught and reported as an error.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; a panic inside it comes back as its text and prints nothing.
fn quietly<T>(f: impl FnOnce() -> T) -> std::result::Result<T, Option<String>> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                others(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    QUIET.set(false);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_string()))
    })
}
