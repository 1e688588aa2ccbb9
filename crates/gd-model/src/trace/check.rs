//! Consistency of a single record: the selected candidate has the least energy, and margin, gate and shares follow from the
//! candidates.

use gd_kernels::{Gate, TieBreak};

use super::header::{Header, Layer};
use super::record::{Record, Row, Slot};

/// The tolerance of a gate. `exp` differs in its last bits between builds.
const GATE_TOLERANCE: f32 = 1e-5;

/// Checks that a record is consistent with itself, with its `position` in the trace, and with the header.
///
/// # Errors
/// The reason, with position, layer and head.
pub fn check(record: &Record, position: usize, header: &Header) -> Result<(), String> {
    if record.position as usize != position {
        return Err(format!("position {} is recorded as number {position}", record.position));
    }
    if record.generated != (position >= header.prompt_tokens) {
        return Err(format!(
            "position {position} is marked as {}, the prompt has {} tokens",
            if record.generated { "generated" } else { "read" },
            header.prompt_tokens
        ));
    }
    let mut rows = record.rows.iter();
    for layer in header.selecting() {
        for (h, row) in rows.by_ref().take(layer.heads).enumerate() {
            check_row(row, layer, h, position, header.names_runner_up())
                .map_err(|e| format!("position {position}, layer {}, head {h}: {e}", layer.layer))?;
        }
    }
    let mut blends = record.blends.iter();
    for layer in header.blending() {
        for (h, blend) in blends.by_ref().take(layer.heads).enumerate() {
            check_blend(blend, layer.weights, position)
                .map_err(|e| format!("position {position}, layer {}, head {h}: {e}", layer.layer))?;
        }
    }
    Ok(())
}

/// The tolerance of the sum of the weights of a head, which is at most 1.
const WEIGHT_TOLERANCE: f32 = 1e-4;

/// Checks the greatest weights of a softmax head.
fn check_blend(blend: &[(i32, f32)], count: usize, position: usize) -> Result<(), String> {
    if blend.len() > count {
        return Err(format!("{} weights; at most {count} are recorded", blend.len()));
    }
    if let Some((key, _)) = blend.iter().find(|(key, _)| *key < 0 || *key as usize > position) {
        return Err(format!("key {key} is no position up to its own"));
    }
    let sum: f32 = blend.iter().map(|(_, weight)| weight).sum();
    if blend.iter().any(|(_, weight)| weight.is_nan() || *weight <= 0.0) || sum > 1.0 + WEIGHT_TOLERANCE {
        return Err(format!("weights {:?}", blend.iter().map(|(_, weight)| weight).collect::<Vec<_>>()));
    }
    let descends = |a: &(i32, f32), b: &(i32, f32)| a.1 > b.1 || (a.1 == b.1 && a.0 < b.0);
    match blend.windows(2).find(|pair| !descends(&pair[0], &pair[1])) {
        Some(pair) => Err(format!("keys {} and {} are out of order", pair[0].0, pair[1].0)),
        None => Ok(()),
    }
}

/// Whether `a` comes before `b` in the order of the scan: ascending energy, ties by position.
pub(super) fn before(a: &Slot, b: &Slot, tie: TieBreak) -> bool {
    a.energy < b.energy
        || (a.energy == b.energy && a.key != b.key && (a.key < b.key) == (tie == TieBreak::First))
}

/// The slot of least energy after the barrier; ties are decided by `tie`.
pub(super) fn least_energy(slots: &[Slot], tie: TieBreak) -> Option<&Slot> {
    slots.iter().filter(|slot| !slot.runner_up).reduce(|least, slot| {
        let (a, b) = (least.compared(), slot.compared());
        let precedes = (slot.key < least.key) == (tie == TieBreak::First);
        if b < a || (b == a && precedes) { slot } else { least }
    })
}

/// The difference of the energy of a selected key and the least one of the other keys that the threshold admits; infinite
/// without one.
pub(super) fn margin(slots: &[Slot], selected: i32, energy: f32) -> f32 {
    let rivals = slots.iter().filter(|slot| !slot.rejected && slot.key != selected);
    rivals.map(Slot::compared).fold(f32::INFINITY, f32::min) - energy
}

/// The weight of a pick, by its rank from 0; `None` if there is no such candidate.
fn pick_weight(row: &Row, layer: &Layer, tau: Option<f32>, rank: usize) -> Option<f32> {
    let (temperature, null) = match layer.gate.temperature() {
        Some(temperature) => (temperature as f32, tau),
        None => (1.0, None),
    };
    let energies = || row.slots.iter().take(layer.picks).map(Slot::compared).chain(null);
    let least = energies().fold(f32::INFINITY, f32::min);
    let height = |e: f32| ((least - e) / temperature).exp();
    let total: f32 = energies().map(height).sum();
    row.slots.get(rank).map(|slot| height(slot.compared()) / total)
}

