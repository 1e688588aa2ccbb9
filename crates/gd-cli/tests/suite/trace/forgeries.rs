//! Forgeries by someone who can write a whole trace with correct hashes, by class. None of them may be verified completely: the
//! file is refused, the replay contradicts it, or it says what was not checked.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use gd_model::infer::sampler::Sampling;
use gd_model::model::pretrained::Loaded;
use gd_model::trace::{self, Chain, Ending, Header, Record, ThresholdByLength, Trace};
use gd_testing::log_cases;

use super::{CPU, Recorded, models, record, written_to};

const PROMPT: &str = "Call me Ishmael.";

/// What verification and replay say about a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is refused without a replay, or the replay cannot start.
    Refused,
    /// The replay contradicts it.
    Contradicted,
    /// Not everything could be checked, and the program says so.
    Limited,
    Passed,
}

fn judge(bytes: &[u8], loaded: &Loaded) -> Result<Verdict> {
    let Ok(trace) = Trace::from_bytes(Path::new("trace"), bytes) else { return Ok(Verdict::Refused) };
    if trace::verify(&trace, None, None).is_err() {
        return Ok(Verdict::Refused);
    }
    let records = trace.decoded()?;
    let Ok(outcome) = trace::replay(&trace.header, &records, trace.ending, loaded, 1e-3, &CPU) else {
        return Ok(Verdict::Refused);
    };
    Ok(match (outcome.contradictions, outcome.unchecked.is_empty()) {
        (1.., _) => Verdict::Contradicted,
        (0, false) => Verdict::Limited,
        (0, true) => Verdict::Passed,
    })
}

/// The hash of a prompt, as the header has it.
fn input(tokens: &[u32]) -> String {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    format!("blake3:{}", blake3::hash(&bytes).to_hex())
}

/// A trace that can be changed.
#[derive(Clone)]
struct Forgery {
    header: Header,
    records: Vec<Record>,
    ending: Ending,
}

impl Forgery {
    fn of(recorded: &Recorded) -> Self {
        let Recorded { header, records, ending, .. } = recorded;
        Self { header: header.clone(), records: records.clone(), ending: *ending }
    }

    fn judge(&self, loaded: &Loaded) -> Result<Verdict> {
        judge(&written_to(&self.header, &self.records, self.ending, None)?, loaded)
    }

    /// Moves the end of the prompt, so that tokens of the prompt count as generated.
    fn relabel(&mut self, prompt: usize) {
        let tokens: Vec<u32> = self.records[..prompt].iter().map(|record| record.token).collect();
        (self.header.prompt_tokens, self.header.input) = (prompt, input(&tokens));
        self.header.max_tokens = Some(self.records.len() - prompt);
        self.records.iter_mut().for_each(|record| record.generated = record.position as usize >= prompt);
    }
}

/// Applies one class of forgery.
type Change = fn(&mut Forgery, &Recorded);

/// Forgeries that are found on the backend of the record, and on no other one.
fn of_drawn_tokens() -> Vec<(&'static str, Change)> {
    vec![
        ("a part of the prompt counts as generated", |f, _| f.relabel(9)),
        ("the continuation of another run", |f, other| {
            let prompt = f.header.prompt_tokens;
            f.records.truncate(prompt);
            f.records.extend_from_slice(&other.records[prompt..]);
        }),
        ("another seed", |f, _| f.header.seed += 1),
        ("another temperature", |f, _| {
            f.header.sampling = Some(Sampling { temperature: 0.05, ..Sampling::default() });
        }),
        ("other filters", |f, _| {
            f.header.sampling = Some(Sampling { top_k: Some(1), ..Sampling::default() })
        }),
    ]
}

