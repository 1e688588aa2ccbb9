//! Running a recorded text again: what every layer finds is held against the record, and the layer then selects
//! from the recorded candidates, so that one near tie that falls the other way does not carry everything after it
//! along.
//!
//! On the backend of the record every bit must be equal. On another one energies may differ by the tolerance, in
//! units of the energy or of 1, whichever is greater; a winner that changes within it is ambiguous, and counted.

use candle_core::{Result, Tensor};
use gd_kernels::Candidates;
use serde::Serialize;

use super::check::nearest;
use super::header::Layer;
use super::record::{Record, Row, Slot, bits};

/// Findings that are spelled out; the others are counted.
const SHOWN: usize = 20;

/// How far shares and coherence may differ between backends.
const SHARE: f32 = 1e-2;

/// What a replay has found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Whether all bits were compared: the backend is that of the record.
    pub exact: bool,
    /// Selections compared.
    pub selections: u64,
    /// Selections that fall the other way within the tolerance.
    pub ambiguous: u64,
    /// Selections, energies or tokens that contradict the record.
    pub contradictions: u64,
    /// The first of both, in words.
    pub findings: Vec<String>,
    /// The first contradiction, in words.
    #[serde(skip)]
    pub first_contradiction: Option<String>,
}

impl Outcome {
    fn ambiguous(&mut self, text: String) {
        self.ambiguous += 1;
        self.note(format!("ambiguous: {text}"));
    }

    pub(super) fn contradiction(&mut self, text: String) {
        self.contradictions += 1;
        self.first_contradiction.get_or_insert_with(|| text.clone());
        self.note(text);
    }

    fn note(&mut self, text: String) {
        if self.findings.len() < SHOWN {
            self.findings.push(text);
        }
    }
}

/// A replay under way.
#[derive(Debug)]
pub(super) struct Replay<'a> {
    /// The records of the pass, position by position.
    pub(super) records: &'a [Record],
    pub(super) tolerance: f32,
    pub(super) outcome: Outcome,
    /// Heads of the selecting layers before each.
    places: Vec<usize>,
}

