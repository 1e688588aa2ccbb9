//! Products of matrices with AMX, the tile registers of x86-64.
//!
//! A block of 32 by 32 sums is held by tiles 0 to 3; tiles 4 and 5 hold 32 rows of the left factor, tiles 6 and 7 hold 32
//! columns of the right one. The intrinsics are not stable in Rust, so this uses inline assembly. The compiler itself uses
//! no tiles.
#![allow(unsafe_code)]

pub(crate) mod bf16;
pub(crate) mod int8;

use std::arch::asm;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Whether this process may use AMX.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| supported() && permitted())
}

/// Whether the processor and the operating system support tiles, their products of bf16 numbers and of 8-bit integers, and
/// the vector instructions that are used beside them. Every processor with one of these products has the other.
fn supported() -> bool {
    /// Bits of CPUID leaf 7, EDX.
    const BF16_TILE_AND_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    std::arch::is_x86_feature_detected!("avx512vnni")
        && std::arch::is_x86_feature_detected!("avx512bf16")
        && std::arch::x86_64::__cpuid_count(7, 0).edx & BF16_TILE_AND_INT8 == BF16_TILE_AND_INT8
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

/// The shape of the tiles of the factors.
#[derive(Clone, Copy)]
pub(crate) struct TileShape {
    /// Bytes of a row of the left factor, at most 64.
    pub(crate) left_bytes: usize,
    /// Rows of a tile of the right factor, at most 16.
    pub(crate) right_rows: usize,
}

/// The tile configuration of this thread, released when dropped. It is not `Send`.
pub(crate) struct TileConfig(PhantomData<*const ()>);

impl TileConfig {
    pub(crate) fn new(shape: TileShape) -> Self {
        assert!(available(), "AMX is available and permitted");
        // Palette, start row, 14 reserved bytes, bytes per row of 16 tiles, rows of 16 tiles.
        let mut config = [0u8; 64];
        config[0] = 1;
        for tile in 0..8 {
            let (rows, bytes) = match tile {
                4 | 5 => (16, shape.left_bytes),
                6 | 7 => (shape.right_rows, 64),
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