/// Forgeries that are found on every backend.
fn of_content() -> Vec<(&'static str, Change)> {
    vec![
        ("every text is another", |f, _| f.records.iter_mut().for_each(|record| record.text = "x".into())),
        ("a text of the prompt is another", |f, _| f.records[2].text = "L".into()),
        ("a generated text is another", |f, _| f.records.last_mut().unwrap().text = "!".into()),
        ("a text is missing", |f, _| f.records[4].text.clear()),
        ("a text moved to its neighbour", |f, _| {
            let text = std::mem::take(&mut f.records[3].text);
            f.records[4].text.insert_str(0, &text);
        }),
        ("a text has more", |f, _| f.records[5].text.push_str(" and more")),
        ("a token of the prompt is another", |f, _| {
            f.records[1].token = u32::from(b'o');
            let tokens: Vec<u32> =
                f.records[..f.header.prompt_tokens].iter().map(|record| record.token).collect();
            f.header.input = input(&tokens);
            f.records[1].text = "o".into();
        }),
        ("the hash of the prompt is another", |f, _| f.header.input = input(&[1, 2])),
        ("an energy is another", |f, _| {
            for row in &mut f.records[8].rows {
                row.slots.iter_mut().for_each(|slot| slot.energy += 0.75);
                row.energy += 0.75;
                row.margin = row.slots.get(1).map_or(f32::INFINITY, |next| next.energy - row.energy);
            }
        }),
        ("the winner is removed", |f, _| {
            let row = f.records[9].rows.iter_mut().find(|row| row.slots.len() > 2).unwrap();
            row.slots.remove(0);
            (row.selected, row.energy) = (row.slots[0].key, row.slots[0].energy);
            row.margin = row.slots[1].energy - row.energy;
        }),
        ("a share is another", |f, _| f.records[7].rows[3].share /= 2.0),
        ("an intervention that was not made", |f, _| {
            f.header.interventions = vec!["ablate 2.1@all".parse().unwrap()];
        }),
        ("other weights", |f, _| f.header.model.weights = f.header.input.clone()),
        ("another configuration", |f, _| f.header.model.config = f.header.input.clone()),
        ("another tokenizer", |f, _| f.header.model.tokenizer = f.header.input.clone()),
        ("a layer of other heads", |f, _| f.header.layers[1].heads = 2),
        ("a layer of more candidates", |f, _| f.header.layers[1].candidates = 8),
        ("another gate", |f, _| f.header.layers[1].gate = gd_kernels::Gate::Coherence),
        ("another tie break", |f, _| f.header.layers[1].tie = gd_kernels::TieBreak::Last),
        ("a threshold that the model lacks", |f, _| f.header.layers[1].threshold = Some(vec![100.0; 4])),
        ("no running averages", |f, _| f.header.layers[1].memory = !f.header.layers[1].memory),
        ("a layer less", |f, _| f.header.layers.truncate(2)),
        ("no sampling", |f, _| {
            (f.header.sampling, f.header.max_tokens, f.header.end_tokens) = (None, None, None);
            f.ending = Ending::Read;
        }),
        ("the first half", |f, _| f.records.truncate(20)),
        ("the first half, as if the model were full", |f, _| {
            f.records.truncate(20);
            f.ending = Ending::Context;
        }),
        ("the first half, with an end token that the model lacks", |f, _| {
            f.records.truncate(20);
            f.ending = Ending::EndToken { token: 7 };
            f.header.end_tokens = Some(vec![7]);
        }),
        ("an end token that the header lacks", |f, _| {
            f.records.truncate(20);
            f.ending = Ending::EndToken { token: 7 };
        }),
        ("nothing was to be generated", |f, _| f.ending = Ending::Read),
        ("a greater maximum of tokens", |f, _| f.header.max_tokens = Some(1000)),
        ("end tokens that the model lacks", |f, _| f.header.end_tokens = Some(vec![300])),
        ("a sampling of no probability", |f, _| {
            f.header.sampling =
                Some(Sampling { temperature: f64::MAX, top_p: Some(7.0), ..Sampling::default() });
        }),
        ("a token that the model lacks", |f, _| f.records.last_mut().unwrap().token = 1000),
    ]
}

