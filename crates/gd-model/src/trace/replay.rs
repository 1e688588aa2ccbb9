//! Replays a trace: compares the candidates of every layer with the recorded ones. The layer then selects from the recorded
//! candidates, so that a near tie that is decided differently does not change all following positions.
//!
//! On the backend of the record all bits must be equal. On another backend, energies may differ by the tolerance, relative to
//! the larger of the energy and 1. A selection that changes within this tolerance is counted as ambiguous.

use candle_core::{Result, Tensor};
use gd_kernels::Candidates;
use serde::Serialize;

use super::check::least_energy;
use super::header::Layer;
use super::record::{Blend, Record, Row, Slot, bits};

/// The maximal number of findings with a description; further ones are only counted.
const MAX_FINDINGS: usize = 20;

/// The tolerance of shares and coherence between backends.
const SHARE_TOLERANCE: f32 = 1e-2;

/// The result of a replay.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Outcome {
    /// Whether all bits were compared, because the backend is that of the record.
    pub exact: bool,
    /// The number of compared selections.
    pub selections: u64,
    /// The number of selections that differ within the tolerance.
    pub ambiguous: u64,
    /// The number of selections, energies, tokens or texts that contradict the record.
    pub contradictions: u64,
    /// Descriptions of the first 20 ambiguous or contradicting selections.
    pub findings: Vec<String>,
    /// What could not be compared, and why.
    pub unchecked: Vec<String>,
    /// The description of the first contradiction.
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
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(text);
        }
    }
}

/// The state of a replay.
#[derive(Debug)]
pub(super) struct Replay<'a> {
    /// The records of the positions of the current pass.
    pub(super) records: &'a [Record],
    pub(super) tolerance: f32,
    pub(super) outcome: Outcome,
    /// For each selecting layer, the index of its first row in a record.
    first_rows: Vec<usize>,
}

