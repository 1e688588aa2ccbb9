//! Upper bounds of scores from products of 8-bit integers.
//!
//! Keys are stored as `Q + 128` in 0..=255, since the fastest instruction multiplies unsigned by
//! signed bytes; starting a query's sums at `-128 * sum(Q)` takes that away again. All integer sums
//! are exact in f32, and the few floating-point operations behind them are the same everywhere, so
//! every instruction set gives the same bits.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::quantize::{KEYS, STEP};
use crate::ops::scan::cpu::bounded_lists::Lists;

/// Queries of a group.
pub(crate) const ROWS: usize = 8;
/// One panel of keys as a block of queries meets it.
pub(crate) struct Panel<'a> {
    /// `[D / 4][KEYS][4]`.
    pub(crate) values: &'a [u8],
    pub(crate) scale: &'a [f32; KEYS],
    /// What does not depend on the query, rounded up.
    pub(crate) bias: &'a [f32; KEYS],
    /// Error of the score for a query of norm 1.
    pub(crate) error: &'a [f32; KEYS],
    /// By how much the bias was rounded up.
    pub(crate) slack: &'a [f32; KEYS],
    /// The first key.
    pub(crate) first: u32,
}

/// A block of queries, in groups of [`ROWS`].
pub(crate) struct Queries {
    /// `[groups][D / 4][ROWS][4]`.
    pub(crate) values: Vec<i8>,
    /// `-128 * sum(Q)`.
    pub(crate) start: Vec<i32>,
    pub(crate) scale: Vec<f32>,
    pub(crate) norm: Vec<f32>,
    /// Rows of a group that hold queries: all of them, unless there is only one group.
    pub(crate) used: usize,
    /// The values once more, as [`Code::Amx`] reads them.
    #[cfg(target_arch = "x86_64")]
    pub(crate) tiled: Option<crate::backend::cpu::amx::Tiled>,
}

/// A panel and the queries that meet it.
pub(crate) struct Meeting<'a> {
    pub(crate) queries: &'a Queries,
    pub(crate) panel: Panel<'a>,
    /// The groups (bits) to look at.
    pub(crate) active: u32,
    /// The keys (bits) that are open to each row.
    pub(crate) open: &'a [u32],
}

/// Which code computes the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// Plain loops, compiled for the instruction set of their caller.
    Plain,
    /// AVX-512 with VNNI, which the caller has found on this machine.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// The same with AMX for the products.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Code {
    /// The code for an instruction set of this machine.
    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Code::Vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx => Code::Amx,
            _ => Code::Plain,
        }
    }

    /// The code for `rows` queries. Tiles pay for many: a group goes through VNNI as quickly, and what is left
    /// of one more quickly.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(crate) fn of_rows(self, rows: usize) -> Self {
        match self {
            #[cfg(target_arch = "x86_64")]
            Code::Amx if rows <= ROWS => Code::Vnni,
            code => code,
        }
    }
}

/// Appends the keys that are open to a row and whose upper bound reaches its threshold, for the active
/// groups; with one candidate, raises the thresholds. No list may be full; returns the rows (bits) whose
/// list is now.
#[inline(always)]
pub(crate) fn collect(code: Code, meeting: &Meeting<'_>, out: &mut Lists) -> u64 {
    match code {
        Code::Plain => plain(meeting, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a plan names VNNI only where it was found, and `Code::of` is given a plan's.
        Code::Vnni => unsafe { x86::vnni(meeting, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; a machine with AMX has VNNI.
        Code::Amx => unsafe { x86::amx(meeting, out) },
    }
}

#[inline(always)]
fn plain(meeting: &Meeting<'_>, out: &mut Lists) -> u64 {
    let Meeting { queries, panel, active, open } = meeting;
    let mut full = 0;
    let group_len = panel.values.len() / KEYS * ROWS;
    for (g, values) in queries.values.chunks_exact(group_len.max(1)).enumerate() {
        if active >> g & 1 == 0 {
            continue;
        }
        for r in 0..queries.used {
            let row = g * ROWS + r;
            let mut sums = [queries.start[row]; KEYS];
            for (q, keys) in values.chunks_exact(ROWS * STEP).zip(panel.values.chunks_exact(KEYS * STEP)) {
                let q: [i32; STEP] = std::array::from_fn(|s| i32::from(q[r * STEP + s]));
                for (sum, k) in sums.iter_mut().zip(keys.chunks_exact(STEP)) {
                    for s in 0..STEP {
                        *sum += q[s] * i32::from(k[s]);
                    }
                }
            }
            let (scale, norm, reached) = (queries.scale[row], queries.norm[row], out.threshold[row]);
            let mut upper = [0f32; KEYS];
            let mut any = false;
            for w in 0..KEYS {
                let score = (sums[w] as f32 * panel.scale[w]).mul_add(scale, panel.bias[w]);
                upper[w] = norm.mul_add(panel.error[w], score);
                any |= upper[w] >= reached;
            }
            if !any {
                continue;
            }
            let mut to = out.first(row) + out.count[row];
            for (w, &bound) in upper.iter().enumerate() {
                let gap = norm.mul_add(panel.error[w], panel.slack[w]);
                (out.key[to], out.upper[to]) = (panel.first + w as u32, bound);
                out.lower[to] = (-2f32).mul_add(gap, bound);
                to += usize::from(bound >= reached && open[row] >> w & 1 == 1);
            }
            if out.candidates == 1 {
                // What one key reaches for certain bounds all others.
                let new = &out.lower[out.first(row) + out.count[row]..to];
                out.threshold[row] = new.iter().fold(reached, |most, &x| if x > most { x } else { most });
            }
            out.count[row] = to - out.first(row);
            full |= u64::from(out.full(row)) << row;
        }
    }
    full
}
