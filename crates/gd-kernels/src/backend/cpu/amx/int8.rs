//! Products of 8-bit integers: tiles of 16 queries by 64 bytes times 64 bytes by 16 keys.
#![allow(unsafe_code)]

use std::arch::asm;

use crate::backend::cpu::amx::{TileConfig, TileShape};
use crate::backend::cpu::cache_line::AlignedVec;
use crate::backend::cpu::quantize::{KEYS, STEP};

/// Queries of a strip.
pub(crate) const STRIP: usize = 32;

/// Most steps of [`STEP`] products that a tile holds.
const MAX_TILE_STEPS: usize = 16;

/// Sums of a strip with a panel.
#[repr(align(64))]
pub(crate) struct Sums(pub(crate) [[i32; KEYS]; STRIP]);

/// The queries of a block as tiles.
pub(crate) struct Tiled {
    /// `[rows, a multiple of STRIP][chunks][chunk_steps][STEP]`. The last chunk ends with the last step; steps that it
    /// shares with the chunk before are 0 in it.
    values: AlignedVec<i8>,
    steps: usize,
    chunks: usize,
    /// Steps of a chunk.
    chunk_steps: usize,
    _tiles: TileConfig,
}

impl Tiled {
    /// Zeros for `rows` queries of `steps` steps; configures the tiles of this thread.
    pub(crate) fn new(rows: usize, steps: usize) -> Self {
        let chunks = steps.div_ceil(MAX_TILE_STEPS);
        let chunk_steps = steps.div_ceil(chunks);
        let values = AlignedVec::zeros(rows.next_multiple_of(STRIP) * chunks * chunk_steps * STEP);
        let tiles = TileConfig::new(TileShape { left_bytes: chunk_steps * STEP, right_rows: chunk_steps });
        Self { values, steps, chunks, chunk_steps, _tiles: tiles }
    }

    /// Sets query `r`.
    pub(crate) fn set_row(&mut self, r: usize, query: &[i8]) {
        let Self { steps, chunks, chunk_steps, .. } = *self;
        let row = &mut self.values[r * chunks * chunk_steps * STEP..][..chunks * chunk_steps * STEP];
        let whole = (chunks - 1) * chunk_steps * STEP;
        row[..whole].copy_from_slice(&query[..whole]);
        let overlap = (chunks * chunk_steps - steps) * STEP;
        row[whole + overlap..][..query.len() - whole].copy_from_slice(&query[whole..]);
    }

    /// The products of a strip with a panel `[steps][KEYS][STEP]` of unsigned keys.
    pub(crate) fn multiply(&self, strip: usize, panel: &[u8], out: &mut Sums) {
        let Self { steps, chunks, chunk_steps, .. } = *self;
        let row = chunks * chunk_steps * STEP;
        let queries = &self.values[strip * STRIP * row..][..STRIP * row];
        assert_eq!(panel.len(), steps * KEYS * STEP);
        // SAFETY: the tiles are configured while `self` lives, in its thread. Queries are read from 32 rows of `row` bytes,
        // keys from chunks of `chunk_steps` steps of 128 bytes, the last of which ends with the panel; 32 rows of 128 bytes
        // are written.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{key} + {line}*1]",
                "tileloadd tmm4, [{upper} + {row}*1]",
                "tdpbsud tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{key} + {line}*1 + 64]",
                "tdpbsud tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {row}*1]",
                "tdpbsud tmm2, tmm5, tmm6",
                "tdpbsud tmm3, tmm5, tmm7",
                "add {upper}, {query_step}",
                "add {lower}, {query_step}",
                "add {key}, {key_step}",
                "cmp {left}, 2",
                "cmove {key}, {last}",
                "dec {left}",
                "jnz 2b",
                "tilestored [{out} + {line}*1], tmm0",
                "tilestored [{out} + {line}*1 + 64], tmm1",
                "tilestored [{out} + {line}*1 + 2048], tmm2",
                "tilestored [{out} + {line}*1 + 2112], tmm3",
                key = inout(reg) panel.as_ptr() => _,
                last = in(reg) panel.as_ptr().add((steps - chunk_steps) * KEYS * STEP),
                upper = inout(reg) queries.as_ptr() => _,
                lower = inout(reg) queries.as_ptr().add(STRIP / 2 * row) => _,
                row = in(reg) row,
                query_step = in(reg) chunk_steps * STEP,
                key_step = in(reg) chunk_steps * KEYS * STEP,
                line = in(reg) KEYS * STEP,
                left = inout(reg) chunks => _,
                out = in(reg) out.0.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::amx::available;

    #[test]
    fn sums_are_exact_for_every_number_of_steps() {
        if !available() {
            eprintln!("no AMX on this machine; the tile code is not run");
            return;
        }
        for steps in 1..=70 {
            let mut tiled = Tiled::new(33, steps);
            let query = |r: usize| (0..steps * STEP).map(move |x| ((r * 31 + x * 7) % 255) as u8 as i8);
            let key = |w: usize, x: usize| ((w * 13 + x * 29 + 5) % 256) as u8;
            for r in 0..33 {
                tiled.set_row(r, &query(r).collect::<Vec<_>>());
            }
            let at = |p: usize| (p / STEP % KEYS, p / (KEYS * STEP) * STEP + p % STEP);
            let panel: Vec<u8> = (0..steps * KEYS * STEP).map(|p| key(at(p).0, at(p).1)).collect();
            for strip in 0..2 {
                let mut out = Sums([[-1; KEYS]; STRIP]);
                tiled.multiply(strip, &panel, &mut out);
                for (r, row) in out.0.iter().enumerate() {
                    let r = strip * STRIP + r;
                    for (w, &sum) in row.iter().enumerate() {
                        let products = query(r).enumerate().map(|(x, q)| i32::from(q) * i32::from(key(w, x)));
                        let expected = if r < 33 { products.sum() } else { 0 };
                        assert_eq!(sum, expected, "{steps} steps, query {r}, key {w}");
                    }
                }
            }
        }
    }
}