impl<'a> Replay<'a> {
    pub(super) fn new<'b>(layers: impl Iterator<Item = &'b Layer>, exact: bool, tolerance: f32) -> Self {
        let mut first_rows = vec![0];
        layers.for_each(|layer| first_rows.push(first_rows[first_rows.len() - 1] + layer.heads));
        Self { records: &[], tolerance, outcome: Outcome { exact, ..Outcome::default() }, first_rows }
    }

    /// Compares the candidates of the selecting layer of this index with the record and returns the recorded candidates.
    pub(super) fn candidates(
        &mut self,
        layer: &Layer,
        selecting_index: usize,
        scanned: Candidates,
    ) -> Result<Candidates> {
        let (_, heads, n, slots) = scanned.index.dims4()?;
        let keys = scanned.index.flatten_all()?.to_vec1::<i32>()?;
        let energies = scanned.energy.flatten_all()?.to_vec1::<f32>()?;
        let flags = scanned.protected.as_ref().map(|f| f.flatten_all()?.to_vec1::<u8>()).transpose()?;
        let (mut index, mut energy) = (vec![-1; keys.len()], vec![f32::INFINITY; keys.len()]);
        let mut protected = vec![0u8; keys.len()];
        for row in 0..heads * n {
            let (h, i) = (row / n, row % n);
            let record = &self.records[i];
            let recorded = &record.rows[self.first_rows[selecting_index] + h];
            let now: Vec<Slot> = (row * slots..(row + 1) * slots)
                .filter(|&at| keys[at] >= 0)
                .map(|at| {
                    let protected = flags.as_ref().is_some_and(|f| f[at] != 0);
                    let (energy, lifted) = (energies[at], None);
                    Slot { key: keys[at], protected, rejected: false, runner_up: false, energy, lifted }
                })
                .enumerate()
                .filter(|(rank, slot)| *rank < layer.candidates || slot.protected)
                .map(|(_, slot)| slot)
                .collect();
            let at = || format!("position {}, layer {}, head {h}", record.position, layer.layer);
            // The runner-up that could not be selected is compared with the row.
            let recorded: Vec<Slot> = recorded.slots.iter().filter(|s| !s.runner_up).copied().collect();
            let limit = layer.limit(h, record.position as usize, &recorded);
            self.compare(&at, layer, limit, &recorded, &now);
            if recorded.len() > slots {
                let count = recorded.len();
                candle_core::bail!("{}: {count} candidates are recorded, but {slots} were scanned", at());
            }
            for (at, slot) in (row * slots..).zip(&recorded) {
                (index[at], energy[at], protected[at]) = (slot.key, slot.energy, u8::from(slot.protected));
            }
        }
        let (shape, device) = ((1, heads, n, slots), scanned.index.device());
        Ok(Candidates {
            index: Tensor::from_vec(index, shape, device)?,
            energy: Tensor::from_vec(energy, shape, device)?,
            protected: flags.map(|_| Tensor::from_vec(protected, shape, device)).transpose()?,
            rescored: scanned.rescored.clone(),
        })
    }

    /// Compares the candidates of a head for a query, and the key that they select without the barrier.
    fn compare(
        &mut self,
        at: &dyn Fn() -> String,
        layer: &Layer,
        limit: Option<f32>,
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
        let tolerance = |x: f32| self.tolerance * x.abs().max(1.0);
        // A candidate that only one list contains must be within the tolerance of the end of the other list.
        let fits = |slot: &Slot, others: &[Slot]| match others.iter().find(|other| other.key == slot.key) {
            Some(other) => {
                (slot.energy - other.energy).abs() <= tolerance(slot.energy)
                    && slot.protected == other.protected
            }
            None => {
                others.last().is_some_and(|last| slot.energy >= last.energy - 2.0 * tolerance(last.energy))
            }
        };
        if !recorded.iter().all(|slot| fits(slot, now)) || !now.iter().all(|slot| fits(slot, recorded)) {
            return self.outcome.contradiction(text());
        }
        let winner = |slots: &[Slot]| {
            let unlifted: Vec<Slot> = slots.iter().map(|s| Slot { lifted: None, ..*s }).collect();
            least_energy(&unlifted, layer.tie)
                .filter(|s| limit.is_none_or(|limit| s.energy <= limit))
                .map(|s| s.key)
        };
        if winner(now) != winner(recorded) {
            self.outcome.ambiguous(text());
        }
    }

    /// Compares the greatest weights of a softmax head with the record. On another backend near weights may change places.
    pub(super) fn blend(&mut self, at: impl Fn() -> String, now: &Blend, recorded: &Blend) {
        let equal = |a: &(i32, f32), b: &(i32, f32)| a.0 == b.0 && bits(a.1) == bits(b.1);
        let near = |a: &(i32, f32), b: &(i32, f32)| (a.1 - b.1).abs() <= SHARE_TOLERANCE;
        let fits = |a: &(i32, f32), b: &(i32, f32)| if self.outcome.exact { equal(a, b) } else { near(a, b) };
        if now.len() != recorded.len() || !now.iter().zip(recorded).all(|(a, b)| fits(a, b)) {
            self.outcome.contradiction(format!("{}: weights {now:?}, recorded {recorded:?}", at()));
        }
    }

    /// Compares the selection of a head from the recorded candidates with the record.
    pub(super) fn row(&mut self, at: impl Fn() -> String, now: &Row, recorded: &Row) {
        let near = |a: f32, b: f32, tolerance: f32| bits(a) == bits(b) || (a - b).abs() <= tolerance;
        // A negative tolerance admits equal bits only.
        let tolerance = |x: f32| if self.outcome.exact { -1.0 } else { self.tolerance * x.abs().max(1.0) };
        let share = if self.outcome.exact { -1.0 } else { SHARE_TOLERANCE };
        let fits = now.selected == recorded.selected
            && near(now.energy, recorded.energy, tolerance(recorded.energy))
            && near(now.margin, recorded.margin, tolerance(recorded.margin))
            && near(now.gate, recorded.gate, tolerance(1.0))
            && near(now.coherence, recorded.coherence, share)
            && near(now.share, recorded.share, share)
            && near(now.memory, recorded.memory, share)
            && now.picks.len() == recorded.picks.len()
            && now
                .picks
                .iter()
                .zip(&recorded.picks)
                .all(|(a, b)| a.0 == b.0 && near(a.1, b.1, tolerance(1.0)))
            && now.slots.len() == recorded.slots.len()
            && (!self.outcome.exact || runner_up(now) == runner_up(recorded));
        match (fits, now.later == recorded.later) {
            (true, true) => {}
            // The margins of later rounds are not recorded.
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

/// The key that was scanned only as the runner-up, with the bits of its energy.
fn runner_up(row: &Row) -> Option<(i32, u32)> {
    row.slots.iter().find(|slot| slot.runner_up).map(|slot| (slot.key, bits(slot.energy)))
}