impl<'a> Replay<'a> {
    pub(super) fn new<'b>(layers: impl Iterator<Item = &'b Layer>, exact: bool, tolerance: f32) -> Self {
        let mut places = vec![0];
        layers.for_each(|layer| places.push(places[places.len() - 1] + layer.heads));
        Self { records: &[], tolerance, outcome: Outcome { exact, ..Outcome::default() }, places }
    }

    /// Holds what a layer, the `place`th that selects, has found against the record, and gives the recorded
    /// candidates in its place.
    pub(super) fn candidates(
        &mut self,
        layer: &Layer,
        place: usize,
        found: Candidates,
    ) -> Result<Candidates> {
        let (_, heads, n, slots) = found.index.dims4()?;
        let keys = found.index.flatten_all()?.to_vec1::<i32>()?;
        let energies = found.energy.flatten_all()?.to_vec1::<f32>()?;
        let flags = found.protected.as_ref().map(|f| f.flatten_all()?.to_vec1::<u8>()).transpose()?;
        let (mut index, mut energy) = (vec![-1; keys.len()], vec![f32::INFINITY; keys.len()]);
        let mut protected = vec![0u8; keys.len()];
        for row in 0..heads * n {
            let (h, i) = (row / n, row % n);
            let record = &self.records[i];
            let recorded = &record.rows[self.places[place] + h];
            let now: Vec<Slot> = (row * slots..(row + 1) * slots)
                .filter(|&at| keys[at] >= 0)
                .map(|at| {
                    let protected = flags.as_ref().is_some_and(|f| f[at] != 0);
                    Slot { key: keys[at], protected, rejected: false, energy: energies[at], lifted: None }
                })
                .enumerate()
                .filter(|(rank, slot)| *rank < layer.candidates || slot.protected)
                .map(|(_, slot)| slot)
                .collect();
            let at = || format!("position {}, layer {}, head {h}", record.position, layer.layer);
            self.compare(&at, layer, layer.threshold.as_ref().map(|tau| tau[h]), &recorded.slots, &now);
            if recorded.slots.len() > slots {
                let count = recorded.slots.len();
                candle_core::bail!("{}: {count} candidates are recorded, {slots} scanned", at());
            }
            for (at, slot) in (row * slots..).zip(&recorded.slots) {
                (index[at], energy[at], protected[at]) = (slot.key, slot.energy, u8::from(slot.protected));
            }
        }
        let (shape, device) = ((1, heads, n, slots), found.index.device());
        Ok(Candidates {
            index: Tensor::from_vec(index, shape, device)?,
            energy: Tensor::from_vec(energy, shape, device)?,
            protected: flags.map(|_| Tensor::from_vec(protected, shape, device)).transpose()?,
            rescored: found.rescored.clone(),
        })
    }

    fn compare(
        &mut self,
        at: &dyn Fn() -> String,
        layer: &Layer,
        tau: Option<f32>,
        recorded: &[Slot],
        now: &[Slot],
    ) {
        self.outcome.selections += 1;
        let same =
            |a: &Slot, b: &Slot| (a.key, a.protected, bits(a.energy)) == (b.key, b.protected, bits(b.energy));
        if recorded.len() == now.len() && recorded.iter().zip(now).all(|(a, b)| same(a, b)) {
            return;
        }
        let list = |slots: &[Slot]| {
            let pairs: Vec<_> = slots.iter().map(|s| format!("{}: {}", s.key, s.energy)).collect();
            pairs.join(", ")
        };
        let text = || format!("{}: candidates {{{}}}, recorded {{{}}}", at(), list(now), list(recorded));
        if self.outcome.exact {
            return self.outcome.contradiction(text());
        }
        let room = |x: f32| self.tolerance * x.abs().max(1.0);
        // A candidate that is in one list alone lies at its end.
        let fits = |slot: &Slot, others: &[Slot]| match others.iter().find(|other| other.key == slot.key) {
            Some(other) => {
                (slot.energy - other.energy).abs() <= room(slot.energy) && slot.protected == other.protected
            }
            None => others.last().is_some_and(|last| slot.energy >= last.energy - 2.0 * room(last.energy)),
        };
        if !recorded.iter().all(|slot| fits(slot, now)) || !now.iter().all(|slot| fits(slot, recorded)) {
            return self.outcome.contradiction(text());
        }
        let winner = |slots: &[Slot]| {
            let scanned: Vec<Slot> = slots.iter().map(|s| Slot { lifted: None, ..*s }).collect();
            nearest(&scanned, layer.tie).filter(|s| tau.is_none_or(|tau| s.energy <= tau)).map(|s| s.key)
        };
        if winner(now) != winner(recorded) {
            self.outcome.ambiguous(text());
        }
    }

    /// Holds what a head has read, from the recorded candidates, against the record.
    pub(super) fn row(&mut self, at: impl Fn() -> String, now: &Row, recorded: &Row) {
        let near = |a: f32, b: f32, room: f32| bits(a) == bits(b) || (a - b).abs() <= room;
        let room = |x: f32| if self.outcome.exact { -1.0 } else { self.tolerance * x.abs().max(1.0) };
        let share = if self.outcome.exact { -1.0 } else { SHARE };
        let fits = now.selected == recorded.selected
            && near(now.energy, recorded.energy, room(recorded.energy))
            && near(now.margin, recorded.margin, room(recorded.margin))
            && near(now.gate, recorded.gate, room(1.0))
            && near(now.coherence, recorded.coherence, share)
            && near(now.share, recorded.share, share)
            && near(now.memory, recorded.memory, share)
            && now.slots.len() == recorded.slots.len();
        match (fits, now.later == recorded.later) {
            (true, true) => {}
            // No margin is recorded of further rounds.
            (true, false) if !self.outcome.exact => {
                self.outcome.ambiguous(format!(
                    "{}: later rounds read {:?}, recorded {:?}",
                    at(),
                    now.later,
                    recorded.later
                ));
            }
            _ => self.outcome.contradiction(format!("{}: {now:?}, recorded {recorded:?}", at())),
        }
    }
}
