//! The probe that records the selections of all layers during a forward pass.

use std::cell::{RefCell, RefMut};

use candle_core::{DType, Result, Tensor, bail};
use gd_kernels::{Candidates, TieBreak};
use gd_layer::{BlendView, CandidateView, Probe, SelectionView};

use super::check::{before, margin};
use super::header::Header;
use super::intervention::{self, RunnerUp};
use super::record::{Blend, Record, Row, Slot};
use super::replay::Replay;

/// What the heads of a position read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reads {
    /// One row for each head of every selecting layer.
    pub rows: Vec<Row>,
    /// The greatest weights of each head of every softmax layer whose weights are recorded.
    pub blends: Vec<Blend>,
}

/// Records the selections of all selecting layers and the greatest weights of softmax layers in forward passes over one
/// sequence, and applies the interventions of the header. In a replay, it compares the candidates with the recorded ones and lets every layer select from the latter.
#[derive(Debug)]
pub struct Recorder<'a> {
    header: &'a Header,
    state: RefCell<State<'a>>,
}

#[derive(Debug, Default)]
struct State<'a> {
    /// The position of the first query of the current pass.
    start: usize,
    /// The rows of every selecting layer that has reported in this pass, by head, then by query.
    layers: Vec<Vec<Row>>,
    /// The weights of every softmax layer that has reported in this pass, by head, then by query.
    blends: Vec<Vec<Blend>>,
    /// The runners-up of the layer that selects next, by head, then by query; empty if it has several candidates.
    runners_up: Vec<RunnerUp>,
    replay: Option<Replay<'a>>,
}

impl<'a> Recorder<'a> {
    /// A recorder for consecutive passes over a sequence, beginning at position 0.
    pub fn new(header: &'a Header) -> Self {
        Self { header, state: RefCell::default() }
    }

    /// A recorder for consecutive passes over a sequence whose first `start` positions are processed already.
    pub(super) fn continuing(header: &'a Header, start: usize) -> Self {
        let state = State { start, ..State::default() };
        Self { header, state: RefCell::new(state) }
    }

    /// A recorder that replays recorded rows.
    pub(super) fn replaying(header: &'a Header, replay: Replay<'a>) -> Self {
        let state = State { replay: Some(replay), ..State::default() };
        Self { header, state: RefCell::new(state) }
    }

    /// Returns what the heads read in the last pass over `n` positions.
    ///
    /// # Errors
    /// A layer that did not report in this pass.
    pub fn take(&self, n: usize) -> Result<Vec<Reads>> {
        let mut state = self.state.borrow_mut();
        state.start += n;
        let (layers, blends) = (std::mem::take(&mut state.layers), std::mem::take(&mut state.blends));
        let expected = [self.header.selecting().count(), self.header.blending().count()];
        if [layers.len(), blends.len()] != expected {
            bail!("{} and {} layers reported, {expected:?} select and blend", layers.len(), blends.len());
        }
        let mut positions = vec![Reads::default(); n];
        for (at, row) in layers.into_iter().flat_map(|rows| rows.into_iter().enumerate()) {
            positions[at % n].rows.push(row);
        }
        for (at, blend) in blends.into_iter().flat_map(|blends| blends.into_iter().enumerate()) {
            positions[at % n].blends.push(blend);
        }
        Ok(positions)
    }

    /// Sets the records of the next pass in a replay.
    pub(super) fn expect(&self, records: &'a [Record]) {
        if let Some(replay) = self.replay().as_mut() {
            replay.records = records;
        }
    }

    /// The replay; `None` if this recorder does not replay.
    pub(super) fn replay(&self) -> RefMut<'_, Option<Replay<'a>>> {
        RefMut::map(self.state.borrow_mut(), |state| &mut state.replay)
    }
}

impl Probe for Recorder<'_> {
    fn candidates(&self, layer: usize, configured: usize) -> usize {
        if !self.header.layers[layer].selects {
            return configured;
        }
        let runner_up = self.header.names_runner_up();
        intervention::scanned_candidates(&self.header.interventions, layer, configured, runner_up)
    }

    fn preserved(&self, view: CandidateView) -> Result<Candidates> {
        let layer = view.layer;
        let mut state = self.state.borrow_mut();
        let (start, index) = (state.start, state.layers.len());
        if !self.header.layers[layer].selects {
            return Ok(view.candidates);
        }
        let runner_up = self.header.names_runner_up();
        let (candidates, runners_up) =
            intervention::apply(&self.header.interventions, view, start, runner_up)?;
        state.runners_up = runners_up;
        match &mut state.replay {
            Some(replay) => replay.candidates(&self.header.layers[layer], index, candidates),
            None => Ok(candidates),
        }
    }

    fn selected(&self, view: &SelectionView) -> Result<()> {
        if !self.header.layers[view.layer].selects {
            return Ok(());
        }
        let tie = self.header.layers[view.layer].tie;
        let mut rows = rows(view, self.header.layers[view.layer].candidates)?;
        let mut state = self.state.borrow_mut();
        let limit = view.limit.map(floats).transpose()?;
        for (at, (row, next)) in rows.iter_mut().zip(std::mem::take(&mut state.runners_up)).enumerate() {
            let limit = limit.as_ref().map(|limit| limit[at]);
            next.into_iter().for_each(|next| add_runner_up(row, next, limit, tie));
        }
        state.layers.push(rows);
        Ok(())
    }

    fn greatest_weights(&self, layer: usize) -> usize {
        self.header.layers[layer].weights
    }

    fn blended(&self, view: &BlendView) -> Result<()> {
        self.state.borrow_mut().blends.push(view.weights.to_vec());
        Ok(())
    }
}

