//! Reading, splitting and batching text.

use std::collections::HashSet;
use std::path::PathBuf;
use std::slice::from_ref;

use candle_core::Device;
use gd_kernels::cross_entropy::IGNORE;
use gd_model::Error;
use gd_model::config::DocumentFormat;
use gd_model::data::{Batches, Corpus, Document, Documents, Texts, Tokens, places, text_files};
use gd_model::io::files::read_text;
use gd_model::io::tokenizer::Tokenizer;

fn file(folder: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    path
}

/// Lines that are all different, so that a window identifies its position.
fn lines(name: &str, count: usize) -> String {
    (0..count).map(|i| format!("{name} line {i} end\n")).collect()
}

#[test]
fn read_errors_name_file_and_reason() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.txt");
    assert!(matches!(read_text(&missing), Err(Error::Missing { .. })));
    assert!(read_text(&missing).unwrap_err().to_string().contains("none.txt: no such text file"));
    let empty = file(&folder, "empty.txt", "");
    assert!(matches!(read_text(&empty), Err(Error::Empty { .. })));
    let broken = file(&folder, "broken.txt", b"good \xe2\x80 bad");
    assert!(matches!(read_text(&broken), Err(Error::InvalidUtf8 { offset: 5, .. })));
    assert!(read_text(&broken).unwrap_err().to_string().ends_with("broken.txt: invalid UTF-8 at byte 5"));
    assert!(matches!(read_text(folder.path()), Err(Error::Unreadable { .. })));
    std::fs::create_dir(folder.path().join("bare")).unwrap();
    file(&folder, "bare/image.png", "x");
    assert!(matches!(text_files(&[folder.path().join("bare")]), Err(Error::Empty { .. })));
    assert!(matches!(text_files(&[missing]), Err(Error::Missing { .. })));
    assert!(matches!(text_files(&[]), Err(Error::Invalid(_))));
}

#[test]
fn folders_are_read_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["b.txt", "a.md", "sub/c.TXT", "skip.json"] {
        file(&folder, name, "x");
    }
    let files = text_files(&[folder.path().to_path_buf()]).unwrap();
    let names: Vec<_> =
        files.iter().map(|p| p.strip_prefix(folder.path()).unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["a.md", "b.txt", "sub/c.TXT"]);
}

#[test]
fn split_by_position_cuts_every_file_at_a_line() {
    let texts = [lines("one", 200), lines("two", 100)];
    let split = Texts::split(&texts, 0.1).unwrap();
    for ((train, valid), text) in split.train.iter().zip(&split.valid).zip(&texts) {
        let (train, valid) = (&train.text, &valid.text);
        assert_eq!(&format!("{train}{valid}"), text);
        assert!(train.ends_with('\n'));
        let share = valid.len() as f64 / text.len() as f64;
        assert!(share > 0.07 && share <= 0.1, "{share}");
    }
    // Without a line break nearby, the text is split between characters.
    let split = Texts::split(&["—".repeat(1000)], 0.1001).unwrap();
    assert_eq!(split.train[0].text.len() + split.valid[0].text.len(), 3000);
    assert_eq!(split.train[0].text.len(), 2697);
}

fn documents(paths: &[PathBuf], reading: &DocumentFormat) -> Vec<String> {
    Documents::open(paths, reading).unwrap().map(|d| d.unwrap().text).collect()
}

#[test]
fn separators_and_jsonl_make_documents() {
    let folder = tempfile::tempdir().unwrap();
    let text = file(&folder, "a.txt", "one\ntwo\n***\n\n***\nthree\r\n***\r\nfour");
    let json =
        file(&folder, "b.JSONL", "{\"text\":\"x\\ny\",\"id\":1}\n\n{\"text\":\" \"}\n{\"text\":\"z\"}");
    let plain = DocumentFormat::default();
    assert_eq!(documents(from_ref(&json), &plain), ["x\ny", "z"]);
    assert_eq!(documents(from_ref(&text), &plain).len(), 1);
    let separated = DocumentFormat { separator: Some("***".into()), ..DocumentFormat::default() };
    let all = ["one\ntwo\n", "three\r\n", "four", "x\ny", "z"];
    assert_eq!(documents(&[text.clone(), json.clone()], &separated), all);
    assert_eq!(documents(&[folder.path().to_path_buf()], &separated), all);
    // The documents account for all bytes of the file.
    let read: u64 = Documents::open(from_ref(&text), &separated).unwrap().map(|d| d.unwrap().bytes).sum();
    assert_eq!(read + "\n***\n".len() as u64, text.metadata().unwrap().len());
    let ids = DocumentFormat { text_field: "id".into(), ..DocumentFormat::default() };
    let error = Documents::open(&[json], &ids).unwrap().last().unwrap().unwrap_err().to_string();
    assert!(error.contains("b.JSONL:1: \"id\" is not a string (the first of 3 bad lines)"), "{error}");
}

