//! Reading documents of every supported format, and the refusal of the others.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::slice::from_ref;

use flate2::Compression;
use flate2::write::GzEncoder;
use gd_model::config::DocumentFormat;
use gd_model::data::{Corpus, Documents, ReadSummary, Texts};
use gd_model::io::chat_template::ChatTemplate;
use gd_model::io::files::read_text;
use gd_model::io::tokenizer::Tokenizer;
use gd_testing::{log_cases, properties};
use proptest::prelude::*;

const RECORDS: &str = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 1).unwrap()
}

fn utf16(text: &str, big_endian: bool) -> Vec<u8> {
    text.encode_utf16().flat_map(|x| if big_endian { x.to_be_bytes() } else { x.to_le_bytes() }).collect()
}

/// The texts of a file, with what was read.
fn read(path: &Path, format: &DocumentFormat) -> Result<(Vec<String>, ReadSummary), String> {
    let mut documents = Documents::open(&[path.to_path_buf()], format).map_err(|e| e.to_string())?;
    let texts = documents.by_ref().map(|d| d.map(|d| d.text)).collect::<gd_model::Result<Vec<_>>>();
    texts.map(|texts| (texts, documents.summary())).map_err(|e| e.to_string())
}

fn separated(by: &str) -> DocumentFormat {
    DocumentFormat { separator: Some(by.into()), ..DocumentFormat::default() }
}

#[test]
fn every_format_gives_the_same_records() {
    let dir = tempfile::tempdir().unwrap();
    let mark = |text: &str| format!("\u{feff}{text}").into_bytes();
    let pretty = "[\n  {\n    \"text\": \"one\"\n  },\n  {\"text\": \"two\"}\n]\n";
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("a.jsonl", RECORDS.into()),
        ("a.JSONL", RECORDS.replace('\n', "\r\n").into()),
        ("a.ndjson", RECORDS.into()),
        ("a.json", RECORDS.into()),
        ("b.json", pretty.into()),
        ("c.json", pretty.replace(['\n', ' '], "").into()),
        ("d.json", RECORDS.replace('{', "{\n").into()),
        ("mark.jsonl", mark(RECORDS)),
        ("mark.json", mark(pretty)),
        // Two files with a mark each, joined.
        ("joined.jsonl", RECORDS.split_inclusive('\n').flat_map(&mark).collect()),
        ("a.jsonl.gz", gzip(RECORDS.as_bytes())),
        ("a.jsonl.zst", zstd(RECORDS.as_bytes())),
        ("b.json.gz", gzip(&mark(pretty))),
        ("b.json.ZST", zstd(&mark(pretty))),
        // Several members, as `cat a.gz b.gz` gives them, and a compressed file whose name does not say so.
        ("two.jsonl.gz", RECORDS.split_inclusive('\n').flat_map(|line| gzip(line.as_bytes())).collect()),
        ("two.jsonl.zst", RECORDS.split_inclusive('\n').flat_map(|line| zstd(line.as_bytes())).collect()),
        ("plain.jsonl", gzip(RECORDS.as_bytes())),
    ];
    for (name, content) in &cases {
        let path = write(dir.path(), name, content);
        let (texts, summary) =
            read(&path, &DocumentFormat::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(texts, ["one", "two"], "{name}");
        assert_eq!((summary.files, summary.documents, summary.bytes), (1, 2, 6), "{name}");
    }
    log_cases("document-formats", cases.len());
}

#[test]
fn text_files_lose_their_mark_and_their_compression() {
    let dir = tempfile::tempdir().unwrap();
    let text = "one\n-- \ntwo\n";
    for (name, content) in [
        ("a.txt", text.as_bytes().to_vec()),
        ("mark.txt", format!("\u{feff}{text}").into_bytes()),
        ("a.txt.gz", gzip(format!("\u{feff}{text}").as_bytes())),
        ("a.md.zst", zstd(text.as_bytes())),
        ("a.gz", gzip(text.as_bytes())),
    ] {
        let path = write(dir.path(), name, &content);
        assert_eq!(read(&path, &DocumentFormat::default()).unwrap().0, [text], "{name}");
        assert_eq!(read(&path, &separated("-- ")).unwrap().0, ["one\n", "two\n"], "{name}");
    }
    // A mark elsewhere is a character of the text.
    let path = write(dir.path(), "inner.txt", "a\u{feff}b");
    assert_eq!(read(&path, &DocumentFormat::default()).unwrap().0, ["a\u{feff}b"]);
    let prompts = write(dir.path(), "prompts.txt", "\u{feff}Hi\n");
    assert_eq!(read_text(&prompts).unwrap(), "Hi\n");
    // An offset in an error is that of the file.
    let broken = write(dir.path(), "broken.txt", b"\xef\xbb\xbfgood \xff");
    let error = read(&broken, &DocumentFormat::default()).unwrap_err();
    assert!(error.ends_with("broken.txt: invalid UTF-8 at byte 8"), "{error}");
}

