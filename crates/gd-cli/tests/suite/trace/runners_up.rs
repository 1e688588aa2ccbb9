//! The runner-up of heads with a single candidate, and traces of version 2 of the format, which do not have it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use gd_model::trace::{self, Ending, Header, Record, Trace};

use super::{CPU, PROMPT, Recorded, models, record, written_to};

/// Records the text again in version 2 of the format.
fn in_version_2(recorded: &Recorded) -> Result<(Header, Vec<Record>)> {
    let header = Header { version: 2, ..recorded.header.clone() };
    let prompt = recorded.loaded.tokenizer.encode(PROMPT)?;
    let mut records = Vec::new();
    trace::record(&recorded.loaded, &header, &prompt, &CPU, |record| {
        records.push(record);
        Ok(())
    })?;
    Ok((header, records))
}

#[test]
fn a_single_candidate_has_a_runner_up_that_it_could_not_select() -> Result<()> {
    let gd = &models()[3].1;
    let recorded = record(gd, PROMPT, 0, &[])?;
    let (_, old) = in_version_2(&recorded)?;
    for (record, old) in recorded.records.iter().zip(&old) {
        for (row, old) in record.rows.iter().zip(&old.rows) {
            // The selection is the same; an older record ends with the candidate.
            ensure!(row.selected == old.selected && row.energy.to_bits() == old.energy.to_bits());
            ensure!(row.slots[0] == old.slots[0] && old.slots.len() == 1 && old.margin.is_infinite());
            if record.position == 0 {
                ensure!(row.slots.len() == 1 && row.margin.is_infinite(), "{row:?}");
                continue;
            }
            let next = row.slots.get(1).context("no runner-up")?;
            ensure!(next.runner_up && next.energy >= row.energy && next.key != row.selected, "{row:?}");
            ensure!(row.margin.to_bits() == (next.energy - row.energy).to_bits(), "{row:?}");
        }
    }
    // It is the key that is read once the selected one is banned.
    let at = recorded.records.len() - 1;
    let (head, row) = (6, &recorded.records[at].rows[6]);
    let banned = record(gd, PROMPT, 0, &[&format!("ban 1.{}@{at}:{}", head - 4, row.selected)])?;
    ensure!(banned.records[at].rows[head].selected == row.slots[1].key, "{row:?}");
    // It cannot be the selection of a forged record, and not one of several.
    let mut forged = recorded.records.clone();
    let row = &mut forged[at].rows[head];
    (row.selected, row.energy) = (row.slots[1].key, row.slots[1].energy);
    refused(&recorded.header, &forged, "has the least energy")?;
    forged = recorded.records.clone();
    forged[at].rows[head].slots[0].runner_up = true;
    refused(&recorded.header, &forged, "cannot have been scanned as the runner-up")?;
    let other = record(&models()[0].1, PROMPT, 0, &[])?;
    forged = other.records.clone();
    forged[at].rows[head].slots[3].runner_up = true;
    refused(&other.header, &forged, "cannot have been scanned as the runner-up")
}

fn refused(header: &Header, records: &[Record], words: &str) -> Result<()> {
    let bytes = written_to(header, records, Ending::Read, None)?;
    let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
    let error = trace::verify(&trace, None, None).err().context("accepted")?.to_string();
    ensure!(error.contains(words), "{words}: {error}");
    Ok(())
}

#[test]
fn traces_of_version_2_are_verified_and_replayed() -> Result<()> {
    for (name, gd) in models() {
        let recorded = record(&gd, PROMPT, 12, &[])?;
        let (header, records) = in_version_2(&recorded)?;
        let bytes = written_to(&header, &records, recorded.ending, None)?;
        ensure!(bytes.starts_with(b"GDTRACE2"));
        let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
        trace::verify(&trace, None, None).with_context(|| name)?;
        let proof = trace::Proof::new(&trace, 5)?;
        ensure!(proof.check(None, None).map_err(anyhow::Error::msg)?.record.position == 5);
        let decoded = trace.decoded()?;
        let outcome = trace::replay(&trace.header, &decoded, trace.ending, &recorded.loaded, 1e-3, &CPU)?;
        ensure!(outcome.contradictions == 0 && outcome.unchecked.is_empty(), "{name}: {outcome:?}");
        // What only version 3 has is refused.
        if name == "of one candidate" {
            refused(&header, &recorded.records, "cannot have been scanned as the runner-up")?;
        }
    }
    let recorded = record(&models()[0].1, PROMPT, 0, &[])?;
    let header = Header { version: 4, ..recorded.header };
    ensure!(written_to(&header, &[], Ending::Read, None).is_err(), "wrote version 4");
    Ok(())
}