type Relabel = fn(&mut Header);

/// Ways to say that a trace is of another backend.
const BACKENDS: [(&str, Relabel); 4] = [
    ("isa", |h| h.isa = "Avx2Other".into()),
    ("gd", |h| h.gd = "0.0.1".into()),
    ("device", |h| (h.device, h.isa) = ("cuda".into(), String::new())),
    ("precision", |h| h.precision = "bf16".into()),
];

#[test]
fn no_class_of_forgery_is_verified_completely() -> Result<()> {
    let gd = &models()[0].1;
    let recorded = record(gd, PROMPT, 20, &[])?;
    let mut other = record(gd, PROMPT, 20, &[])?;
    // The same model and prompt with another seed.
    other.header.seed = 99;
    other.records.clear();
    let prompt = recorded.loaded.tokenizer.encode(PROMPT)?;
    trace::record(&recorded.loaded, &other.header, &prompt, &CPU, |record| {
        other.records.push(record);
        Ok(())
    })?;
    ensure!(Forgery::of(&recorded).judge(&recorded.loaded)? == Verdict::Passed);
    let mut classes = 0;
    let mut check = |name: &str, forgery: &Forgery, expected: &[Verdict]| -> Result<()> {
        let verdict = forgery.judge(&recorded.loaded)?;
        ensure!(expected.contains(&verdict), "{name}: {verdict:?}");
        classes += 1;
        Ok(())
    };
    for (name, change) in of_content() {
        let mut forgery = Forgery::of(&recorded);
        change(&mut forgery, &other);
        check(name, &forgery, &[Verdict::Refused, Verdict::Contradicted])?;
        // Another backend in the header does not hide it, as far as it is a matter of content.
        BACKENDS[0].1(&mut forgery.header);
        let verdict = forgery.judge(&recorded.loaded)?;
        ensure!(verdict != Verdict::Passed, "{name} elsewhere: {verdict:?}");
    }
    for (name, change) in of_drawn_tokens() {
        let mut forgery = Forgery::of(&recorded);
        change(&mut forgery, &other);
        check(name, &forgery, &[Verdict::Contradicted])?;
        for (field, relabel) in BACKENDS {
            let mut elsewhere = forgery.clone();
            relabel(&mut elsewhere.header);
            check(
                &format!("{name}, {field} changed"),
                &elsewhere,
                &[Verdict::Limited, Verdict::Contradicted],
            )?;
        }
    }
    for (field, relabel) in BACKENDS {
        let mut forgery = Forgery::of(&recorded);
        relabel(&mut forgery.header);
        check(field, &forgery, &[Verdict::Limited])?;
    }
    // A run with an intervention that the header does not mention.
    let mut forced = Forgery::of(&record(gd, PROMPT, 20, &["ablate 1.2@all"])?);
    ensure!(forced.judge(&recorded.loaded)? == Verdict::Passed);
    forced.header.interventions.clear();
    check("a hidden intervention", &forced, &[Verdict::Contradicted])?;
    ensure!(classes >= 40);
    log_cases("trace-forgery-classes", classes);
    Ok(())
}

/// A trace of version 1 of the format with these records.
fn version_1(header: &Header, records: &[Record]) -> Result<Vec<u8>> {
    let mut header = header.clone();
    (header.version, header.max_tokens, header.end_tokens) = (1, None, None);
    let text = serde_json::to_vec(&header)?;
    let (mut chain, mut raw) = (Chain::new(&text), Vec::new());
    for record in records {
        let mut bytes = Vec::new();
        record.encode(&mut bytes)?;
        chain.push(&bytes);
        raw.extend((bytes.len() as u32).to_le_bytes());
        raw.extend(bytes);
    }
    let (stored, seal) = (zstd::bulk::compress(&raw, 1)?, chain.seal(None));
    let word = |n: usize| (n as u32).to_le_bytes();
    let mut file = b"GDTRACE1".to_vec();
    for part in [&word(text.len())[..], &text, &word(raw.len()), &word(stored.len()), &stored, &word(0)] {
        file.extend(part);
    }
    file.extend(seal.count.to_le_bytes());
    [seal.chain, seal.root, seal.head].iter().for_each(|hash| file.extend(hash));
    file.push(0);
    let hash = blake3::hash(&file);
    file.extend(hash.as_bytes());
    Ok(file)
}

