//! One function for all readers of untrusted files: it passes the input to a reader and drops the result. A panic, or a
//! peak of memory above the limit, is a bug in the reader.
//!
//! Used by the fuzz target of this package and by the mutation test of gd-model, with the same corpus.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use gd_model::config::{DocumentFormat, ModelConfig, Recipe};
use gd_model::data::{Documents, INDEX as DATA_INDEX, Index, Prepared};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::checkpoint::{
    CONFIG, INDEX, MANIFEST, System, TOKENIZER, WEIGHTS, load_json, load_tensors, verify,
};
use gd_model::io::gguf;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::trace::{self, Proof, Trace};
use peak_alloc::PeakAlloc;

/// The readers by name; the corpus has a folder for each.
pub(crate) const READERS: [&str; 17] = [
    "safetensors",
    "index",
    "config",
    "tokenizer",
    "gguf",
    "manifest",
    "shard",
    "data-index",
    "recipe-json",
    "recipe-toml",
    "template",
    "json-lines",
    "json-array",
    "compressed",
    "parquet",
    "trace",
    "proof",
];

/// Bytes that a reader may allocate beyond eight times the size of its input.
const SLACK_BYTES: usize = 16 << 20;

/// Bytes that a reader of compressed files may allocate.
const MAX_DECOMPRESSED_BYTES: usize = 1 << 30;

/// A folder with the files that a reader needs beside its input.
pub(crate) struct ReaderFolder {
    folder: tempfile::TempDir,
    corpus: PathBuf,
}

