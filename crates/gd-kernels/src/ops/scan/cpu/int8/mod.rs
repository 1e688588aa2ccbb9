//! Upper bounds of scores from products of 8-bit integers.
//!
//! Keys are stored as `Q + 128` in 0..=255, because the fastest instruction multiplies unsigned by signed bytes. The sums
//! of a query start at `-128 * sum(Q)`, which compensates for the offset. All integer sums are exact in f32, and the
//! floating-point operations after them are the same on every instruction set, so the bounds have the same bits.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::quantize::{KEYS, STEP};
use crate::ops::scan::cpu::bounded_lists::BoundedLists;

/// Queries of a group.
pub(crate) const ROWS: usize = 8;

/// One panel of keys with the bounds for a block of queries.
pub(crate) struct Panel<'a> {
    /// `[D / 4][KEYS][4]`.
    pub(crate) values: &'a [u8],
    pub(crate) scale: &'a [f32; KEYS],
    /// The part of the score that does not depend on the query, rounded up.
    pub(crate) bias: &'a [f32; KEYS],
    /// Bound of the error of the score for a query of norm 1.
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
    /// Rows of a group with queries: all, unless there is one group.
    pub(crate) used: usize,
    /// The values in the layout of [`Int8Path::Amx`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) tiled: Option<crate::backend::cpu::amx::int8::Tiled>,
}

/// A panel and the queries that are multiplied with it.
pub(crate) struct PanelTask<'a> {
    pub(crate) queries: &'a Queries,
    pub(crate) panel: Panel<'a>,
    /// The groups (bits) that are computed.
    pub(crate) active: u32,
    /// The keys (bits) that are visible to each row.
    pub(crate) visible: &'a [u32],
}

/// The implementation that computes the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Int8Path {
    /// Loops that are compiled for the instruction set of their caller.
    Plain,
    /// The same with AVX2 for the products, which this machine has.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 with VNNI, which this machine has.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// The same with AMX for the products.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Int8Path {
    /// The implementation for an instruction set of this machine.
    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Int8Path::Vnni,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Amx => Int8Path::Amx,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::Avx512 => Int8Path::Avx2,
            _ => Int8Path::Plain,
        }
    }

    /// The implementation for `rows` queries. For one group, VNNI is as fast as tiles, and faster if the group is not
    /// full.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    pub(crate) fn for_rows(self, rows: usize) -> Self {
        match self {
            #[cfg(target_arch = "x86_64")]
            Int8Path::Amx if rows <= ROWS => Int8Path::Vnni,
            path => path,
        }
    }
}

/// Appends the keys that are visible to a row and whose upper bound reaches its threshold, for the active groups. With one
/// candidate, also raises the thresholds. No list may be full before; returns the rows (bits) whose lists are full after.
#[inline(always)]
pub(crate) fn collect(path: Int8Path, task: &PanelTask<'_>, out: &mut BoundedLists) -> u64 {
    match path {
        Int8Path::Plain => bounds(task, out, plain_sums),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a plan names AVX2, or AVX-512, which includes it, only on machines that have it.
        Int8Path::Avx2 => bounds(task, out, |start, q, r, keys| unsafe { avx2::sums(start, q, r, keys) }),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a plan names VNNI only on machines that have it, and `Int8Path::of` takes the plan's instruction set.
        Int8Path::Vnni => unsafe { x86::vnni(task, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; a machine with AMX has VNNI.
        Int8Path::Amx => unsafe { x86::amx(task, out) },
    }
}

/// The sums of query `r` of a group `[D / 4][ROWS][4]` with the keys of a panel `[D / 4][KEYS][4]`, from `start` on.
#[inline(always)]
fn plain_sums(start: i32, queries: &[i8], r: usize, keys: &[u8]) -> [i32; KEYS] {
    let mut sums = [start; KEYS];
    for (q, keys) in queries.chunks_exact(ROWS * STEP).zip(keys.chunks_exact(KEYS * STEP)) {
        let q: [i32; STEP] = std::array::from_fn(|s| i32::from(q[r * STEP + s]));
        for (sum, k) in sums.iter_mut().zip(keys.chunks_exact(STEP)) {
            for s in 0..STEP {
                *sum += q[s] * i32::from(k[s]);
            }
        }
    }
    sums
}

/// [`collect`] with the sums of one query at a time.
#[inline(always)]
fn bounds(
    task: &PanelTask<'_>,
    out: &mut BoundedLists,
    sums_of: impl Fn(i32, &[i8], usize, &[u8]) -> [i32; KEYS],
) -> u64 {
    let PanelTask { queries, panel, active, visible } = task;
    let mut full = 0;
    let group_len = panel.values.len() / KEYS * ROWS;
    for (g, values) in queries.values.chunks_exact(group_len.max(1)).enumerate() {
        if active >> g & 1 == 0 {
            continue;
        }
        for r in 0..queries.used {
            let row = g * ROWS + r;
            let sums = sums_of(queries.start[row], values, r, panel.values);
            let (scale, norm, threshold) = (queries.scale[row], queries.norm[row], out.threshold[row]);
            let mut upper = [0f32; KEYS];
            let mut any = false;
            for w in 0..KEYS {
                let score = (sums[w] as f32 * panel.scale[w]).mul_add(scale, panel.bias[w]);
                upper[w] = norm.mul_add(panel.error[w], score);
                any |= upper[w] >= threshold;
            }
            if !any {
                continue;
            }
            let mut to = out.first(row) + out.count[row];
            for (w, &bound) in upper.iter().enumerate() {
                let gap = norm.mul_add(panel.error[w], panel.slack[w]);
                (out.key[to], out.upper[to]) = (panel.first + w as u32, bound);
                out.lower[to] = (-2f32).mul_add(gap, bound);
                to += usize::from(bound >= threshold && visible[row] >> w & 1 == 1);
            }
            if out.candidates == 1 {
                // A lower bound of one key is a threshold for all others.
                let new = &out.lower[out.first(row) + out.count[row]..to];
                out.threshold[row] = new.iter().fold(threshold, |most, &x| if x > most { x } else { most });
            }
            out.count[row] = to - out.first(row);
            full |= u64::from(out.full(row)) << row;
        }
    }
    full
}
