//! The block types of GGUF: their sizes, and their values as integers with scales.
//!
//! The layouts are those of ggml (`ggml-common.h`, and `dequantize_row_*` in `ggml-quants.c`). A block holds 32 values, or
//! 256 in 8 groups of 32 for the types with a K. A value is `scale q - offset`, where q is an unsigned integer:
//!
//! | type | bits of q | scale, offset |
//! |---|---|---|
//! | Q4_0, Q5_0 | 4, 5 | d, d 2^(bits - 1) |
//! | Q4_1, Q5_1 | 4, 5 | d, -m |
//! | Q8_0 | 8, as q - 128 | d, 128 d |
//! | Q4_K, Q5_K | 4, 5 | d times a 6-bit integer per 32 values, dmin times another one |
//! | Q6_K | 6 | d times an 8-bit integer per 16 values, 32 times that |

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::error::{Error, Result};

/// Values of a group: those that have one scale of the activations.
pub(super) const GROUP: usize = 32;
/// Groups of a block of the types with a K.
pub(super) const GROUPS_PER_BLOCK: usize = 8;

/// How the values of a type are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// Bits of a value: 4, 5, 6 or 8.
    pub(super) bits: usize,
    pub(super) scales: Scales,
}

/// The scales of a type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scales {
    /// d in f16 per group; 2^(bits - 1) is subtracted from the integers.
    Symmetric,
    /// d and m in f16 per group; m is added.
    Affine,
    /// d and dmin in f16 per block, two integers per group.
    AffineK,
    /// d in f16 per block, two integers per group, one for each 16 values; 32 is subtracted from the integers.
    SymmetricK,
}

impl Format {
    /// The format of a type.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for types that are not stored here.
    pub(super) fn new(dtype: GgmlDType) -> Result<Self> {
        let (bits, scales) = match dtype {
            GgmlDType::Q4_0 => (4, Scales::Symmetric),
            GgmlDType::Q4_1 => (4, Scales::Affine),
            GgmlDType::Q5_0 => (5, Scales::Symmetric),
            GgmlDType::Q5_1 => (5, Scales::Affine),
            GgmlDType::Q8_0 => (8, Scales::Symmetric),
            GgmlDType::Q4K => (4, Scales::AffineK),
            GgmlDType::Q5K => (5, Scales::AffineK),
            GgmlDType::Q6K => (6, Scales::SymmetricK),
            other => {
                return Err(Error::Unsupported(format!(
                    "a quantized matrix of type {other:?}; Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K and Q6K are supported"
                )));
            }
        };
        Ok(Self { bits, scales })
    }

    /// What is subtracted from the integers before they are multiplied by the scale.
    pub(super) fn zero(self) -> i32 {
        match self.scales {
            Scales::Symmetric | Scales::SymmetricK => 1 << (self.bits - 1),
            Scales::Affine | Scales::AffineK => 0,
        }
    }

    /// Scales in f16 of a block.
    pub(super) fn floats(self) -> usize {
        match self.scales {
            Scales::Symmetric | Scales::SymmetricK => 1,
            Scales::Affine | Scales::AffineK => 2,
        }
    }

    /// Groups of a block.
    pub(super) fn groups(self) -> usize {
        match self.scales {
            Scales::Symmetric | Scales::Affine => 1,
            Scales::AffineK | Scales::SymmetricK => GROUPS_PER_BLOCK,
        }
    }
}

/// A block with its values as integers.
pub(super) struct Block {
    /// The integers of the groups.
    pub(super) values: [[u8; GROUP]; GROUPS_PER_BLOCK],
    /// d and, if the type has it, m or dmin, as stored.
    pub(super) floats: [f16; 2],
    /// The integers that multiply d and dmin, or d, in the groups; as stored.
    pub(super) factors: [[u8; 2]; GROUPS_PER_BLOCK],
}

