//! What is recorded of a position: its token, and for every selecting layer and head what was preserved, what was
//! read, and by which lead. One record has one sequence of bytes and back, floats by their bits.
//!
//! Little endian: u32 position, u32 token, u32 flags (bit 0: generated), u16 length and UTF-8 text; then for every
//! selecting layer of the header and each of its heads
//!
//! | field | |
//! |---|---|
//! | i32 selected | the key read; -1: the head abstained |
//! | f32 energy, margin | those compared, +inf where there is none |
//! | f32 coherence | u*, NaN where the layer does not resolve it |
//! | f32 gate | what scaled the value |
//! | f32 share, f32 memory | of the norm of the head's output: the selected value, the running averages |
//! | i32 for each round after the first | the key it read, or -1 |
//! | u8 count, then count slots | in the scan's order: i32 key, u8 flags, f32 energy, and if lifted f32 that |
//!
//! The flags of a slot: 1 protected, 2 rejected, 4 lifted.

use super::header::Header;
use crate::error::{Error, Result};

/// A candidate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slot {
    /// Its position.
    pub key: i32,
    /// Preserved whatever its energy.
    pub protected: bool,
    /// Above the head's threshold.
    pub rejected: bool,
    /// Its energy as scanned.
    pub energy: f32,
    /// Its energy after the barrier has lifted it.
    pub lifted: Option<f32>,
}

const PROTECTED: u8 = 1;
const REJECTED: u8 = 2;
const LIFTED: u8 = 4;

impl Slot {
    /// The energy that is compared.
    pub fn compared(&self) -> f32 {
        self.lifted.unwrap_or(self.energy)
    }
}

/// What a head did at a position.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The position read; -1: the head abstained.
    pub selected: i32,
    /// Its energy; +inf where the head abstained.
    pub energy: f32,
    /// The lead over the next candidate that the threshold admits; +inf without one.
    pub margin: f32,
    /// u*; NaN where the layer does not resolve it.
    pub coherence: f32,
    /// What scaled the value.
    pub gate: f32,
    /// Of the norm of the head's output, the share of the selected value.
    pub share: f32,
    /// The share of the Beacon's running averages.
    pub memory: f32,
    /// What further rounds read; -1 nothing.
    pub later: Vec<i32>,
    /// The candidates, in the scan's order.
    pub slots: Vec<Slot>,
}

/// What is recorded of a position.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The position, from 0.
    pub position: u32,
    /// The token there.
    pub token: u32,
    /// Whether it was generated, not given.
    pub generated: bool,
    /// The characters that are complete with it.
    pub text: String,
    /// For every selecting layer, first to last, and each of its heads.
    pub rows: Vec<Row>,
}

impl Record {
    /// Appends the record's bytes.
    ///
    /// # Errors
    /// A text or a list too long for its length field.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let text = self.text.as_bytes();
        let length = u16::try_from(text.len())
            .map_err(|_| Error::Invalid(format!("a token with a text of {} bytes", text.len())))?;
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
            let count = u8::try_from(row.slots.len())
                .map_err(|_| Error::Invalid(format!("{} candidates of one head", row.slots.len())))?;
            out.push(count);
            for slot in &row.slots {
                let flag = |on: bool, bit: u8| if on { bit } else { 0 };
                out.extend(slot.key.to_le_bytes());
                out.push(
                    flag(slot.protected, PROTECTED)
                        | flag(slot.rejected, REJECTED)
                        | flag(slot.lifted.is_some(), LIFTED),
                );
                out.extend(bits(slot.energy).to_le_bytes());
                slot.lifted.iter().for_each(|x| out.extend(bits(*x).to_le_bytes()));
            }
        }
        Ok(())
    }

    /// The record that these bytes are, all of them.
    ///
    /// # Errors
    /// Says what is wrong; bytes that [`Record::encode`] would not write are errors.
    pub fn decode(bytes: &[u8], header: &Header) -> std::result::Result<Self, String> {
        let mut at = Cursor { bytes };
        let [position, token, flags] = [at.u32()?, at.u32()?, at.u32()?];
        if flags > 1 {
            return Err(format!("flags {flags:#x} of a position"));
        }
        let length = usize::from(u16::from_le_bytes(at.take()?));
        let text = std::str::from_utf8(at.slice(length)?).map_err(|e| e.to_string())?.to_owned();
        let mut rows = Vec::new();
        for layer in header.selecting() {
            for _ in 0..layer.heads {
                rows.push(row(&mut at, layer.rounds)?);
            }
        }
        match at.bytes.len() {
            0 => Ok(Self { position, token, generated: flags == 1, text, rows }),
            more => Err(format!("{more} bytes too many")),
        }
    }
}

/// The bits of a float; every NaN has the same.
pub(super) fn bits(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

fn row(at: &mut Cursor, rounds: usize) -> std::result::Result<Row, String> {
    let selected = at.i32()?;
    let [energy, margin, coherence, gate, share, memory] =
        [at.f32()?, at.f32()?, at.f32()?, at.f32()?, at.f32()?, at.f32()?];
    let later = (1..rounds).map(|_| at.i32()).collect::<std::result::Result<_, _>>()?;
    let [count] = at.take::<1>()?;
    let mut slots = Vec::with_capacity(usize::from(count));
    for _ in 0..count {
        let key = at.i32()?;
        let [flags] = at.take::<1>()?;
        if flags & !(PROTECTED | REJECTED | LIFTED) != 0 {
            return Err(format!("flags {flags:#x} of a candidate"));
        }
        let energy = at.f32()?;
        let lifted = if flags & LIFTED != 0 { Some(at.f32()?) } else { None };
        let (protected, rejected) = (flags & PROTECTED != 0, flags & REJECTED != 0);
        slots.push(Slot { key, protected, rejected, energy, lifted });
    }
    Ok(Row { selected, energy, margin, coherence, gate, share, memory, later, slots })
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
            return Err(format!("a NaN of the bits {bits:#x}"));
        }
        Ok(x)
    }
}
