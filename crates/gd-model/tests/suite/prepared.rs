//! Prepared data: round trips, and detection of all damage.

use std::fs;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use gd_model::config::DocumentFormat;
use gd_model::data::{Document, Documents, Index, Preparation, Prepared, Tokens, prepare};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::{Error, Result};
use serde_json::Value;

/// 60 documents as JSONL, and a text file.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let line =
        |i: usize| format!("{}\n", serde_json::json!({ "text": format!("№ {i} {}", "ab ".repeat(i % 7)) }));
    let jsonl = folder.join("lines.jsonl");
    fs::write(&jsonl, (0..60).map(line).collect::<String>()).unwrap();
    let text = folder.join("text.txt");
    fs::write(&text, "a line of text\n".repeat(20)).unwrap();
    vec![jsonl, text]
}

fn prepare_into(out: &Path, paths: &[PathBuf], tokenizer: &Tokenizer, shard_tokens: usize) -> Result<Index> {
    let mut documents = Documents::open(paths, &DocumentFormat::default())?;
    let what = Preparation { tokenizer, shard_tokens, valid_fraction: 0.2 };
    prepare(out, &mut documents, &what, |_| ())
}

fn all(tokens: &Tokens) -> (Vec<u32>, Vec<usize>) {
    (tokens.read(0..tokens.len()), tokens.ends(0..tokens.len()))
}

#[test]
fn shards_hold_the_same_tokens_as_a_corpus_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let paths = sources(folder.path());
    let texts = gd_model::data::Texts::load(&paths, &DocumentFormat::default(), 0.2).unwrap();
    let learned = Tokenizer::train_bpe(texts.train.iter(), 300).unwrap();
    for (tokenizer, name) in [(Tokenizer::bytes().unwrap(), "bytes"), (learned, "bpe")] {
        let memory = gd_model::data::Corpus::encode(&texts, &tokenizer).unwrap();
        for shard_tokens in [1, 50, 1 << 20] {
            let out = folder.path().join(format!("{name}-{shard_tokens}"));
            let mut bytes_read = 0;
            let mut documents = Documents::open(&paths, &DocumentFormat::default()).unwrap();
            let what = Preparation { tokenizer: &tokenizer, shard_tokens, valid_fraction: 0.2 };
            let index = prepare(&out, &mut documents, &what, |bytes| bytes_read += bytes).unwrap();
            assert_eq!(bytes_read, paths.iter().map(|p| p.metadata().unwrap().len()).sum::<u64>());
            let prepared = Prepared::open(&out).unwrap();
            assert_eq!(prepared.index, index);
            assert_eq!(prepared.tokenizer.to_json().unwrap(), tokenizer.to_json().unwrap());
            for (mapped, memory) in
                [(&prepared.corpus.train, &memory.train), (&prepared.corpus.valid, &memory.valid)]
            {
                assert_eq!(all(mapped), all(memory));
                assert_eq!(mapped.document_count(), memory.document_count());
                for range in [0..1, 3..70, 40..41, mapped.len() - 9..mapped.len(), 5..5] {
                    assert_eq!(mapped.read(range.clone()), memory.read(range.clone()));
                    assert_eq!(mapped.ends(range.clone()), memory.ends(range));
                }
                assert_eq!(all(&mapped.head(33)), all(&memory.head(33)));
            }
            assert_eq!(prepared.corpus.train_bytes, memory.train_bytes);
            assert_eq!(prepared.corpus.valid_bytes, memory.valid_bytes);
            assert_eq!(index.train.shards.len() > 1, shard_tokens < 1 << 20);
        }
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let paths = sources(folder.path());
    let out = folder.path().join("out");
    prepare_into(&out, &paths, &Tokenizer::bytes().unwrap(), 1 << 20).unwrap();
    let mut cases = 0;
    for name in ["train-00000.tokens", "valid-00000.tokens", "index.json", "tokenizer.json"] {
        let path = out.join(name);
        let good = fs::read(&path).unwrap();
        // A single checksum covers the tokenizer, so a part of its bytes is enough.
        let step = if name == "tokenizer.json" { 37 } else { 1 };
        for at in (0..good.len()).step_by(step) {
            for bad in [flipped(&good, at), good[..at].to_vec()] {
                fs::write(&path, &bad).unwrap();
                let error = Prepared::open(&out).unwrap_err().to_string();
                assert!(error.contains(name) && !error.contains('\n'), "{name}, byte {at}: {error}");
                cases += 1;
            }
        }
        fs::write(&path, [&good[..], b"0"].concat()).unwrap();
        assert!(Prepared::open(&out).unwrap_err().to_string().contains(name));
        fs::remove_file(&path).unwrap();
        assert!(matches!(Prepared::open(&out).unwrap_err(), Error::Missing { .. }), "{name}");
        fs::write(&path, &good).unwrap();
        Prepared::open(&out).unwrap();
    }
    assert!(cases > 6000, "{cases}");
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

/// Changes a shard and the index and updates the checksums.
fn forge(out: &Path, change: impl FnOnce(&mut Vec<u8>, &mut Value)) {
    let (shard, index) = (out.join("train-00000.tokens"), out.join("index.json"));
    let mut bytes = fs::read(&shard).unwrap();
    let mut sealed: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    change(&mut bytes, &mut sealed["index"]);
    sealed["index"]["train"]["shards"][0]["hash"] = blake3::hash(&bytes).to_hex().as_str().into();
    let typed: Index = serde_json::from_value(sealed["index"].clone()).unwrap();
    sealed["hash"] = blake3::hash(&serde_json::to_vec(&typed).unwrap()).to_hex().as_str().into();
    fs::write(&shard, bytes).unwrap();
    fs::write(&index, sealed.to_string()).unwrap();
}

#[test]
fn invalid_content_with_correct_checksums_is_detected() {
    let folder = tempfile::tempdir().unwrap();
    let paths = sources(folder.path());
    let put = |at: usize, value: u64| {
        move |bytes: &mut Vec<u8>, _: &mut Value| {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    type Change = Box<dyn FnOnce(&mut Vec<u8>, &mut Value)>;
    let both = |at: usize, key: &'static str, value: u64| -> Change {
        Box::new(move |bytes, index| {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            index["train"]["shards"][0][key] = value.into();
        })
    };
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|_, _| ()), ""),
        (Box::new(put(8, 9)), "version 9"),
        (Box::new(|bytes, _| bytes[12] = 4), "4 bytes per token"),
        (Box::new(put(16, 7)), "7 tokens"),
        (both(16, "tokens", u64::MAX / 2 + 9), "fit no file"),
        (both(24, "documents", u64::MAX / 8 + 1), "fit no file"),
        (both(16, "tokens", 1 << 40), "truncated"),
        (both(24, "documents", 2), "bytes follow"),
        (Box::new(put(32, 1 << 50)), "document 0 ends at token 1125899906842624"),
        (Box::new(put(32, 0)), "document 0 ends at token 0"),
        (Box::new(put(40, 1)), "document 1 ends at token 1"),
        (Box::new(|bytes, _| *bytes.last_mut().unwrap() = 1), "not in the vocabulary of 256"),
        (Box::new(|_, index| index["vocab_size"] = 300.into()), "the index says 300"),
        (Box::new(|_, index| index["version"] = 2.into()), "version 2"),
        (Box::new(|_, index| index["token_type"] = "u32".into()), "the index says 4"),
        (Box::new(|_, index| index["train"]["tokens"] = 1.into()), "not the sum"),
        (Box::new(|_, index| index["train"]["shards"][0]["name"] = "../x".into()), "not a plain file name"),
    ];
    for (i, (change, expected)) in cases.into_iter().enumerate() {
        let out = folder.path().join(i.to_string());
        prepare_into(&out, &paths, &Tokenizer::bytes().unwrap(), 1 << 20).unwrap();
        forge(&out, change);
        let e = Prepared::open(&out).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains(expected) && e.is_empty() == expected.is_empty(), "{expected}: {e}");
    }
}

