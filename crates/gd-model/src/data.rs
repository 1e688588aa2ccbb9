//! Text files to token streams: reading, the split into training and validation, and batches of windows.
//!
//! The split happens on the text, before any token is made, and each side is tokenised alone: no training
//! window, and no vocabulary learned from [`Texts::train`], ever sees a validation character.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{Device, Tensor};
use rand::RngExt;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The file name endings that are read from a folder.
const TEXT_ENDINGS: [&str; 3] = ["txt", "md", "text"];

/// Reads one UTF-8 text file that is not empty.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::read(path, "text file", e))?;
    if bytes.is_empty() {
        return Err(Error::Empty { path: path.into(), reason: "the file is empty" });
    }
    String::from_utf8(bytes)
        .map_err(|e| Error::InvalidUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })
}

/// The files that `paths` stand for: a file is itself, a folder the text files in it and below, by name.
pub fn text_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let kind = std::fs::metadata(path).map_err(|e| Error::read(path, "text file or folder", e))?;
        if !kind.is_dir() {
            files.push(path.clone());
            continue;
        }
        let before = files.len();
        walk(path, &mut files)?;
        if files.len() == before {
            return Err(Error::Empty {
                path: path.clone(),
                reason: "the folder has no .txt, .md or .text file",
            });
        }
    }
    if files.is_empty() {
        return Err(Error::Invalid("no text file is given".into()));
    }
    Ok(files)
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let unreadable = |e| Error::read(folder, "folder", e);
    let mut entries = std::fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .map_err(unreadable)?;
    // The system's order differs from machine to machine.
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        // A link to a folder is not followed, so that the walk ends.
        if entry.file_type().map_err(unreadable)?.is_dir() {
            walk(&path, files)?;
        } else if path.extension().is_some_and(|e| TEXT_ENDINGS.iter().any(|t| e.eq_ignore_ascii_case(t))) {
            files.push(path);
        }
    }
    Ok(())
}

/// How text is divided into training and validation.
#[derive(Clone, Debug, PartialEq)]
pub enum Split {
    /// The last `valid_fraction` of every file, cut after a line where one ends nearby.
    Position {
        /// In (0, 1).
        valid_fraction: f64,
    },
    /// Whole documents, evenly spread over the order in which they come. A document that repeats an earlier
    /// one to the letter is dropped, or it could stand on both sides.
    Documents {
        /// Share of the documents, in (0, 1).
        valid_fraction: f64,
        /// A line that ends a document, without its line break; `None`: every file is one document. The
        /// line itself stays in the text, at the end of its document.
        separator: Option<String>,
    },
}

/// Training and validation text, side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Texts {
    /// One piece per file (`Position`) or document (`Documents`).
    pub train: Vec<String>,
    /// The same for validation.
    pub valid: Vec<String>,
}

impl Texts {
    /// Reads and splits files and folders.
    pub fn load(paths: &[PathBuf], split: &Split) -> Result<Self> {
        let texts = text_files(paths)?.iter().map(|p| read_text(p)).collect::<Result<Vec<_>>>()?;
        Self::split(&texts, split)
    }

    /// Splits texts that are in memory.
    pub fn split(texts: &[String], split: &Split) -> Result<Self> {
        let (Split::Position { valid_fraction } | Split::Documents { valid_fraction, .. }) = split;
        if !(*valid_fraction > 0.0 && *valid_fraction < 1.0) {
            return Err(Error::Invalid(format!(
                "the validation share must lie between 0 and 1 (both excluded), not {valid_fraction}"
            )));
        }
        match split {
            Split::Position { .. } => {
                let (train, valid) = texts
                    .iter()
                    .map(|text| text.split_at(cut(text, *valid_fraction)))
                    .map(|(t, v)| (t.to_string(), v.to_string()))
                    .unzip();
                Ok(Self { train, valid })
            }
            Split::Documents { separator, .. } => {
                let mut seen = HashSet::new();
                let documents: Vec<&str> = texts
                    .iter()
                    .flat_map(|text| documents(text, separator.as_deref()))
                    .filter(|document| !document.trim().is_empty() && seen.insert(*document))
                    .collect();
                let n = documents.len();
                if n < 2 {
                    return Err(Error::Invalid(format!(
                        "a split by document needs at least 2 different documents, not {n}"
                    )));
                }
                let wanted = ((n as f64 * valid_fraction).round() as usize).clamp(1, n - 1);
                let chosen: HashSet<usize> = (0..wanted).map(|i| (2 * i + 1) * n / (2 * wanted)).collect();
                let mut result = Self::default();
                for (i, document) in documents.into_iter().enumerate() {
                    let side = if chosen.contains(&i) { &mut result.valid } else { &mut result.train };
                    side.push(document.to_string());
                }
                Ok(result)
            }
        }
    }
}

/// Where validation starts: after the first line that ends in the earlier half of what it would take, or
/// else at the character at that share of the bytes.
fn cut(text: &str, valid_fraction: f64) -> usize {
    let from = boundary(text, (text.len() as f64 * (1.0 - valid_fraction)) as usize);
    let until = boundary(text, from + (text.len() - from) / 2);
    text[from..until].find('\n').map_or(from, |i| from + i + 1)
}

/// The last place between characters at or before byte `at`, which lies inside the text.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}