impl Block {
    /// Reads the bytes of a block of this type.
    ///
    /// # Panics
    /// If they are fewer than those of a block.
    pub(super) fn read(dtype: GgmlDType, bytes: &[u8]) -> Self {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let mut block = Self {
            values: [[0; GROUP]; GROUPS_PER_BLOCK],
            floats: [f16::ZERO; 2],
            factors: [[0; 2]; GROUPS_PER_BLOCK],
        };
        match dtype {
            GgmlDType::Q4_0 => {
                block.floats[0] = half(0);
                block.values[0] = nibbles(&bytes[2..18]);
            }
            GgmlDType::Q4_1 => {
                block.floats = [half(0), half(2)];
                block.values[0] = nibbles(&bytes[4..20]);
            }
            GgmlDType::Q5_0 => {
                block.floats[0] = half(0);
                block.values[0] = with_fifth_bits(nibbles(&bytes[6..22]), &bytes[2..6]);
            }
            GgmlDType::Q5_1 => {
                block.floats = [half(0), half(2)];
                block.values[0] = with_fifth_bits(nibbles(&bytes[8..24]), &bytes[4..8]);
            }
            GgmlDType::Q8_0 => {
                block.floats[0] = half(0);
                // The sign bit turned: -128 is 0.
                block.values[0].iter_mut().zip(&bytes[2..34]).for_each(|(value, byte)| *value = byte ^ 0x80);
            }
            GgmlDType::Q4K => {
                block.floats = [half(0), half(2)];
                block.factors = six_bit_factors(&bytes[4..16]);
                block.values = nibble_groups(&bytes[16..144]);
            }
            GgmlDType::Q5K => {
                block.floats = [half(0), half(2)];
                block.factors = six_bit_factors(&bytes[4..16]);
                block.values = nibble_groups(&bytes[48..176]);
                for (group, values) in block.values.iter_mut().enumerate() {
                    for (value, high) in values.iter_mut().zip(&bytes[16..48]) {
                        *value |= (high >> group & 1) << 4;
                    }
                }
            }
            _ => block.read_six_bits(bytes, half(208)),
        }
        block
    }

    /// A block of Q6_K: the low 4 bits of all values, the high 2 bits, and the factors of 16 values each.
    fn read_six_bits(&mut self, bytes: &[u8], d: f16) {
        self.floats[0] = d;
        for (group, values) in self.values.iter_mut().enumerate() {
            // Each half of the block has four groups: in 64 bytes of low bits, and in 32 bytes of high bits.
            let (half, within) = (group / 4, group % 4);
            let low = &bytes[half * 64 + within % 2 * 32..][..GROUP];
            let high = &bytes[128 + half * 32..][..GROUP];
            for ((value, low), high) in values.iter_mut().zip(low).zip(high) {
                *value = low >> (within / 2 * 4) & 0xF | (high >> (within * 2) & 3) << 4;
            }
            self.factors[group] = [bytes[192 + group * 2], bytes[193 + group * 2]];
        }
    }
}

/// The low halves of 16 bytes, then the high halves.
fn nibbles(bytes: &[u8]) -> [u8; GROUP] {
    let mut values = [0; GROUP];
    let (low, high) = values.split_at_mut(GROUP / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 0xF, byte >> 4);
    }
    values
}

/// Four times 32 bytes, each the low halves of one group and the high halves of the next.
fn nibble_groups(bytes: &[u8]) -> [[u8; GROUP]; GROUPS_PER_BLOCK] {
    let mut values = [[0; GROUP]; GROUPS_PER_BLOCK];
    for (pair, bytes) in values.chunks_exact_mut(2).zip(bytes.chunks_exact(GROUP)) {
        for (i, byte) in bytes.iter().enumerate() {
            (pair[0][i], pair[1][i]) = (byte & 0xF, byte >> 4);
        }
    }
    values
}

fn with_fifth_bits(mut values: [u8; GROUP], bytes: &[u8]) -> [u8; GROUP] {
    for (i, value) in values.iter_mut().enumerate() {
        *value |= (bytes[i / 8] >> (i % 8) & 1) << 4;
    }
    values
}

/// The 8 scales and 8 minima of 6 bits each in 12 bytes, by group.
fn six_bit_factors(bytes: &[u8]) -> [[u8; 2]; GROUPS_PER_BLOCK] {
    std::array::from_fn(|group| match group {
        0..4 => [bytes[group] & 63, bytes[group + 4] & 63],
        _ => [
            bytes[group + 4] & 0xF | bytes[group - 4] >> 6 << 4,
            bytes[group + 4] >> 4 | bytes[group] >> 6 << 4,
        ],
    })
}
