//! Products of 8-bit integers with AMX: tiles of 16 queries by 64 bytes times 64 bytes by 16 keys.
//!
//! Tiles 0 to 3 hold the sums of 32 queries and 32 keys, tiles 4 and 5 queries, tiles 6 and 7 keys. The intrinsics are not
//! stable in Rust, so this uses inline assembly. The compiler itself uses no tiles.
#![allow(unsafe_code)]

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

use crate::backend::cpu::quantize::{KEYS, STEP};

/// Queries of a strip.
pub(crate) const STRIP: usize = 32;

/// Most steps of [`STEP`] products that a tile holds.
const MAX_TILE_STEPS: usize = 16;

/// Sums of a strip with a panel.
#[repr(align(64))]
pub(crate) struct Sums(pub(crate) [[i32; KEYS]; STRIP]);

/// Whether this process may use AMX.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| supported() && permitted())
}

/// Whether the processor and the operating system support tiles and their integer products.
fn supported() -> bool {
    /// Bits of CPUID leaf 7, EDX.
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    std::arch::is_x86_feature_detected!("avx512vnni")
        && std::arch::x86_64::__cpuid_count(7, 0).edx & TILE_AND_INT8 == TILE_AND_INT8
}

/// Linux gives access to the tile registers on request only, because they add 8 KiB to the state of a thread.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and accesses no memory; it returns an error where it is not implemented.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// The queries of a block as tiles.
pub(crate) struct Tiled {
    /// `[rows, a multiple of STRIP][chunks][chunk_steps][STEP]`. The last chunk ends with the last step; steps that it
    /// shares with the chunk before are 0 in it.
    values: Vec<i8>,
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
        let values = vec![0; rows.next_multiple_of(STRIP) * chunks * chunk_steps * STEP];
        Self { values, steps, chunks, chunk_steps, _tiles: TileConfig::new(chunk_steps) }
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

/// The tile configuration of this thread, released when dropped. It is not `Send`.
struct TileConfig(PhantomData<*const ()>);

impl TileConfig {
    fn new(chunk_steps: usize) -> Self {
        assert!(available(), "AMX is available and permitted");
        // Palette, start row, 14 reserved bytes, bytes per row of 16 tiles, rows of 16 tiles.
        let mut config = [0u8; 64];
        config[0] = 1;
        for tile in 0..8 {
            let (rows, bytes) = match tile {
                4 | 5 => (16, chunk_steps * STEP),
                6 | 7 => (chunk_steps, 64),
                _ => (16, 64),
            };
            config[16 + 2 * tile] = bytes as u8;
            config[48 + tile] = rows as u8;
        }
        // SAFETY: AMX is available, and the configuration is within the limits of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) config.as_ptr(), options(nostack, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for TileConfig {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
