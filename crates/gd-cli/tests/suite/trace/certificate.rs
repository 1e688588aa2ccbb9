//! Trace files that were changed by accident or on purpose.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use ed25519_dalek::SigningKey;
use gd_model::trace::{self, Header, Record, Trace};
use gd_testing::log_cases;

use super::{models, record, verified, written};

/// A signed trace of about 4 KiB, its header and its records.
fn small() -> Result<(Vec<u8>, Header, Vec<Record>)> {
    let recorded = record(&models()[0].1, "A whale", 6, &[])?;
    let bytes = written(&recorded.header, &recorded.records, Some(&key(1)))?;
    ensure!((4_000..16_000).contains(&bytes.len()), "{} bytes", bytes.len());
    Ok((bytes, recorded.header, recorded.records))
}

fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

/// The file with a corrected hash of its content at its end.
fn sealed_again(mut bytes: Vec<u8>) -> Vec<u8> {
    let body = bytes.len() - 32;
    let hash = blake3::hash(&bytes[..body]);
    bytes[body..].copy_from_slice(hash.as_bytes());
    bytes
}

#[test]
fn every_flipped_bit_is_detected() -> Result<()> {
    let (bytes, ..) = small()?;
    verified(&bytes)?;
    let (mut flips, mut alike) = (0, 0);
    let whole = format!("{:?}", verified(&bytes)?);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            ensure!(verified(&changed).is_err(), "bit {bit} of byte {at} is not detected");
            flips += 1;
            // A corrected hash of the file does not hide the change: the other hashes cover the content of the records.
            if at >= bytes.len() - 32 {
                continue;
            }
            if let Ok(accepted) = verified(&sealed_again(changed)) {
                ensure!(format!("{accepted:?}") == whole, "bit {bit} of byte {at} changed a record");
                alike += 1;
            }
        }
    }
    println!(
        "{flips} flipped bits detected; {alike} of them change the compression of the file, but no record"
    );
    ensure!(alike * 100 < flips, "{alike} of {flips}");
    log_cases("trace-flips", flips);
    Ok(())
}

/// A file of these records with the header and the end of another file.
fn forged(of: &[u8], records: &[&[u8]]) -> Result<Vec<u8>> {
    let header = 12 + u32::from_le_bytes(of[8..12].try_into()?) as usize;
    let mut raw = Vec::new();
    for record in records {
        raw.extend((record.len() as u32).to_le_bytes());
        raw.extend(*record);
    }
    let mut bytes = of[..header].to_vec();
    if !raw.is_empty() {
        let stored = zstd::bulk::compress(&raw, 1)?;
        ensure!(stored.len() < raw.len());
        bytes.extend((raw.len() as u32).to_le_bytes());
        bytes.extend((stored.len() as u32).to_le_bytes());
        bytes.extend(stored);
    }
    // The end of the blocks, the ending, the count, three hashes, the signature, and the hash of the file.
    let version = env!("CARGO_PKG_VERSION").len();
    let end = 4 + 5 + 8 + 3 * 32 + 1 + 32 + 8 + 1 + version + 64 + 32;
    bytes.extend(&of[of.len() - end..]);
    Ok(sealed_again(bytes))
}

#[test]
fn deleted_swapped_duplicated_truncated_or_spliced_records_are_detected() -> Result<()> {
    let (bytes, header, records) = small()?;
    let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
    let all: Vec<Vec<u8>> = trace.records().collect::<gd_model::Result<_>>()?;
    let all: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    verified(&forged(&bytes, &all)?).context("a forged file with the same records")?;
    let n = all.len();
    ensure!(n == records.len() && n > 10);
    let refused = |records: &[&[u8]], what: String| -> Result<()> {
        ensure!(verified(&forged(&bytes, records)?).is_err(), "{what} is not detected");
        Ok(())
    };
    let mut tried = 0;
    for i in 0..n {
        let mut changed = all.clone();
        changed.remove(i);
        refused(&changed, format!("record {i} deleted"))?;
        let mut changed = all.clone();
        changed.insert(i, all[i]);
        refused(&changed, format!("record {i} duplicated"))?;
        refused(&all[..i], format!("cut to {i} records"))?;
        for j in 0..i {
            let mut changed = all.clone();
            changed.swap(i, j);
            refused(&changed, format!("records {i} and {j} swapped"))?;
            tried += 1;
        }
        tried += 3;
    }
    // The records of another text at the same positions.
    let other = record(&models()[0].1, "B whale", 6, &[])?;
    let other = written(&other.header, &other.records, None)?;
    let other = Trace::from_bytes(Path::new("other"), &other)?;
    let foreign: Vec<Vec<u8>> = other.records().collect::<gd_model::Result<_>>()?;
    let foreign: Vec<&[u8]> = foreign.iter().map(Vec::as_slice).collect();
    for i in 0..n {
        let spliced = [&all[..i], &foreign[i..]].concat();
        ensure!(spliced != all);
        refused(&spliced, format!("spliced at {i}"))?;
        tried += 1;
    }
    println!("{tried} forgeries detected");
    log_cases("trace-forgeries", tried);
    // A trace that is written again has another head, and no signature of the key.
    let mut header = header;
    header.max_tokens = header.max_tokens.map(|n| n - 1);
    let header = header;
    let shorter = written(&header, &records[..n - 1], None)?;
    let forged = Trace::from_bytes(Path::new("shorter"), &shorter)?;
    trace::verify(&forged, None, None).context("a valid trace with one record less")?;
    let head = trace.stated.head;
    let error = |head, signer| -> Result<String> {
        Ok(trace::verify(&forged, head, signer).err().context("accepted")?.to_string())
    };
    let e = error(Some(head), None)?;
    ensure!(e.contains("not the expected") && e.contains(&trace::hex(&head)), "{e}");
    let signer = key(1).verifying_key().to_bytes();
    ensure!(error(None, Some(signer))?.contains("not signed"));
    let mine = Trace::from_bytes(Path::new("mine"), &written(&header, &records[..n - 1], Some(&key(2)))?)?;
    let e = trace::verify(&mine, None, Some(signer)).err().context("accepted")?.to_string();
    ensure!(e.contains("signed by") && e.contains(&trace::hex(&signer)), "{e}");
    trace::verify(&trace, Some(head), Some(signer))?;
    Ok(())
}

