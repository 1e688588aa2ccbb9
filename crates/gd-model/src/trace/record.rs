//! The record of a position: its token, and for every selecting layer and head the candidates, the selected position, its
//! energy and margin.
//!
//! The encoding is unique: equal records have equal bytes, and other bytes are refused. Integers are little-endian. A record
//! consists of the position (u32), the token (u32), flags (u32, bit 0: generated), the length of the text (u16), the text in
//! UTF-8, and for every selecting layer of the header and each of its heads:
//!
//! | field | content |
//! |---|---|
//! | i32 selected | the position that was read; -1: the head abstained |
//! | f32 energy, f32 margin | after the barrier; +inf if there is none |
//! | f32 coherence | u*; NaN if the layer does not compute it |
//! | f32 gate | the factor of the selected value |
//! | f32 share, f32 memory | shares of the selected value and of the running averages in the norm of the head's output |
//! | i32 for each round after the first | the position that was read, or -1 |
//! | i32 and f32 for each pick after the first | the position that was read, or -1, and its weight |
//! | u8 count, count slots | in the order of the scan: i32 key, u8 flags, f32 energy, f32 lifted energy if flag 4 is set |
//!
//! The flags of a slot: 1 protected, 2 rejected, 4 lifted, 8 scanned only as the runner-up (from version 3 on). For every head
//! of each softmax layer whose weights are recorded, u8 count and count pairs of i32 key and f32 weight follow.

use serde::Serialize;

use super::header::Header;
use crate::error::{Error, Result};

/// A candidate of a head.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Slot {
    /// The position of the key.
    pub key: i32,
    /// Whether it is a candidate independently of its energy.
    pub protected: bool,
    /// Whether its energy is above the threshold of the head.
    pub rejected: bool,
    /// Whether it was scanned only to name the runner-up of a head with a single candidate, which could not select it.
    pub runner_up: bool,
    /// The energy from the scan.
    pub energy: f32,
    /// The energy after the barrier, if the barrier changed it.
    pub lifted: Option<f32>,
}

const PROTECTED: u8 = 1;
const REJECTED: u8 = 2;
const LIFTED: u8 = 4;
const RUNNER_UP: u8 = 8;

/// The greatest weights of a softmax head at a position, in descending order, each with its key.
pub type Blend = Vec<(i32, f32)>;

impl Slot {
    /// The energy that decides the selection: after the barrier if it changed the energy, otherwise that of the scan.
    pub fn compared(&self) -> f32 {
        self.lifted.unwrap_or(self.energy)
    }
}

/// The selection of a head at a position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The position that was read; -1 if the head abstained.
    pub selected: i32,
    /// The energy of the selected position; +inf if the head abstained.
    pub energy: f32,
    /// The energy difference to the runner-up, the next key that the threshold admits; +inf if there is none.
    pub margin: f32,
    /// The coherence point u*; NaN if the layer does not compute it.
    pub coherence: f32,
    /// The factor of the selected value.
    pub gate: f32,
    /// The norm of the gated selected value, divided by the sum of the norms of all parts of the head's output.
    pub share: f32,
    /// The same for the running averages of the Beacon.
    pub memory: f32,
    /// The positions that the rounds after the first read; -1 for none.
    pub later: Vec<i32>,
    /// The positions that the picks after the first read, -1 for none, and their weights.
    pub picks: Vec<(i32, f32)>,
    /// The candidates in the order of the scan.
    pub slots: Vec<Slot>,
}

/// The record of a position.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// The position, from 0.
    pub position: u32,
    /// The token there.
    pub token: u32,
    /// Whether the token was generated; otherwise it belongs to the prompt.
    pub generated: bool,
    /// The characters that this token completes.
    pub text: String,
    /// One row for each head of every selecting layer, layer by layer.
    pub rows: Vec<Row>,
    /// The greatest weights of each head of every softmax layer whose weights are recorded, layer by layer.
    pub blends: Vec<Blend>,
}