#[test]
fn bad_lines_are_named_with_file_and_number() {
    let folder = tempfile::tempdir().unwrap();
    for (content, expected) in [
        (&b"{\"text\":\"a\"}\n{\"text\":\n"[..], "x.jsonl:2: no JSON"),
        (b"\n\n{\"body\":\"a\"}\n", "x.jsonl:3: no field \"text\""),
        (b"{\"text\":7}", "x.jsonl:1: \"text\" is not a string"),
        (b"[1]", "x.jsonl:1: no field"),
        (b"{\"text\":\"\xff\"}", "x.jsonl:1: no JSON"),
        (b"7\n{\"text\":\"a\"}\n8\n", "(the first of 2 bad lines)"),
    ] {
        let path = file(&folder, "x.jsonl", content);
        let items: Vec<_> = Documents::open(&[path], &DocumentFormat::default()).unwrap().collect();
        assert!(items.iter().rev().skip(1).all(Result::is_ok));
        let error = items.into_iter().last().unwrap().unwrap_err().to_string();
        assert!(error.contains(expected) && !error.contains('\n'), "{error}");
    }
    let path = file(&folder, "y.txt", b"good\n--\nbad \xff\n--\ngood\n");
    let separated = DocumentFormat { separator: Some("--".into()), ..DocumentFormat::default() };
    let error = Documents::open(&[path], &separated).unwrap().last().unwrap().unwrap_err().to_string();
    assert!(error.ends_with("y.txt:4: invalid UTF-8 in the document that ends here"), "{error}");
}

#[test]
fn the_side_of_a_document_does_not_depend_on_the_others() {
    let side = |text: &str, share| {
        let document = Document { text: text.into(), is_file: false, is_chat: false, turns: None, bytes: 0 };
        let (train, valid) = document.split(share);
        assert_eq!(format!("{train}{valid}"), text);
        assert!(train.is_empty() || valid.is_empty());
        !valid.is_empty()
    };
    let texts: Vec<String> = (0..4000).map(|i| format!("document {i}")).collect();
    let valid = |share| texts.iter().filter(|t| side(t, share)).count();
    assert!((320..480).contains(&valid(0.1)), "{}", valid(0.1));
    assert!((1900..2100).contains(&valid(0.5)), "{}", valid(0.5));
    assert!(texts.iter().all(|t| side(t, 0.5) || !side(t, 0.1)), "a greater share keeps the lesser one");
}

#[test]
fn validation_share_is_checked() {
    for share in [1.0, -0.1, f64::NAN] {
        let error = Texts::split(&["abc".into()], share).unwrap_err();
        assert!(error.to_string().contains(&share.to_string()), "{error}");
    }
}

#[test]
fn no_training_window_holds_validation_text() {
    let folder = tempfile::tempdir().unwrap();
    let paths = [file(&folder, "a.txt", lines("a", 300)), file(&folder, "b.txt", lines("b", 200))];
    let tokenizer = Tokenizer::bytes().unwrap();
    let texts = Texts::load(&paths, &DocumentFormat::default(), 0.1).unwrap();
    let corpus = Corpus::encode(&texts, &tokenizer).unwrap();
    assert_eq!(corpus.valid.len(), corpus.valid_bytes);
    assert_eq!(corpus.train.len(), corpus.train_bytes);
    let valid = tokenizer.decode(&corpus.valid.read(0..corpus.valid.len())).unwrap();
    let held_out: Vec<&str> = valid.lines().collect();
    assert!(held_out.len() > 30);
    let batches = Batches::new(corpus.train.clone(), 7);
    let per_epoch = batches.windows_per_epoch(64).unwrap() as u64;
    for step in 0..3 * per_epoch {
        let batch = batches.batch(step..step + 1, 64, &Device::Cpu).unwrap();
        let mut ids = batch.inputs.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        let targets = batch.targets.flatten_all().unwrap().to_vec1::<u32>().unwrap();
        ids.extend(targets.last().filter(|&&t| t != IGNORE));
        let text = tokenizer.decode(&ids).unwrap();
        assert!(!held_out.iter().any(|line| text.contains(line)), "{text}");
    }
}