/// Adds the key that was scanned only as the runner-up to the candidates of a row, in the order of the scan, and computes the
/// margin again. `limit` is the greatest energy that the head can select.
fn add_runner_up(row: &mut Row, (key, energy): (i32, f32), limit: Option<f32>, tie: TieBreak) {
    let rejected = limit.is_some_and(|limit| energy > limit);
    let slot = Slot { key, protected: false, rejected, runner_up: true, energy, lifted: None };
    let at = row.slots.iter().position(|other| before(&slot, other, tie)).unwrap_or(row.slots.len());
    row.slots.insert(at, slot);
    if row.selected >= 0 {
        row.margin = margin(&row.slots, row.selected, row.energy);
    }
}

/// The rows of a layer for one sequence, by head, then by query. Of the candidates, each row has the first `configured` ones
/// and the protected ones.
fn rows(view: &SelectionView, configured: usize) -> Result<Vec<Row>> {
    let (selected, candidates) = (view.selected, view.candidates);
    let (b, heads, n) = selected.index.dims3()?;
    if b != 1 {
        bail!("a trace of {b} sequences; it must be one");
    }
    let slots = candidates.index.dim(3)?;
    let keys = candidates.index.flatten_all()?.to_vec1::<i32>()?;
    let energy = floats(&candidates.energy)?;
    let compared = floats(&selected.compared)?;
    let flags = candidates.protected.as_ref().map(|f| f.flatten_all()?.to_vec1::<u8>()).transpose()?;
    let limit = view.limit.map(floats).transpose()?;
    let index = selected.index.flatten_all()?.to_vec1::<i32>()?;
    let (least, margin, gate) =
        (floats(&selected.energy)?, floats(&selected.margin)?, floats(&selected.gate)?);
    let coherence = selected.coherence.as_ref().map(floats).transpose()?;
    let later = selected.later.iter().map(|r| r.index.flatten_all()?.to_vec1::<i32>());
    let later = later.collect::<Result<Vec<_>>>()?;
    let pick = |pick: &gd_kernels::Pick| -> Result<(Vec<i32>, Vec<f32>)> {
        Ok((pick.index.flatten_all()?.to_vec1()?, floats(&pick.weight)?))
    };
    let picks = selected.picks.iter().map(pick).collect::<Result<Vec<_>>>()?;
    let shares = shares(view)?;
    let slot = |at: usize, row: usize| Slot {
        key: keys[at],
        protected: flags.as_ref().is_some_and(|f| f[at] != 0),
        rejected: limit.as_ref().is_some_and(|limit| compared[at] > limit[row]),
        runner_up: false,
        energy: energy[at],
        lifted: (compared[at].to_bits() != energy[at].to_bits()).then_some(compared[at]),
    };
    let row = |row: usize| {
        let used = (row * slots..(row + 1) * slots).filter(|&at| keys[at] >= 0).map(|at| slot(at, row));
        let slots = used.enumerate().filter(|(rank, slot)| *rank < configured || slot.protected);
        Row {
            selected: index[row],
            energy: least[row],
            margin: margin[row],
            coherence: coherence.as_ref().map_or(f32::NAN, |c| c[row]),
            gate: gate[row],
            share: shares[row].0,
            memory: shares[row].1,
            picks: picks.iter().map(|(index, weight)| named(index[row], weight[row])).collect(),
            later: later.iter().map(|index| index[row]).collect(),
            slots: slots.map(|(_, slot)| slot).collect(),
        }
    };
    Ok((0..heads * n).map(row).collect())
}

/// A pick with the key -1 if it is not read.
fn named(key: i32, weight: f32) -> (i32, f32) {
    if weight > 0.0 { (key, weight) } else { (-1, weight) }
}

/// The elements of a tensor in f32.
fn floats(t: &Tensor) -> Result<Vec<f32>> {
    t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The shares of the first selection and of the running averages in the output of every head, after the output gate: the
/// norm of the part divided by the sum of the norms of all parts.
fn shares(view: &SelectionView) -> Result<Vec<(f32, f32)>> {
    let (_, heads, n, d) = view.selected.y.dims4()?;
    let y = floats(&view.selected.y)?;
    let later = view.selected.later.iter().map(|r| floats(&r.y)).collect::<Result<Vec<_>>>()?;
    let memory = view.memory.map(floats).transpose()?;
    // [N, Hq * D]
    let gate = view.output_gate.map(floats).transpose()?;
    let share = |row: usize| {
        let (h, i) = (row / n, row % n);
        // The gate of a position has all heads, also those that do not read.
        let gate = |at: usize| gate.as_ref().map_or(1.0, |g| g[i * (g.len() / n) + h * d + at]);
        let norm = |value: &dyn Fn(usize) -> f32| {
            let sum: f32 = (0..d).map(|at| (value(at) * gate(at)).powi(2)).sum();
            sum.sqrt()
        };
        let of = |part: &[f32], at: usize| part[row * d + at];
        let refined = |at: usize| later.iter().map(|part| of(part, at)).sum::<f32>();
        let first = norm(&|at| of(&y, at) - refined(at));
        let memory = memory.as_ref().map_or(0.0, |part| norm(&|at| of(part, at)));
        let rest = if later.is_empty() { 0.0 } else { norm(&refined) };
        let total = first + memory + rest;
        if total > 0.0 { (first / total, memory / total) } else { (0.0, 0.0) }
    };
    Ok((0..heads * n).map(share).collect())
}
