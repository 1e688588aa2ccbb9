//! Replays of a recorded text.

use anyhow::{Context, Result, ensure};
use gd_model::trace::{self, Outcome, Record};

use super::{CPU, PROMPT, Recorded, model, models, record, verified, written};

fn replay(recorded: &Recorded, records: &[Record], tolerance: f32) -> Result<Outcome> {
    Ok(trace::replay(&recorded.header, records, Some(recorded.ending), &recorded.loaded, tolerance, &CPU)?)
}

/// The header with another backend, so that the replay compares with a tolerance.
fn elsewhere(recorded: &mut Recorded) {
    recorded.header.isa = "another".into();
}

#[test]
fn a_replay_agrees_to_the_bit_and_within_the_tolerance() -> Result<()> {
    for (name, gd) in models() {
        for acts in [&[][..], &["ban 2.1@all:3", "force 1.0@20:7", "ablate 2.3@all"]] {
            let mut recorded = record(&gd, PROMPT, 12, acts)?;
            let selections: usize = recorded.records.iter().map(|r| r.rows.len()).sum();
            let outcome = replay(&recorded, &recorded.records, 0.0)?;
            ensure!(outcome.exact && outcome.selections == selections as u64, "{name}: {outcome:?}");
            ensure!((outcome.ambiguous, outcome.contradictions) == (0, 0), "{name} {acts:?}: {outcome:?}");
            ensure!(outcome.unchecked.is_empty(), "{name}: {outcome:?}");
            verified(&written(&recorded.header, &recorded.records, None)?).with_context(|| name)?;
            elsewhere(&mut recorded);
            let outcome = replay(&recorded, &recorded.records, 1e-6)?;
            ensure!(!outcome.exact, "{name}");
            ensure!(outcome.unchecked.len() == 2, "{name}: {outcome:?}");
            ensure!(outcome.unchecked[1].contains("12 of 12 would be drawn here"), "{name}: {outcome:?}");
            ensure!((outcome.ambiguous, outcome.contradictions) == (0, 0), "{name} {acts:?}: {outcome:?}");
        }
    }
    Ok(())
}

/// Changes every energy by a pseudo-random relative amount of at most `size`, and updates the values that depend on
/// it.
fn perturbed(recorded: &Recorded, size: f32) -> Vec<Record> {
    let mut records = recorded.records.clone();
    let mut seed = 1u32;
    for row in records.iter_mut().flat_map(|record| &mut record.rows) {
        for slot in &mut row.slots {
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            slot.energy *= 1.0 + size * ((seed >> 8) as f32 / 8388608.0 - 1.0);
        }
        row.slots.sort_by(|a, b| a.energy.total_cmp(&b.energy).then(a.key.cmp(&b.key)));
        row.selected = row.slots[0].key;
        row.energy = row.slots[0].energy;
        row.margin = row.slots.get(1).map_or(f32::INFINITY, |next| next.energy - row.energy);
    }
    records
}

#[test]
fn different_near_ties_are_ambiguous_and_other_differences_contradict() -> Result<()> {
    let mut recorded = record(&models()[0].1, PROMPT, 12, &[])?;
    let (size, tolerance) = (0.02, 0.05);
    let changed = perturbed(&recorded, size);
    verified(&written(&recorded.header, &changed, None)?)?;
    let moved = |a: &[Record], b: &[Record]| {
        let rows =
            |r: &[Record]| r.iter().flat_map(|r| r.rows.iter().map(|row| row.selected)).collect::<Vec<_>>();
        rows(a).iter().zip(rows(b)).filter(|(a, b)| **a != *b).count() as u64
    };
    let moved = moved(&recorded.records, &changed);
    ensure!(moved > 5, "only {moved} selections differ");
    // On the same backend every difference is a contradiction.
    let outcome = replay(&recorded, &changed, tolerance)?;
    ensure!(outcome.exact && outcome.contradictions > 100, "{outcome:?}");
    elsewhere(&mut recorded);
    let outcome = replay(&recorded, &changed, tolerance)?;
    ensure!(outcome.ambiguous >= 5 && outcome.ambiguous < outcome.selections / 4, "{outcome:?}");
    // The value of another key changes the energies of the layers above, which contradict the record.
    // In the first layer only the energies were changed.
    let first = outcome.findings.iter().filter(|f| !f.starts_with("ambiguous") && f.contains("layer 0,"));
    ensure!(first.count() == 0, "{outcome:?}");
    // Changes above the tolerance are contradictions in the first layer.
    let outcome = replay(&recorded, &changed, 1e-4)?;
    ensure!(outcome.contradictions > 400, "{outcome:?}");
    ensure!(outcome.findings.iter().any(|f| f.contains("layer 0,")), "{outcome:?}");
    Ok(())
}

#[test]
fn a_replay_with_another_text_or_model_is_an_error() -> Result<()> {
    let gd = models()[0].1.clone();
    let recorded = record(&gd, PROMPT, 8, &[])?;
    let mut records = recorded.records.clone();
    let last = records.len() - 3;
    records[last].token ^= 1;
    let outcome = replay(&recorded, &records, 1e-3)?;
    let expected =
        format!("position {last}: token {}, but {} is sampled", records[last].token, records[last].token ^ 1);
    ensure!(outcome.findings.contains(&expected), "{outcome:?}");
    let mut records = recorded.records.clone();
    records[3].token ^= 1;
    let e = replay(&recorded, &records, 1e-3).err().context("another prompt")?.to_string();
    ensure!(e.contains("contradicts its tokens"), "{e}");
    let other = model(&gd, 6)?;
    let e = trace::replay(&recorded.header, &recorded.records, Some(recorded.ending), &other, 1e-3, &CPU);
    let e = e.err().context("another model")?.to_string();
    ensure!(e.contains("weights differ"), "{e}");
    Ok(())
}