/// Inconsistent records with correct hashes.
#[test]
fn a_selection_without_the_least_energy_is_detected() -> Result<()> {
    let recorded = record(&models()[1].1, super::PROMPT, 4, &[])?;
    let header = &recorded.header;
    // A row with a margin, and one that abstains.
    let place = |wanted: fn(&trace::Row) -> bool| {
        let rows = recorded.records.iter().enumerate();
        rows.flat_map(|(i, r)| r.rows.iter().enumerate().map(move |(at, row)| (i, at, row)))
            .find(|(_, _, row)| wanted(row))
            .map(|(i, at, _)| (i, at))
            .context("no such row")
    };
    let won = place(|row| row.selected >= 0 && row.margin.is_finite() && row.slots.len() > 1)?;
    let none = place(|row| row.selected < 0)?;
    let position = |record: &mut Record, by: u32| record.position += by;
    type Change<'a> = (&'a str, (usize, usize), fn(&mut trace::Row));
    let changes: [Change; 12] = [
        ("selected", won, |row| row.selected = row.slots[1].key),
        ("margin", won, |row| row.slots[1].energy = row.slots[0].energy),
        ("out of order", won, |row| row.slots.swap(0, 1)),
        ("margin", won, |row| row.margin *= 1.5),
        ("margin", won, |row| row.margin = f32::INFINITY),
        ("energy", won, |row| row.energy = f32::from_bits(row.energy.to_bits() + 1)),
        ("gate", won, |row| row.gate = 0.0),
        ("is rejected", won, |row| row.slots[0].rejected = true),
        ("is admitted", none, |row| row.slots[0].rejected = false),
        ("selected", none, |row| row.selected = row.slots[0].key),
        ("no position up to its own", won, |row| row.slots[1].key = 1000),
        ("shares", won, |row| row.memory = 0.5),
    ];
    for (word, (i, at), change) in changes {
        let mut records = recorded.records.clone();
        change(&mut records[i].rows[at]);
        let error = verified(&written(header, &records, None)?).err();
        let e = error.with_context(|| format!("{word}: not detected"))?.to_string();
        ensure!(e.contains(word), "{word}: {e}");
        ensure!(word == "shares" || e.contains(&format!("position {i}")), "{e}");
    }
    let mut records = recorded.records.clone();
    position(&mut records[3], 1);
    ensure!(verified(&written(header, &records, None)?).is_err());
    Ok(())
}

#[test]
fn files_that_are_not_traces_are_errors() -> Result<()> {
    let (bytes, ..) = small()?;
    let error =
        |bytes: &[u8]| -> Result<String> { Ok(verified(bytes).err().context("accepted")?.to_string()) };
    ensure!(error(b"")?.contains("not a valid trace"));
    ensure!(error(b"GDTRACE1")?.contains("damaged"));
    ensure!(error(&bytes[1..])?.contains("not a valid trace"));
    for cut in [9, 40, bytes.len() / 2, bytes.len() - 1] {
        ensure!(error(&bytes[..cut])?.contains("damaged"), "{cut}");
    }
    let mut more = bytes.clone();
    more.push(0);
    ensure!(error(&more)?.contains("damaged"));
    // Invalid headers with correct hashes.
    let recorded = record(&models()[1].1, "A whale", 0, &[])?;
    type Change<'a> = (&'a str, fn(&mut Header));
    let changes: [Change; 13] = [
        ("version 2 has no weights", |h| (h.version, h.layers[0].weights) = (2, 8)),
        ("3 weights", |h| h.layers[0].weights = 3),
        ("256 weights", |h| (h.layers[0].selects, h.layers[0].weights) = (false, 256)),
        ("other 3", |h| h.format = "other".into()),
        ("heads", |h| h.layers[0].heads = usize::MAX),
        ("heads", |h| h.layers[1].heads = 0),
        ("rounds", |h| h.layers[1].rounds = 0),
        ("layer 2 at index 1", |h| h.layers[1].layer = 2),
        ("1 thresholds for 4 heads", |h| h.layers[2].threshold = Some(vec![0.5])),
        ("a part of a generation", |h| h.max_tokens = Some(3)),
        ("a part of a generation", |h| h.end_tokens = Some(Vec::new())),
        ("1025 layers", |h| h.layers = vec![h.layers[1].clone(); 1025]),
        ("no layer that is recorded", |h| h.layers.iter_mut().for_each(|layer| layer.selects = false)),
    ];
    for (word, change) in changes {
        let mut header = recorded.header.clone();
        change(&mut header);
        let e = error(&written(&header, &recorded.records, None)?)?;
        ensure!(e.contains(word) && e.contains("damaged"), "{word}: {e}");
    }
    // A file of another version than its header.
    let mut older = bytes[..bytes.len() - 32].to_vec();
    older[7] = b'2';
    let hash = blake3::hash(&older);
    older.extend(hash.as_bytes());
    ensure!(error(&older)?.contains("(supported here: gd-trace 2)"), "{}", error(&older)?);
    Ok(())
}