/// Checks the key that was scanned only as the runner-up: one at most, of a head with a single candidate, after it.
fn check_runner_up(row: &Row, layer: &Layer, named: bool) -> Result<(), String> {
    let mut runners = row.slots.iter().enumerate().filter(|(_, slot)| slot.runner_up);
    let Some((at, slot)) = runners.next() else { return Ok(()) };
    let possible = named && layer.candidates == 1 && at > 0 && !slot.protected && slot.lifted.is_none();
    match possible && runners.next().is_none() {
        true => Ok(()),
        false => Err(format!("{} cannot have been scanned as the runner-up", slot.key)),
    }
}

fn check_row(
    row: &Row,
    layer: &Layer,
    h: usize,
    position: usize,
    names_runner_up: bool,
) -> Result<(), String> {
    let (tau, limit) = (layer.threshold_at(h, position, &row.slots), layer.limit(h, position, &row.slots));
    for slot in &row.slots {
        if slot.key < 0 || slot.key as usize > position {
            return Err(format!("candidate {} is no position up to its own", slot.key));
        }
        if !slot.energy.is_finite() || !slot.compared().is_finite() {
            return Err(format!("candidate {} has an energy of {}", slot.key, slot.compared()));
        }
        if slot.rejected != limit.is_some_and(|limit| slot.compared() > limit) {
            return Err(format!(
                "candidate {} of energy {} is {} at a limit of {limit:?}",
                slot.key,
                slot.compared(),
                if slot.rejected { "rejected" } else { "admitted" }
            ));
        }
        if slot.lifted.is_some() && (layer.barrier.is_none() || !slot.protected) {
            return Err(format!("candidate {} is lifted although no barrier applies to it", slot.key));
        }
    }
    if let Some(pair) = row.slots.windows(2).find(|pair| !before(&pair[0], &pair[1], layer.tie)) {
        return Err(format!("candidates {} and {} are out of order", pair[0].key, pair[1].key));
    }
    let candidates = row.slots.iter().filter(|slot| !slot.protected && !slot.runner_up).count();
    if candidates > layer.candidates {
        return Err(format!("more than {} candidates", layer.candidates));
    }
    check_runner_up(row, layer, names_runner_up)?;
    let winner = least_energy(&row.slots, layer.tie).filter(|slot| !slot.rejected);
    let selected = winner.map_or(-1, |slot| slot.key);
    if row.selected != selected {
        return Err(format!("{} is selected, but {selected} has the least energy", row.selected));
    }
    let energy = winner.map_or(f32::INFINITY, Slot::compared);
    let margin = if winner.is_some() { margin(&row.slots, selected, energy) } else { f32::INFINITY };
    for (name, computed, stated) in [("energy", energy, row.energy), ("margin", margin, row.margin)] {
        if computed.to_bits() != stated.to_bits() {
            return Err(format!("{name} {stated}, but the candidates give {computed}"));
        }
    }
    let picked = |rank: usize| pick_weight(row, layer, tau, rank);
    let gate = match (winner, layer.gate, tau) {
        (None, ..) => Some(0.0),
        (Some(_), ..) if layer.picks > 1 => picked(0),
        (Some(_), Gate::None, _) => Some(1.0),
        (Some(_), Gate::Energy { temperature } | Gate::Margin { temperature }, Some(tau)) => {
            Some((1.0 + (-(tau - energy) / temperature as f32).exp()).recip())
        }
        _ => None,
    };
    match gate {
        Some(gate) if row.gate.is_nan() || (row.gate - gate).abs() > GATE_TOLERANCE => {
            return Err(format!("gate {}, but its formula gives {gate}", row.gate));
        }
        _ if !(0.0..=1.0).contains(&row.gate) => return Err(format!("gate {}", row.gate)),
        _ => {}
    }
    if (layer.gate == Gate::Coherence) == row.coherence.is_nan()
        || !(row.coherence.is_nan() || (0.0..=1.0).contains(&row.coherence))
    {
        return Err(format!("coherence {}", row.coherence));
    }
    let parts = row.share + row.memory;
    let sums = row.share >= 0.0 && row.memory >= 0.0 && parts <= 1.0 + 1e-5;
    if !sums || (!layer.memory && row.memory != 0.0) || (winner.is_none() && row.share != 0.0) {
        return Err(format!("shares {} and {}", row.share, row.memory));
    }
    for (at, &(key, weight)) in row.picks.iter().enumerate() {
        let slot = row.slots.get(at + 1).filter(|slot| !slot.rejected);
        let (expected, share) =
            (slot.map_or(-1, |slot| slot.key), slot.and_then(|_| picked(at + 1)).unwrap_or(0.0));
        let near = (weight - share).abs() <= GATE_TOLERANCE;
        // A weight that rounds to 0 is no read.
        let same = key == expected || key == -1 && weight == 0.0;
        if !same || !near {
            return Err(format!("pick {} reads {key} with {weight}, not {expected} with {share}", at + 2));
        }
    }
    if let Some(key) = row.later.iter().find(|&&key| key < -1 || key > position as i32) {
        return Err(format!("a later round reads {key}"));
    }
    Ok(())
}