#[test]
fn a_failed_preparation_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut paths = sources(folder.path());
    let bytes = Tokenizer::bytes().unwrap();
    let bad = folder.path().join("bad.jsonl");
    fs::write(&bad, "{}\n").unwrap();
    paths.push(bad);
    let before = fs::read_dir(folder.path()).unwrap().count();
    let out = folder.path().join("out");
    let error = prepare_into(&out, &paths, &bytes, 10).unwrap_err().to_string();
    assert!(error.contains("bad.jsonl:1: no field"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), before);
    // An existing folder with other files is not changed.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine.txt"), "x").unwrap();
    let error = prepare_into(&out, &paths[..2], &bytes, 10).unwrap_err();
    assert!(matches!(error, Error::Occupied { .. }), "{error}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    // A single document is on one side: for training without validation, or the error says what to do.
    let one = folder.path().join("one.jsonl");
    let mut sides = [0; 2];
    for i in 0..20 {
        let text = format!("document {i}");
        let document = Document { text: text.clone(), is_file: false, is_chat: false, turns: None, bytes: 0 };
        let is_train = !document.split(0.2).0.is_empty();
        sides[usize::from(is_train)] += 1;
        fs::write(&one, format!("{{\"text\":\"{text}\"}}\n")).unwrap();
        let out = folder.path().join(&text);
        match prepare_into(&out, from_ref(&one), &bytes, 10) {
            Ok(index) => {
                assert_eq!((is_train, index.train.documents, index.valid.documents), (true, 1, 0));
                assert!(Prepared::open(&out).unwrap().corpus.valid.is_empty());
            }
            Err(e) => {
                let error = e.to_string();
                assert!(
                    !is_train && error.contains("training part") && error.contains("with 0 all text"),
                    "{error}"
                );
            }
        }
    }
    assert!(sides.iter().all(|&n| n > 0), "{sides:?}");
}