#[test]
fn traces_of_version_1_are_verified_with_their_limits() -> Result<()> {
    let gd = &models()[0].1;
    let read = record(gd, PROMPT, 0, &[])?;
    ensure!(judge(&version_1(&read.header, &read.records)?, &read.loaded)? == Verdict::Passed);
    let generated = record(gd, PROMPT, 12, &[])?;
    let bytes = version_1(&generated.header, &generated.records)?;
    ensure!(judge(&bytes, &generated.loaded)? == Verdict::Limited);
    let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
    let records = trace.decoded()?;
    let outcome = trace::replay(&trace.header, &records, trace.ending, &generated.loaded, 1e-3, &CPU)?;
    ensure!(
        outcome.unchecked.len() == 1 && outcome.unchecked[0].contains("why the text ends"),
        "{outcome:?}"
    );
    // Its first half is limited, and other texts are a contradiction.
    let half = version_1(&generated.header, &generated.records[..20])?;
    ensure!(judge(&half, &generated.loaded)? == Verdict::Limited);
    let mut records = generated.records.clone();
    records[3].text = "x".into();
    ensure!(judge(&version_1(&generated.header, &records)?, &generated.loaded)? == Verdict::Contradicted);
    // A trace without sampling does not hide that tokens are generated.
    let mut header = generated.header.clone();
    header.sampling = None;
    ensure!(judge(&version_1(&header, &generated.records)?, &generated.loaded)? == Verdict::Refused);
    Ok(())
}

/// A file with these blocks: the size before compression and the stored bytes.
fn with_blocks(of: &[u8], blocks: &[(usize, Vec<u8>)]) -> Result<Vec<u8>> {
    let header = 12 + u32::from_le_bytes(of[8..12].try_into()?) as usize;
    let mut bytes = of[..header].to_vec();
    for (raw, stored) in blocks {
        bytes.extend((*raw as u32).to_le_bytes());
        bytes.extend((stored.len() as u32).to_le_bytes());
        bytes.extend(stored);
    }
    // Without a signature: the end of the blocks, the ending, the count and three hashes, the kind of the signature.
    let end = 4 + 5 + 8 + 3 * 32 + 1 + 32;
    bytes.extend(&of[of.len() - end..of.len() - 32]);
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    Ok(bytes)
}

#[test]
fn a_small_file_costs_little_memory_and_time() -> Result<()> {
    let recorded = record(&models()[0].1, "A whale", 0, &[])?;
    let bytes = written_to(&recorded.header, &recorded.records, Ending::Read, None)?;
    let zeros = |n: usize| -> Result<(usize, Vec<u8>)> { Ok((n, zstd::bulk::compress(&vec![0; n], 1)?)) };
    let refused = |file: &[u8], words: &str| -> Result<()> {
        let trace = Trace::from_bytes(Path::new("bomb"), file);
        let error = trace.and_then(|trace| trace::verify(&trace, None, None)).err().context("accepted")?;
        ensure!(error.to_string().contains(words), "{words}: {error}");
        Ok(())
    };
    refused(&with_blocks(&bytes, &[zeros(1 << 26)?])?, "a block of 67108864 bytes")?;
    refused(&with_blocks(&bytes, &vec![zeros(1 << 21)?; 200])?, "32 times the size of the file")?;
    refused(&with_blocks(&bytes, &[zeros(1 << 16)?])?, "a record without content")?;
    // A record of text that compresses well is stored unchanged, so that a reader accepts what a writer wrote.
    let mut records = recorded.records.clone();
    records.iter_mut().for_each(|record| record.text = "a".repeat(65_000));
    let written = written_to(&recorded.header, &records, Ending::Read, None)?;
    ensure!(written.len() > 400_000, "{} bytes", written.len());
    let trace = Trace::from_bytes(Path::new("trace"), &written)?;
    trace::verify(&trace, None, None)?;
    // As text, because a coherence point that is not computed is NaN.
    ensure!(format!("{:?}", trace.decoded()?) == format!("{records:?}"));
    Ok(())
}

