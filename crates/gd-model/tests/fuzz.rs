//! Readers of untrusted files with mutated inputs: no reader panics, and none allocates more memory than its input justifies.
//!
//! The readers and the corpus are those of the fuzz target, see fuzz/src/readers.rs. The mutations follow from a seed.
//! `GD_FUZZ` sets the number of inputs per reader.

#[path = "../../../fuzz/src/readers.rs"]
mod readers;

use std::fs;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use gd_testing::{case_count, log_cases};
use peak_alloc::PeakAlloc;
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use readers::{READERS, ReaderFolder, bounded};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// The default number of inputs per reader.
const RUNS: usize = 3000;

/// Numbers at the limits of integer types, for lengths, counts and offsets.
const NUMBERS: [u64; 16] = [
    0,
    1,
    2,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    1 << 61,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Values of an unexpected kind for text formats.
const WORDS: [&str; 14] = [
    "null",
    "[]",
    "{}",
    "\"\"",
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "true",
    "\"\\ud800\"",
    "[[[[",
    "nan",
    "{% for x in range(9999) %}",
    "../x",
];

/// A mutation of one of the corpus files of a reader.
fn mutated(corpus: &[Vec<u8>], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut input = corpus.choose(rng).cloned().unwrap_or_default();
    for _ in 0..[1, 1, 2, 4].choose(rng).copied().unwrap_or(1) {
        let at = rng.random_range(0..=input.len());
        // In a text, mostly whole words are replaced, so that the input passes the parser and reaches the code behind it.
        let word = std::str::from_utf8(&input).is_ok() && rng.random_bool(0.6);
        match if word { 5 } else { rng.random_range(0..9) } {
            0 => input.truncate(at),
            1 | 2 => {
                for _ in 0..rng.random_range(1..=8) {
                    let at = rng.random_range(0..input.len().max(1));
                    if let Some(byte) = input.get_mut(at) {
                        *byte ^= 1 << rng.random_range(0..8);
                    }
                }
            }
            // Overwrites an integer, usually at a multiple of its width.
            3 | 4 => {
                let width = [1, 2, 4, 8].choose(rng).copied().unwrap_or(8);
                let at = if rng.random_bool(0.6) { at / width * width } else { at };
                let number = NUMBERS
                    .choose(rng)
                    .copied()
                    .unwrap_or(0)
                    .wrapping_add(rng.random_range(0..3))
                    .wrapping_sub(1);
                if let Some(field) = input.get_mut(at..at + width) {
                    field.copy_from_slice(&number.to_le_bytes()[..width]);
                }
            }
            // Replaces a number or a word of a text.
            5 => {
                let word = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'"' | b'_');
                let start = (at..input.len()).find(|&i| word(&input[i])).unwrap_or(input.len());
                let end = (start..input.len()).find(|&i| !word(&input[i])).unwrap_or(input.len());
                let new = match rng.random_bool(0.5) {
                    true => NUMBERS.choose(rng).map(u64::to_string).unwrap_or_default(),
                    false => WORDS.choose(rng).map(|word| (*word).to_owned()).unwrap_or_default(),
                };
                input.splice(start..end, new.bytes());
            }
            // Replaces a range by a range of any corpus file.
            6 | 7 => {
                let other = corpus.choose(rng).cloned().unwrap_or_default();
                let from = rng.random_range(0..=other.len());
                let to = (from + rng.random_range(0..=64)).min(other.len());
                let end = (at + rng.random_range(0..=64)).min(input.len());
                input.splice(at..end, other[from..to].iter().copied());
            }
            _ => {
                let mut bytes = [0; 8];
                rng.fill_bytes(&mut bytes);
                input.splice(at..at, bytes.into_iter().take(rng.random_range(1..=8)));
            }
        }
    }
    input
}

fn corpus_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus")
}

fn corpus(reader: &str) -> Result<Vec<Vec<u8>>> {
    let folder = corpus_folder().join(reader);
    let files = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
    let mut files = files.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    ensure!(!files.is_empty(), "{} is empty", folder.display());
    files.iter().map(|file| Ok(fs::read(file)?)).collect()
}

/// Checks the memory limit: memory that every call allocates counts, memory that only the first call allocates does not.
fn check_the_measurement() {
    const LIMIT: usize = 1 << 20;
    let allocate = || black_box(vec![0u8; 2 * LIMIT]);
    let every_call = || bounded("every call", LIMIT, &MEMORY, || !allocate().is_empty());
    let panic = catch_unwind(every_call).expect_err("2 MiB of 1 MiB");
    let text = panic.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
    assert!(text.contains("every call: 2097") && text.contains("1048576 allowed"), "{text}");
    let once = OnceLock::new();
    assert!(bounded("first call", LIMIT, &MEMORY, || !once.get_or_init(allocate).is_empty()));
}

/// A single test, because memory is counted for the whole process.
#[test]
fn no_reader_panics_or_allocates_more_than_its_input_justifies() -> Result<()> {
    check_the_measurement();
    let runs = case_count("GD_FUZZ", RUNS);
    let folder = ReaderFolder::new(&corpus_folder())?;
    for (at, reader) in READERS.into_iter().enumerate() {
        let corpus = corpus(reader)?;
        let valid = corpus.iter().filter(|file| folder.run(reader, file, &MEMORY)).count();
        ensure!(
            valid * 2 >= corpus.len(),
            "{reader}: {valid} of {} files of the corpus are accepted",
            corpus.len()
        );
        let mut rng = ChaCha8Rng::seed_from_u64(at as u64);
        let mut accepted = 0;
        for run in 0..runs {
            let input = mutated(&corpus, &mut rng);
            let result = catch_unwind(AssertUnwindSafe(|| folder.run(reader, &input, &MEMORY)));
            let Ok(ok) = result else {
                let file = std::env::temp_dir().join(format!("failed-{reader}"));
                fs::write(&file, &input)?;
                anyhow::bail!("{reader}, input {run}: failed; the input is at {}", file.display());
            };
            accepted += usize::from(ok);
        }
        // If all mutations were refused, the test would reach little code. Some files contain hashes of all of their content,
        // so almost every change is refused.
        let hashed = ["manifest", "trace", "proof"].contains(&reader);
        ensure!(accepted > 0 || hashed, "{reader}: none of {runs} inputs was accepted");
        println!("{reader}: {accepted} of {runs} inputs were accepted");
        log_cases(&format!("fuzz-{reader}"), runs);
    }
    Ok(())
}