#[test]
fn other_encodings_and_formats_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let text = "some text\n";
    let with_mark = |mark: &[u8], text: Vec<u8>| [mark, &text].concat();
    for (name, content, expected) in [
        ("le.txt", with_mark(b"\xff\xfe", utf16(text, false)), "UTF-16"),
        ("be.txt", with_mark(b"\xfe\xff", utf16(text, true)), "UTF-16"),
        ("le.jsonl", with_mark(b"\xff\xfe", utf16(RECORDS, false)), "UTF-16"),
        ("bare_le.txt", utf16(text, false), "UTF-16LE"),
        ("bare_be.txt", utf16(text, true), "UTF-16BE"),
        ("wide.txt", with_mark(b"\xff\xfe\0\0", b"a\0\0\0".to_vec()), "UTF-32"),
        ("le.txt.gz", gzip(&with_mark(b"\xff\xfe", utf16(text, false))), "UTF-16"),
        ("a.parquet", b"PAR1".to_vec(), "not a valid parquet file"),
        ("parquet.txt", b"PAR1\x15\x04".to_vec(), "it is a parquet file"),
        ("a.txt.xz", b"\xfd7zXZ\0\0".to_vec(), "xz -d"),
        ("a.txt.bz2", b"BZh91AY&SY".to_vec(), "bzip2 -d"),
        ("a.zip", b"PK\x03\x04\x14".to_vec(), "unzip"),
        ("cut.txt.gz", gzip(text.as_bytes())[..20].to_vec(), "cannot read"),
        ("cut.txt.zst", zstd(text.as_bytes())[..12].to_vec(), "cannot read"),
    ] {
        let path = write(dir.path(), name, &content);
        let error = read(&path, &DocumentFormat::default()).unwrap_err();
        assert!(error.contains(name) && error.contains(expected), "{name}: {error}");
        if expected.starts_with("UTF-16") && !name.ends_with("gz") {
            assert!(read_text(&path).unwrap_err().to_string().contains("iconv"), "{name}");
        }
    }
    // A folder is read without its other files; one that has no others is an error.
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    write(&folder, "a.bin", "PAR1");
    assert!(read(&folder, &DocumentFormat::default()).unwrap_err().contains("no .txt"));
    write(&folder, "a.ndjson.gz", gzip(RECORDS.as_bytes()));
    assert_eq!(read(&folder, &DocumentFormat::default()).unwrap().0, ["one", "two"]);
}

#[test]
fn a_broken_array_names_its_line() {
    let dir = tempfile::tempdir().unwrap();
    for (content, expected) in [
        ("[\n{\"text\": \"a\"},\n{\"text\" \"b\"}\n]", "line 3: expected `:`"),
        ("[{\"text\": \"a\"}\n{\"text\": \"b\"}]", "line 2: `,` or `]` is expected"),
        ("[{\"text\": \"a\"},\n", "line 2: a value is expected"),
        ("[{\"text\": \"a\"}\n", "line 2: the array does not end"),
        ("[{\"text\": \"a\"}]\nx", "text follows the array"),
        (
            "[\n{\"text\": \"a\"},\n{\"body\": \"b\"}\n]",
            "x.json:3: no field \"text\"; the record has \"body\"",
        ),
        ("[\"a\"]", "x.json:1: no field \"text\", because the record is no object"),
        ("[]", "empty"),
    ] {
        let path = write(dir.path(), "x.json", content);
        let error = read(&path, &DocumentFormat::default()).unwrap_err();
        assert!(error.contains("x.json") && error.contains(expected), "{content}: {error}");
    }
}

#[test]
fn a_separator_is_matched_as_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "x.txt", "a\n--\nb\n-- \nc\r\n-- \r\nd --\n -- \ne");
    let read = |by: &str| read(&path, &separated(by)).unwrap().0;
    assert_eq!(read("-- "), ["a\n--\nb\n", "c\r\n", "d --\n -- \ne"]);
    // White space at the end of a line counts only if the separator has some.
    assert_eq!(read("--"), ["a\n", "b\n", "c\r\n", "d --\n -- \ne"]);
    assert_eq!(read(" -- ").len(), 2);
    assert_eq!(read("---").len(), 1);
    let error = Documents::open(from_ref(&path), &separated("--\n")).unwrap_err().to_string();
    assert!(
        error.contains("train.documents.separator must be a single line") && error.contains("\"--\\n\""),
        "{error}"
    );
}