#[test]
fn an_end_token_is_recorded_and_checked() -> Result<()> {
    let mut recorded = record(&models()[0].1, PROMPT, 20, &[])?;
    // The model ends a text with the token that it draws as its tenth.
    let token = recorded.new[9];
    ensure!(!recorded.new[..9].contains(&token), "the token is drawn before");
    recorded.loaded.generation["eos_token_id"] = token.into();
    recorded.header.end_tokens = Some(recorded.loaded.end_tokens()?);
    let prompt = recorded.loaded.tokenizer.encode(PROMPT)?;
    let mut records = Vec::new();
    let (new, ending) = trace::record(&recorded.loaded, &recorded.header, &prompt, &CPU, |record| {
        records.push(record);
        Ok(())
    })?;
    ensure!(ending == Ending::EndToken { token } && new.len() == 9, "{ending}");
    let mut forgery = Forgery { header: recorded.header.clone(), records, ending };
    ensure!(forgery.judge(&recorded.loaded)? == Verdict::Passed);
    // Without the last token, another one would have been drawn in the place of the end token.
    forgery.records.pop();
    ensure!(forgery.judge(&recorded.loaded)? == Verdict::Contradicted);
    // A text that goes on after the end token.
    let mut longer = Forgery { ending: Ending::MaxTokens, ..Forgery::of(&recorded) };
    longer.header = recorded.header.clone();
    ensure!(longer.judge(&recorded.loaded)? == Verdict::Contradicted);
    // A text that fills the model.
    let full = record(&models()[0].1, PROMPT, 1000, &[])?;
    ensure!(full.ending == Ending::Context && full.records.len() == 64, "{}", full.ending);
    ensure!(Forgery::of(&full).judge(&full.loaded)? == Verdict::Passed);
    Ok(())
}

#[test]
fn thresholds_by_length_are_those_of_every_position() -> Result<()> {
    let recorded = record(&models()[4].1, PROMPT, 6, &[])?;
    let refused = |words: &str, change: &dyn Fn(&mut ThresholdByLength)| -> Result<()> {
        let mut header = recorded.header.clone();
        let by_length = header.layers[2].threshold_by_length.as_mut().context("slopes")?;
        change(by_length);
        let verified = || -> Result<()> {
            let bytes = written_to(&header, &recorded.records, recorded.ending, None)?;
            trace::verify(&Trace::from_bytes(Path::new("trace"), &bytes)?, None, None)?;
            Ok(())
        };
        let Err(error) = verified() else { anyhow::bail!("accepted, {words}") };
        ensure!(format!("{error:#}").contains(words), "{words}: {error:#}");
        Ok(())
    };
    refused("layer 2", &|by_length| by_length.slope[0] += 0.5)?;
    refused("layer 2", &|by_length| by_length.window = None)?;
    refused("layer 2", &|by_length| by_length.window = Some(6))?;
    refused("3 slopes for 4 heads", &|by_length| by_length.slope.truncate(3))?;
    // As it is, the trace is verified.
    let bytes = written_to(&recorded.header, &recorded.records, recorded.ending, None)?;
    trace::verify(&Trace::from_bytes(Path::new("trace"), &bytes)?, None, None)?;
    Ok(())
}