impl Record {
    /// Appends the bytes of the record to `out`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a text of more than 65535 bytes, or a row with more than 255 candidates.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let text = self.text.as_bytes();
        let length = u16::try_from(text.len()).map_err(|_| {
            Error::Invalid(format!("a token with a text of {} bytes; the maximum is 65535", text.len()))
        })?;
        for word in [self.position, self.token, u32::from(self.generated)] {
            out.extend(word.to_le_bytes());
        }
        out.extend(length.to_le_bytes());
        out.extend(text);
        for row in &self.rows {
            out.extend(row.selected.to_le_bytes());
            for x in [row.energy, row.margin, row.coherence, row.gate, row.share, row.memory] {
                out.extend(bits(x).to_le_bytes());
            }
            row.later.iter().for_each(|key| out.extend(key.to_le_bytes()));
            for (key, weight) in &row.picks {
                out.extend(key.to_le_bytes());
                out.extend(bits(*weight).to_le_bytes());
            }
            let count = u8::try_from(row.slots.len()).map_err(|_| {
                Error::Invalid(format!("{} candidates of one head; the maximum is 255", row.slots.len()))
            })?;
            out.push(count);
            for slot in &row.slots {
                let flag = |on: bool, bit: u8| if on { bit } else { 0 };
                out.extend(slot.key.to_le_bytes());
                out.push(
                    flag(slot.protected, PROTECTED)
                        | flag(slot.rejected, REJECTED)
                        | flag(slot.lifted.is_some(), LIFTED)
                        | flag(slot.runner_up, RUNNER_UP),
                );
                out.extend(bits(slot.energy).to_le_bytes());
                slot.lifted.iter().for_each(|x| out.extend(bits(*x).to_le_bytes()));
            }
        }
        for blend in &self.blends {
            let count = u8::try_from(blend.len()).map_err(|_| {
                Error::Invalid(format!("{} weights of one head; the maximum is 255", blend.len()))
            })?;
            out.push(count);
            for (key, weight) in blend {
                out.extend(key.to_le_bytes());
                out.extend(bits(*weight).to_le_bytes());
            }
        }
        Ok(())
    }

    /// Decodes a record of a trace with this header.
    ///
    /// # Errors
    /// The reason why [`Record::encode`] could not have written these bytes.
    pub fn decode(bytes: &[u8], header: &Header) -> std::result::Result<Self, String> {
        let mut at = Cursor { bytes };
        let [position, token, flags] = [at.u32()?, at.u32()?, at.u32()?];
        if flags > 1 {
            return Err(format!("invalid flags {flags:#x} of a position"));
        }
        let length = usize::from(u16::from_le_bytes(at.take()?));
        let text = std::str::from_utf8(at.slice(length)?).map_err(|e| e.to_string())?.to_owned();
        let mut rows = Vec::new();
        for layer in header.selecting() {
            for _ in 0..layer.heads {
                rows.push(row(&mut at, layer.rounds, layer.picks)?);
            }
        }
        let mut blends = Vec::new();
        for _ in 0..header.blending().map(|layer| layer.heads).sum() {
            let [count] = at.take::<1>()?;
            let pair = |_| Ok((at.i32()?, at.f32()?));
            blends.push((0..count).map(pair).collect::<std::result::Result<_, String>>()?);
        }
        match at.bytes.len() {
            0 => Ok(Self { position, token, generated: flags == 1, text, rows, blends }),
            more => Err(format!("{more} bytes too many")),
        }
    }
}

/// The bits of a float, with the same bits for every NaN.
pub(super) fn bits(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

fn row(at: &mut Cursor, rounds: usize, picks: usize) -> std::result::Result<Row, String> {
    let selected = at.i32()?;
    let [energy, margin, coherence, gate, share, memory] =
        [at.f32()?, at.f32()?, at.f32()?, at.f32()?, at.f32()?, at.f32()?];
    let later = (1..rounds).map(|_| at.i32()).collect::<std::result::Result<_, _>>()?;
    let picks = (1..picks).map(|_| Ok((at.i32()?, at.f32()?))).collect::<std::result::Result<_, String>>()?;
    let [count] = at.take::<1>()?;
    let mut slots = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let key = at.i32()?;
        let [flags] = at.take::<1>()?;
        if flags & !(PROTECTED | REJECTED | LIFTED | RUNNER_UP) != 0 {
            return Err(format!("invalid flags {flags:#x} of a candidate"));
        }
        let energy = at.f32()?;
        let lifted = if flags & LIFTED != 0 { Some(at.f32()?) } else { None };
        let (protected, rejected) = (flags & PROTECTED != 0, flags & REJECTED != 0);
        let runner_up = flags & RUNNER_UP != 0;
        slots.push(Slot { key, protected, rejected, runner_up, energy, lifted });
    }
    Ok(Row { selected, energy, margin, coherence, gate, share, memory, later, picks, slots })
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn slice(&mut self, n: usize) -> std::result::Result<&'a [u8], String> {
        let short = || format!("{} bytes too few", n - self.bytes.len());
        let (head, rest) = self.bytes.split_at_checked(n).ok_or_else(short)?;
        self.bytes = rest;
        Ok(head)
    }

    fn take<const N: usize>(&mut self) -> std::result::Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.slice(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> std::result::Result<u32, String> {
        self.take().map(u32::from_le_bytes)
    }

    fn i32(&mut self) -> std::result::Result<i32, String> {
        self.take().map(i32::from_le_bytes)
    }

    fn f32(&mut self) -> std::result::Result<f32, String> {
        let bits = self.u32()?;
        let x = f32::from_bits(bits);
        if x.is_nan() && bits != f32::NAN.to_bits() {
            return Err(format!("a NaN with the bits {bits:#x}"));
        }
        Ok(x)
    }
}
