//! The recipe and the text of a run, from the flags that name them.

use std::path::PathBuf;

use anyhow::Result;
use gd_model::config::{Recipe, Setting, TokenizerChoice};
use gd_model::data::{Corpus, Documents, Prepared, ReadSummary, Texts, Tokens};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::tokenizer::Tokenizer;

use crate::data_source::{DataSummary, document_error, prepared_data, prepared_data_for};

/// The text that a run without `--data` trains on. It is part of the program, so that `gd train` runs anywhere.
const SAMPLE_TEXT: &str = include_str!("../../text/sample.txt");

/// The configuration of a run without `--config`.
pub const DEFAULT_CONFIG: &str = "tiny";

/// Merges presets and configuration files, later ones over earlier ones, with the values of `--set` and `--steps`. If
/// `steps` is given, the warm-up is at most half of it.
///
/// # Errors
/// Names the file, key or value that is not valid.
pub fn load_recipe(configs: &[impl AsRef<str>], settings: &[Setting], steps: Option<u64>) -> Result<Recipe> {
    let recipe = Recipe::merged(configs, settings)?;
    let Some(steps) = steps else { return Ok(recipe) };
    let warmup = recipe.train.lr.warmup.min(steps / 2);
    let more = [Setting::new("train.lr.warmup", warmup), Setting::new("train.steps", steps)];
    Ok(Recipe::merged(configs, &[settings, &more].concat())?)
}

/// A corpus and what it was read from.
pub struct LoadedCorpus {
    /// The tokens.
    pub corpus: Corpus,
    /// The tokenizer that they were made with.
    pub tokenizer: Tokenizer,
    /// What was read.
    pub summary: DataSummary,
}

/// A corpus of `len` tokens for measurements of a training step, whose time and memory do not depend on the values of
/// the tokens.
pub fn placeholder_corpus(vocabulary: usize, len: usize) -> Corpus {
    let tokens = Tokens::from((0..len).map(|i| (i * 31 % vocabulary) as u32).collect::<Vec<_>>());
    Corpus { train: tokens.clone(), valid: tokens, train_bytes: len, valid_bytes: len }
}

/// Opens prepared data, or reads and tokenizes texts with the recipe's tokenizer. Sets the vocabulary size of the
/// recipe's model; if that changes it, the summary of the data should say so, see [`vocabulary_line`].
///
/// # Errors
/// Names the file that cannot be read, or data that is too short for the context of the recipe.
pub fn load_corpus(files: &[PathBuf], recipe: &mut Recipe) -> Result<LoadedCorpus> {
    let prepared = prepared_data(files)?;
    let loaded = load(files, recipe, prepared, Chats::default(), |texts| {
        Ok(match recipe.train.tokenizer {
            TokenizerChoice::Bytes => Tokenizer::bytes()?,
            TokenizerChoice::Bpe { vocab } => Tokenizer::train_bpe(texts.train.iter(), vocab)?,
        })
    })?;
    recipe.model.vocab_size = loaded.tokenizer.vocab_size();
    Ok(loaded)
}

/// How chats are read.
#[derive(Debug, Default)]
pub struct Chats {
    /// The template that writes them; without one they are errors.
    pub template: Option<ChatTemplate>,
    /// Whether only the turns of the assistant are learned.
    pub marks_turns: bool,
}

/// Opens prepared data, or reads texts and tokenizes them, for a model with this tokenizer.
///
/// # Errors
/// As [`load_corpus`], or data that was prepared with another tokenizer.
pub fn load_corpus_for(
    files: &[PathBuf],
    recipe: &Recipe,
    tokenizer: &Tokenizer,
    chats: Chats,
) -> Result<LoadedCorpus> {
    load(files, recipe, prepared_data_for(files, tokenizer)?, chats, |_| Ok(tokenizer.clone()))
}

/// The prepared data, or the texts in the tokens of the tokenizer that `tokenizer` returns for them.
fn load(
    files: &[PathBuf],
    recipe: &Recipe,
    prepared: Option<Prepared>,
    chats: Chats,
    tokenizer: impl FnOnce(&Texts) -> Result<Tokenizer>,
) -> Result<LoadedCorpus> {
    let (corpus, tokenizer, read) = match prepared {
        Some(Prepared { corpus, tokenizer, .. }) => (corpus, tokenizer, None),
        None => {
            let (texts, read) = load_texts(files, recipe, chats)?;
            let tokenizer = tokenizer(&texts)?;
            (Corpus::encode(&texts, &tokenizer)?, tokenizer, Some(read))
        }
    };
    corpus.check(recipe.train.context)?;
    Ok(LoadedCorpus { summary: DataSummary::new(&corpus, read), corpus, tokenizer })
}

/// Reads the files, or the sample text if there are none, and splits them into training and validation text.
fn load_texts(files: &[PathBuf], recipe: &Recipe, chats: Chats) -> Result<(Texts, ReadSummary)> {
    let train = &recipe.train;
    if files.is_empty() {
        let bytes = SAMPLE_TEXT.len() as u64;
        let read = ReadSummary { files: 1, documents: 1, bytes, ..ReadSummary::default() };
        return Ok((Texts::split(&[SAMPLE_TEXT.to_owned()], train.valid_fraction)?, read));
    }
    let mut documents = Documents::open(files, &train.documents)?.with_chat_template(chats.template);
    if chats.marks_turns {
        documents = documents.with_marked_turns();
    }
    let texts = Texts::from_documents(&mut documents, train.valid_fraction).map_err(document_error)?;
    Ok((texts, documents.summary()))
}

/// The line that says that the tokenizer changed the size of the vocabulary, if it did.
pub fn vocabulary_line(configured: usize, tokenizer: &Tokenizer) -> Option<String> {
    let actual = tokenizer.vocab_size();
    (configured != actual).then(|| {
        format!("vocabulary: {actual} tokens, as the tokenizer has; model.vocab_size is {configured}")
    })
}