impl ReaderFolder {
    /// Creates the folder; `corpus` has a folder of files for each reader.
    pub(crate) fn new(corpus: &Path) -> std::io::Result<Self> {
        let folder = tempfile::tempdir()?;
        let created = Self { folder, corpus: corpus.into() };
        fs::write(created.at("a.safetensors"), created.seed("safetensors/two"))?;
        fs::write(created.at(TOKENIZER), created.seed("tokenizer/bytes.json"))?;
        for part in ["train", "valid"] {
            fs::write(created.at(&format!("{part}-00000.tokens")), created.seed("shard/small"))?;
        }
        Ok(created)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of the corpus.
    fn seed(&self, name: &str) -> Vec<u8> {
        let path = self.corpus.join(name);
        fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Passes `input` to a reader, and returns whether it was accepted.
    ///
    /// # Panics
    /// When the reader panics, or when it allocates more than eight times the size of the input plus 16 MiB.
    pub(crate) fn run(&self, reader: &str, input: &[u8], memory: &PeakAlloc) -> bool {
        let limit = match reader {
            // A template is a program that may produce long texts; its steps are bounded by the reader.
            "template" => usize::MAX,
            // Compressed files may be any number of times as long as their content.
            "compressed" | "parquet" => MAX_DECOMPRESSED_BYTES,
            _ => 8 * input.len() + SLACK_BYTES,
        };
        bounded(reader, limit, memory, || self.read(reader, input))
    }

    fn read(&self, reader: &str, input: &[u8]) -> bool {
        // Writes the input under the name that the reader expects.
        let file = |name: &str| {
            let path = self.at(name);
            fs::write(&path, input).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            path
        };
        match reader {
            "safetensors" => load_tensors(&file(WEIGHTS), &Device::Cpu).is_ok(),
            "index" => load_tensors(&file(INDEX), &Device::Cpu).is_ok(),
            "config" => {
                let config = load_json(&file(CONFIG)).ok().and_then(|json| ModelConfig::from_json(json).ok());
                config.is_some_and(|config| config.validate().is_ok() && config.to_json().is_ok())
            }
            "tokenizer" => {
                let Ok(tokenizer) = Tokenizer::load(&file("other.json")) else { return false };
                let ids = tokenizer
                    .encode("It's 1234 \u{e9}t\u{e9}s,\n\n \u{65e5}\u{672c}<|im_end|>")
                    .unwrap_or_default();
                let mut stream = tokenizer.stream();
                ids.iter().take(64).all(|&id| stream.push(id).is_ok()) && tokenizer.decode(&ids).is_ok()
            }
            "gguf" => {
                let path = file("m.gguf");
                // Blocks of integers have a reader of their own.
                for matrix in gguf::read_quantized(&path).iter().flat_map(|read| read.quantized.values()) {
                    assert!(matrix.dequantize().is_ok(), "{matrix:?}");
                }
                let read = gguf::read(&path, &Device::Cpu);
                read.is_ok_and(|read| read.tokenizer.encode("ab 12").is_ok())
            }
            "manifest" => verify(&System, file(MANIFEST).parent().unwrap_or(Path::new("."))).is_ok(),
            "shard" => {
                file("train-00000.tokens");
                // The index gets the sizes and the hash of the input, so that the reader passes the check of the hash.
                let number = |at: usize| {
                    input.get(at..at + 8).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
                };
                let Ok(mut index) = serde_json::from_slice::<Index>(&self.seed("data-index/small.json"))
                else {
                    panic!("data-index/small.json is no index");
                };
                for entry in &mut index.train.shards {
                    (entry.tokens, entry.documents) = (number(16), number(24));
                    entry.hash = blake3::hash(input).to_hex().to_string();
                }
                (index.train.tokens, index.train.documents) = (number(16), number(24));
                self.prepared(&index)
            }
            "data-index" => {
                fs::write(self.at("train-00000.tokens"), self.seed("shard/small")).expect("a file");
                match serde_json::from_slice::<Index>(input) {
                    // Stored with its hash, so that the reader passes the check of the hash.
                    Ok(index) => self.prepared(&index),
                    Err(_) => {
                        file(DATA_INDEX);
                        Prepared::open(self.folder.path()).is_ok()
                    }
                }
            }
            "recipe-json" => Recipe::load(&file("recipe.json").to_string_lossy()).is_ok(),
            "recipe-toml" => Recipe::load(&file("recipe.toml").to_string_lossy()).is_ok(),
            "template" => {
                let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
                let template = ChatTemplate::new(String::from_utf8_lossy(input).into_owned(), tokens);
                template.is_ok_and(|template| template.render(Some("system"), "user").is_ok())
            }
            "json-lines" => documents(file("a.jsonl")),
            "json-array" => documents(file("a.json")),
            // The compression is recognised by the content.
            "compressed" => documents(file("a.jsonl.zst")),
            "parquet" => documents(file("a.parquet")),
            "trace" => {
                // With a hash of its content, so that the reader passes the check of the hash.
                let mut sealed = input.to_vec();
                if let Some((content, hash)) = sealed.split_last_chunk_mut::<32>() {
                    *hash = *blake3::hash(content).as_bytes();
                }
                let trace = Trace::from_bytes(Path::new("a.trace"), &sealed);
                trace.is_ok_and(|trace| trace::verify(&trace, None, None).is_ok())
            }
            "proof" => Proof::from_bytes(Path::new("a.json"), input)
                .is_ok_and(|proof| proof.check(None, None).is_ok()),
            _ => panic!("no reader {reader}; there are {}", READERS.join(", ")),
        }
    }

    fn prepared(&self, index: &Index) -> bool {
        let text = serde_json::to_vec(index).unwrap_or_default();
        let sealed = serde_json::json!({ "index": index, "hash": blake3::hash(&text).to_hex().as_str() });
        fs::write(self.at(DATA_INDEX), sealed.to_string()).expect("a file");
        Prepared::open(self.folder.path()).is_ok()
    }
}

/// Whether a file has documents and nothing else.
fn documents(path: PathBuf) -> bool {
    let tokens = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
    let template = ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}".into(), tokens);
    let documents = Documents::open(&[path], &DocumentFormat::default());
    let (Ok(template), Ok(documents)) = (template, documents) else { return false };
    documents.with_chat_template(Some(template)).all(|document| document.is_ok())
}

/// The result of `read`, which may allocate `limit` bytes more than were allocated before.
///
/// A peak above the limit is measured a second time. The first backtrace that the text of an error contains makes the
/// standard library load the symbols of the whole program, tens of megabytes, once for the process. A reader that
/// allocates too much for an input does so every time.
///
/// # Panics
/// When both peaks are above the limit.
pub(crate) fn bounded(reader: &str, limit: usize, memory: &PeakAlloc, read: impl Fn() -> bool) -> bool {
    let peak = || {
        memory.reset_peak_usage();
        let before = memory.current_usage();
        let result = read();
        (memory.peak_usage().saturating_sub(before), result)
    };
    let (mut held, result) = peak();
    if held > limit {
        held = held.min(peak().0);
    }
    assert!(held <= limit, "{reader}: {held} bytes held; {limit} allowed");
    result
}