#[test]
fn bad_lines_can_be_left_out_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"text\": \"a\"}\n{\"body\": 1, \"id\": 2}\nno\n{\"text\": 3}\n{\"text\": \"\"}\n{\"text\": \"b\"}\n";
    let path = write(dir.path(), "x.jsonl", lines);
    let error = read(&path, &DocumentFormat::default()).unwrap_err();
    let expected = "x.jsonl:2: no field \"text\"; the record has \"body\", \"id\" (the first of 3 bad lines)";
    assert!(error.ends_with(expected), "{error}");
    let skip = DocumentFormat { skip_bad_lines: true, ..DocumentFormat::default() };
    let (texts, summary) = read(&path, &skip).unwrap();
    assert_eq!(texts, ["a", "b"]);
    assert_eq!((summary.documents, summary.bad_lines, summary.blank_documents), (2, 3, 1));
    assert_eq!(summary.to_string(), "1 file, 2 documents, 2 bytes; left out: 3 bad lines, 1 blank document");
    // If nothing is left, the bad lines are the error.
    let path = write(dir.path(), "y.jsonl", "no\nno\n");
    assert!(read(&path, &skip).unwrap_err().contains("y.jsonl:1: no JSON"));
}

#[test]
fn empty_files_are_left_out_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let paths =
        [("a.txt", ""), ("b.txt", "\u{feff}"), ("c.txt", " \n"), ("d.txt", "text"), ("e.jsonl", "\n")]
            .map(|(name, content)| write(dir.path(), name, content));
    let mut documents = Documents::open(&paths, &DocumentFormat::default()).unwrap();
    assert_eq!(documents.by_ref().map(|d| d.unwrap().text).collect::<Vec<_>>(), ["text"]);
    assert_eq!((documents.summary().files, documents.summary().empty_files), (5, 4));
    let error = read(&paths[0], &DocumentFormat::default()).unwrap_err();
    assert!(error.ends_with("a.txt: empty, there is no text"), "{error}");
}

#[test]
fn chats_are_written_by_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let chat = serde_json::json!({ "messages": [
        { "role": "user", "content": "hi" }, { "role": "assistant", "content": "yo" },
    ]});
    let path = write(
        dir.path(),
        "chat.jsonl",
        format!("{chat}\n{{\"text\": \"plain\"}}\n{{\"messages\": [{{}}]}}\n"),
    );
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    let template = ChatTemplate::new(template.into(), Default::default()).unwrap();
    let open = |format: &DocumentFormat| {
        Documents::open(from_ref(&path), format).unwrap().with_chat_template(Some(template.clone()))
    };
    let skip = DocumentFormat { skip_bad_lines: true, ..DocumentFormat::default() };
    let documents: Vec<_> = open(&skip).map(Result::unwrap).collect();
    let texts: Vec<_> = documents.iter().map(|d| (d.text.as_str(), d.is_chat)).collect();
    assert_eq!(texts, [("<user>hi<assistant>yo", true), ("plain", false)]);
    let error = open(&DocumentFormat::default()).last().unwrap().unwrap_err().to_string();
    assert!(error.contains("chat.jsonl:3") && error.contains("a role each"), "{error}");
    // The field may be named, and without a template it is an error that says what to do.
    let named = DocumentFormat { text_field: "messages".into(), ..skip.clone() };
    assert_eq!(open(&named).next().unwrap().unwrap().text, "<user>hi<assistant>yo");
    let error = read(&path, &skip).unwrap_err();
    assert!(
        error.contains("chat.jsonl:1: the record is a chat") && error.contains("gd data prepare"),
        "{error}"
    );
    // No end token follows a chat, because the template has written what ends it.
    let texts = Texts::from_documents(open(&skip), 0.0).unwrap();
    let tokenizer = Tokenizer::train_bpe(["<user>hi"].into_iter(), 260).unwrap();
    let corpus = Corpus::encode(&texts, &tokenizer).unwrap();
    let end = tokenizer.end_of_text().unwrap();
    let ends: Vec<_> = corpus.train.ends(0..corpus.train.len());
    let last: Vec<_> = ends.iter().map(|&at| corpus.train.read(at - 1..at)[0] == end).collect();
    assert_eq!(last, [false, true]);
}

#[test]
fn a_single_document_is_for_training() {
    let dir = tempfile::tempdir().unwrap();
    // Their hashes put them on different sides.
    for (text, fraction) in [("a", 0.5), ("b", 0.5), ("c", 0.5), ("d", 0.5), ("a", 0.0)] {
        let path = write(dir.path(), "one.jsonl", format!("{{\"text\": \"{text}\"}}\n"));
        let texts = Texts::load(&[path], &DocumentFormat::default(), fraction).unwrap();
        assert_eq!((texts.train.len(), texts.valid.len()), (1, 0), "{text}");
    }
    let texts = Texts::split(&["a whole file".into()], 0.0).unwrap();
    assert_eq!((texts.train[0].text.as_str(), texts.valid.len()), ("a whole file", 0));
}