/// The documents of one text, each with the separator line that ends it.
fn documents<'a>(text: &'a str, separator: Option<&str>) -> Vec<&'a str> {
    let Some(separator) = separator else { return vec![text] };
    let mut parts = Vec::new();
    let (mut start, mut end) = (0, 0);
    let mut content = false;
    for line in text.split_inclusive('\n') {
        end += line.len();
        if line.trim_end_matches(['\n', '\r']) == separator {
            // Separators without text between them separate nothing.
            if content {
                parts.push(&text[start..end]);
            }
            (start, content) = (end, false);
        } else {
            content |= !line.trim().is_empty();
        }
    }
    if content {
        parts.push(&text[start..]);
    }
    parts
}

/// Token streams for training and validation.
#[derive(Clone, Debug, PartialEq)]
pub struct Corpus {
    /// Training tokens, the pieces of [`Texts::train`] one after the other.
    pub train: Vec<u32>,
    /// Validation tokens.
    pub valid: Vec<u32>,
    /// Bytes of training text.
    pub train_bytes: usize,
    /// Bytes of validation text: nats per token × tokens / bytes / ln 2 is bits per byte.
    pub valid_bytes: usize,
}

impl Corpus {
    /// Reads files and folders, split by position.
    pub fn load(paths: &[PathBuf], tokenizer: &Tokenizer, valid_fraction: f64) -> Result<Self> {
        Self::encode(&Texts::load(paths, &Split::Position { valid_fraction })?, tokenizer)
    }

    /// Tokenises both sides.
    pub fn encode(texts: &Texts, tokenizer: &Tokenizer) -> Result<Self> {
        let encode = |pieces: &[String]| -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            for piece in pieces {
                ids.extend(tokenizer.encode(piece)?);
            }
            Ok(ids)
        };
        Ok(Self {
            train: encode(&texts.train)?,
            valid: encode(&texts.valid)?,
            train_bytes: texts.train.iter().map(String::len).sum(),
            valid_bytes: texts.valid.iter().map(String::len).sum(),
        })
    }

    /// Fails unless both sides have at least one window of `context` inputs.
    pub fn check(&self, context: usize) -> Result<()> {
        check("the training text", &self.train, context)?;
        check("the validation text", &self.valid, context)
    }
}

fn check(what: &'static str, tokens: &[u32], context: usize) -> Result<()> {
    if context == 0 {
        return Err(Error::Invalid("the context must be at least 1, not 0".into()));
    }
    if tokens.len() <= context {
        return Err(Error::TooShort { what, found: tokens.len(), needed: context + 1 });
    }
    Ok(())
}

/// Consecutive windows of a text for evaluation: (inputs, targets), at most `context` long, the last one
/// shorter. Every token but the first is a target exactly once.
pub fn windows(tokens: &[u32], context: usize) -> impl Iterator<Item = (&[u32], &[u32])> {
    let inputs = tokens.split_last().map_or(&[][..], |(_, rest)| rest);
    inputs.chunks(context.max(1)).zip(tokens.get(1..).unwrap_or_default().chunks(context.max(1)))
}

/// Training batches: each epoch goes once over the windows of the text in a new random order, and with a
/// new random phase, so that over the epochs a window may start anywhere.
#[derive(Debug)]
pub struct Batches {
    tokens: Vec<u32>,
    seed: u64,
    /// The last epoch asked for, since consecutive steps mostly share it. Only speed depends on it.
    epoch: Mutex<Option<Epoch>>,
}

#[derive(Debug)]
struct Epoch {
    number: u64,
    context: usize,
    /// First token of each window, in the order of use.
    starts: Vec<usize>,
}

impl Batches {
    /// Batches over `tokens`.
    pub fn new(tokens: Vec<u32>, seed: u64) -> Self {
        Self { tokens, seed, epoch: Mutex::new(None) }
    }

    /// The batch of `step`: inputs and targets, both u32 [batch, context], targets one token later. It
    /// depends on the tokens, the seed and the arguments alone.
    pub fn batch(
        &self,
        step: u64,
        batch: usize,
        context: usize,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let starts = self.starts(step, batch, context)?;
        let window = |shift: usize| -> Result<Tensor> {
            let ids: Vec<u32> =
                starts.iter().flat_map(|&s| &self.tokens[s + shift..s + shift + context]).copied().collect();
            Ok(Tensor::from_vec(ids, (batch, context), device)?)
        };
        Ok((window(0)?, window(1)?))
    }

    /// How many windows of `context` one epoch has.
    pub fn windows_per_epoch(&self, context: usize) -> Result<usize> {
        check("the training text", &self.tokens, context)?;
        // One window less than fit leaves room for the phase.
        Ok(((self.tokens.len() - 1) / context - 1).max(1))
    }

    /// Where the windows of a batch start.
    fn starts(&self, step: u64, batch: usize, context: usize) -> Result<Vec<usize>> {
        if batch == 0 {
            return Err(Error::Invalid("the batch must be at least 1, not 0".into()));
        }
        let count = self.windows_per_epoch(context)?;
        let mut slot = self.epoch.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let first = step.wrapping_mul(batch as u64);
        let starts = (0..batch as u64).map(|i| {
            let index = first.wrapping_add(i);
            let (number, place) = (index / count as u64, (index % count as u64) as usize);
            if !slot.as_ref().is_some_and(|e| e.number == number && e.context == context) {
                *slot = Some(self.epoch(number, context, count));
            }
            slot.as_ref().map_or(0, |e| e.starts[place])
        });
        Ok(starts.collect())
    }

    fn epoch(&self, number: u64, context: usize, count: usize) -> Epoch {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(number);
        let phase = rng.random_range(0..=self.tokens.len() - 1 - count * context);
        let mut starts: Vec<usize> = (0..count).map(|i| phase + i * context).collect();
        starts.shuffle(&mut rng);
        Epoch { number, context, starts }
    }
}