#[test]
fn batches_depend_on_seed_and_step_alone() {
    let tokens = Tokens::from((0..1000).collect::<Vec<u32>>());
    let read = |b: &Batches, step, n| {
        let batch = b.batch(places(step, n, 0, 1), 16, &Device::Cpu).unwrap();
        (batch.inputs.to_vec2::<u32>().unwrap(), batch.targets.to_vec2::<u32>().unwrap())
    };
    let (a, b) = (Batches::new(tokens.clone(), 1), Batches::new(tokens.clone(), 1));
    let forward: Vec<_> = (0..50).map(|s| read(&a, s, 4)).collect();
    let backward: Vec<_> = (0..50).rev().map(|s| read(&b, s, 4)).collect();
    assert!(forward.iter().eq(backward.iter().rev()));
    assert_ne!(forward[0], read(&Batches::new(tokens.clone(), 2), 0, 4));
    for (x, y) in &forward {
        for (x, y) in x.iter().zip(y) {
            assert!(x.windows(2).all(|w| w[1] == w[0] + 1));
            assert!(x.iter().zip(y).all(|(x, y)| *y == x + 1));
        }
    }
}

#[test]
fn an_epoch_covers_the_text_once() {
    let batches = Batches::new((0..1000).collect::<Vec<u32>>().into(), 3);
    let n = batches.windows_per_epoch(16).unwrap();
    assert_eq!(n, 61);
    let epoch = |number: u64| -> HashSet<u32> {
        let (mut visited, mut firsts) = (HashSet::new(), Vec::new());
        for i in 0..n as u64 {
            let at = number * n as u64 + i;
            let batch = batches.batch(at..at + 1, 16, &Device::Cpu).unwrap();
            let ids = batch.inputs.flatten_all().unwrap().to_vec1::<u32>().unwrap();
            firsts.push(ids[0]);
            for id in ids {
                assert!(visited.insert(id), "token {id} twice in epoch {number}");
            }
        }
        let neighbours = firsts.windows(2).filter(|w| w[1] == w[0] + 16).count();
        assert!(neighbours < 8, "epoch {number} is not shuffled: {firsts:?}");
        visited
    };
    let phases: HashSet<u32> = (0..20).map(|e| *epoch(e).iter().min().unwrap()).collect();
    assert!(phases.len() > 10, "{phases:?}");
}

#[test]
fn short_texts_name_both_numbers() {
    let batches = Batches::new(vec![0; 16].into(), 0);
    let error = batches.batch(0..1, 16, &Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::TooShort { tokens: 16, needed: 17, .. }));
    assert_eq!(
        error.to_string(),
        "the training text has 16 tokens, but one window needs 17 (context 16 + 1)"
    );
    assert!(Batches::new(vec![0; 17].into(), 0).batch(15..18, 16, &Device::Cpu).is_ok());
    assert!(batches.batch(0..0, 4, &Device::Cpu).unwrap_err().to_string().contains("batch"));
    assert!(batches.batch(0..1, 0, &Device::Cpu).unwrap_err().to_string().contains("context"));
    let corpus =
        Corpus { train: vec![0; 40].into(), valid: vec![0; 8].into(), train_bytes: 40, valid_bytes: 8 };
    let error = corpus.check(8).unwrap_err().to_string();
    assert!(error.contains("validation text has 8 tokens") && error.contains('9'), "{error}");
    assert!(corpus.check(7).is_ok());
}

#[test]
fn windows_predict_every_token_but_the_first_once() {
    for n in 0..20u32 {
        let tokens = Tokens::from((0..n).collect::<Vec<u32>>());
        let inputs: Vec<usize> = tokens.windows(6).flatten().collect();
        assert_eq!(inputs, (0..(n as usize).saturating_sub(1)).collect::<Vec<_>>());
    }
}