proptest! {
    #![proptest_config(properties(256))]

    /// Records written in any format give their texts, whatever characters these have.
    #[test]
    fn records_of_any_text_are_read_in_every_format(texts in prop::collection::vec("\\PC{1,20}", 1..8)) {
        let texts: Vec<String> = texts.into_iter().filter(|text| !text.trim().is_empty()).collect();
        prop_assume!(!texts.is_empty());
        let records: Vec<_> = texts.iter().map(|text| serde_json::json!({ "text": text, "id": 1 })).collect();
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("a.jsonl", lines.clone().into_bytes()),
            ("a.jsonl.gz", gzip(lines.as_bytes())),
            ("a.json", serde_json::to_vec(&records).unwrap()),
            ("b.json", serde_json::to_vec_pretty(&records).unwrap()),
            ("b.json.zst", zstd(&serde_json::to_vec_pretty(&records).unwrap())),
        ] {
            let path = write(dir.path(), name, content);
            prop_assert_eq!(&read(&path, &DocumentFormat::default()).unwrap().0, &texts, "{}", name);
        }
    }
}

/// The rows of text.snappy.parquet.
const PARQUET_ROWS: usize = 18;

#[test]
fn parquet_files_give_their_rows() {
    let at = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet").join(name);
    // Rows without a text are bad; the others are read in order, over several row groups.
    let skipping = DocumentFormat { skip_bad_lines: true, ..DocumentFormat::default() };
    let (texts, summary) = read(&at("text.snappy.parquet"), &skipping).unwrap();
    let golden: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(at("text.json")).unwrap()).unwrap();
    assert_eq!(texts, golden);
    assert_eq!((summary.files, summary.bad_lines, summary.blank_documents), (1, 3, 3));
    let error = read(&at("text.snappy.parquet"), &DocumentFormat::default()).unwrap_err();
    assert!(error.contains("text.snappy.parquet:5: \"text\" is not a string"), "{error}");
    // Another column, and a name that is no column.
    let by = |field: &str| DocumentFormat { text_field: field.into(), ..DocumentFormat::default() };
    assert_eq!(read(&at("body.gzip.parquet"), &by("body")).unwrap().0, ["a", "b"]);
    let error = read(&at("body.gzip.parquet"), &DocumentFormat::default()).unwrap_err();
    assert!(error.contains("no field \"text\"; the record has \"body\", \"n\""), "{error}");
    assert_eq!(read(&at("binary.parquet"), &skipping).unwrap().0, ["plain"]);
    // Chats have all their fields; those without a value are none.
    let template = "{% for m in messages %}{{ m.role }}{% if m.name %}({{ m.name }}){% endif %}: {{ m.content }}\n\
                    {% endfor %}";
    let template = ChatTemplate::new(template.into(), Default::default()).unwrap();
    let documents = Documents::open(&[at("chats.zstd.parquet")], &DocumentFormat::default()).unwrap();
    let texts: Vec<_> = documents.with_chat_template(Some(template)).map(|d| d.unwrap().text).collect();
    assert_eq!(texts, ["user: Hi\nassistant(bot): Hello\n", "system: Be brief.\nuser: ?\n"]);
    let folder = tempfile::tempdir().unwrap();
    for name in ["text.snappy.parquet", "binary.parquet"] {
        std::fs::copy(at(name), folder.path().join(name)).unwrap();
    }
    assert_eq!(read(folder.path(), &skipping).unwrap().0.len(), golden.len() + 1);
    log_cases("parquet", 7);
}

#[test]
fn damaged_parquet_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet/text.snappy.parquet");
    let whole = std::fs::read(&source).unwrap();
    let skipping = DocumentFormat { skip_bad_lines: true, ..DocumentFormat::default() };
    let mut cases = 0;
    for cut in (0..whole.len()).step_by(37) {
        let path = write(dir.path(), "cut.parquet", &whole[..cut]);
        assert!(read(&path, &skipping).unwrap_err().contains("cut.parquet"), "{cut} bytes");
        cases += 1;
    }
    // A changed byte is an error, or changes the rows, or concerns a column or a hint that is not read.
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        let path = write(dir.path(), "flip.parquet", &damaged);
        match read(&path, &skipping) {
            Ok((texts, _)) => assert!(texts.len() <= PARQUET_ROWS, "byte {at}"),
            Err(error) => assert!(error.contains("flip.parquet"), "byte {at}: {error}"),
        }
        cases += 1;
    }
    log_cases("parquet-damage", cases);
}
