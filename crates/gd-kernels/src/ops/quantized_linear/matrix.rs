//! Quantised matrices in the layout of the products.
//!
//! The rows are stored in tiles of 16, so that a register of 16 lanes holds one integer product of each row. A tile has the
//! groups of 32 columns in order. A group has its 4 low bits in 4 registers, in which the 32 bits of a lane are 8 values of
//! its row: the low half and the high half of a lane, shifted by the same number of bits, are two adjacent values, as the
//! instructions that multiply pairs of 16-bit integers read them. The high bits follow, in 1 register for 5 bits and 2 for 6
//! bits. Values of 8 bits have 8 registers of 4 values a lane. The scales are stored apart.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::f16;

use super::blocks::{Block, Format, GROUP, GROUPS_PER_BLOCK, Scales};
use crate::backend::cpu::cache_line::AlignedVec;
use crate::backend::cpu::lanes::{LANES, REGISTER_BYTES};
use crate::backend::cpu::parallel::{par_chunks, par_chunks2, par_map};
use crate::error::{Error, Result};

/// Blocks of scales that a task looks through.
const BLOCKS_PER_TASK: usize = 1024;
/// Rows of a tile.
pub(super) const TILE: usize = LANES;
/// Bytes of the low 4 bits of a group in a tile.
pub(super) const LOW_BYTES: usize = 4 * REGISTER_BYTES;
/// Bytes of one f16 for each row of a tile.
const HALF_BYTES: usize = 2 * TILE;

impl Format {
    /// Bytes of the integers of a group in a tile.
    pub(super) const fn value_bytes(self) -> usize {
        self.bits * REGISTER_BYTES
    }

    /// Bytes of the scales of a block in a tile.
    pub(super) const fn scale_bytes(self) -> usize {
        match self.scales {
            Scales::Symmetric => HALF_BYTES,
            Scales::Affine => 2 * HALF_BYTES,
            Scales::AffineK => 2 * HALF_BYTES + GROUPS_PER_BLOCK * 2 * TILE,
            Scales::SymmetricK => HALF_BYTES + GROUPS_PER_BLOCK * 2 * TILE,
        }
    }
}

/// A matrix `[O, I]` whose weights are stored in blocks of integers, as a GGUF file has them, for
/// [`quantized_linear`](crate::quantized_linear).
///
/// The types are Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K. Memory is that of the file; with Q4_K and Q5_K 3 % more,
/// because the scales of 6 bits are stored in bytes.
pub struct QuantizedMatrix {
    dtype: GgmlDType,
    pub(super) format: Format,
    rows: usize,
    columns: usize,
    /// The integers, tile by tile.
    values: AlignedVec<u8>,
    /// The scales, tile by tile.
    scales: AlignedVec<u8>,
}

impl std::fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedMatrix({:?}, {} x {})", self.dtype, self.rows, self.columns)
    }
}

impl QuantizedMatrix {
    /// From the blocks of a matrix of `dims` rows and columns, row by row, as a GGUF file or
    /// [`QTensor::data`](candle_core::quantized::QTensor::data) has them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another type; [`Error::Invalid`] for columns that are no multiple of the block size, for
    /// another number of bytes, and for scales that are not finite.
    pub fn new(dtype: GgmlDType, dims: [usize; 2], blocks: &[u8]) -> Result<Self> {
        let format = Format::new(dtype)?;
        let [rows, columns] = dims;
        let (size, bytes) = (dtype.block_size(), dtype.type_size());
        if !columns.is_multiple_of(size) || columns == 0 {
            return Err(Error::Invalid(format!(
                "a quantized matrix {dims:?}: {columns} columns are no multiple of the {size} values of a block of {dtype:?}"
            )));
        }
        let row_bytes = columns / size * bytes;
        if Some(blocks.len()) != rows.checked_mul(row_bytes) {
            return Err(Error::Invalid(format!(
                "a quantized matrix {dims:?} of {dtype:?} has {rows} rows of {row_bytes} bytes, not {} bytes",
                blocks.len()
            )));
        }
        let tiles = rows.div_ceil(TILE);
        let (value_bytes, scale_bytes) =
            (columns / GROUP * format.value_bytes(), columns / size * format.scale_bytes());
        let mut matrix = Self {
            dtype,
            format,
            rows,
            columns,
            values: AlignedVec::zeros(tiles * value_bytes),
            scales: AlignedVec::zeros(tiles * scale_bytes),
        };
        par_chunks2(
            (&mut matrix.values, value_bytes),
            (&mut matrix.scales, scale_bytes),
            &|tile, values, scales| {
                let blocks = &blocks[tile * TILE * row_bytes..];
                for (lane, row) in blocks.chunks_exact(row_bytes).take(TILE).enumerate() {
                    for (at, block) in row.chunks_exact(bytes).enumerate() {
                        let block = Block::read(dtype, block);
                        let groups = format.groups();
                        for (group, integers) in block.values[..groups].iter().enumerate() {
                            let at = (at * groups + group) * format.value_bytes();
                            store_values(format, integers, lane, &mut values[at..at + format.value_bytes()]);
                        }
                        store_scales(
                            format,
                            &block,
                            lane,
                            &mut scales[at * format.scale_bytes()..][..format.scale_bytes()],
                        );
                    }
                }
            },
        );
        match matrix.non_finite_scales() {
            0 => Ok(matrix),
            count => Err(Error::Invalid(format!(
                "a quantized matrix {dims:?} of {dtype:?}: {count} of its scales are NaN or infinite"
            ))),
        }
    }

    /// The number of scales in f16 that are NaN or infinite.
    fn non_finite_scales(&self) -> usize {
        let count = |block: &[u8]| {
            let halves = block[..self.format.floats() * HALF_BYTES].chunks_exact(2);
            halves.filter(|half| !f16::from_le_bytes([half[0], half[1]]).is_finite()).count()
        };
        let size = self.format.scale_bytes();
        let counts = par_map(self.scales.chunks(size * BLOCKS_PER_TASK).collect(), &|_, blocks| {
            blocks.chunks(size).map(count).sum::<usize>()
        });
        counts.iter().sum()
    }

    /// The numbers of rows and columns, `[O, I]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// The type of the blocks.
    pub fn dtype(&self) -> GgmlDType {
        self.dtype
    }

    /// The memory of the weights in bytes.
    pub fn size_in_bytes(&self) -> usize {
        self.values.len() + self.scales.len()
    }

    /// The weights `[O, I]` in f32: in each block the integer times the scale, and the minimum added.
    ///
    /// # Errors
    /// An error of candle.
    pub fn dequantize(&self) -> Result<Tensor> {
        let rows: Vec<u32> = (0..self.rows as u32).collect();
        self.dequantize_rows(&rows)
    }

    /// Rows of the weights `[ids.len(), I]` in f32, as an embedding table has them.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an id beyond the rows.
    pub fn dequantize_rows(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.rows) {
            return Err(Error::Invalid(format!("row {id} of a quantized matrix of {} rows", self.rows)));
        }
        let mut out = vec![0f32; ids.len() * self.columns];
        par_chunks(&mut out, self.columns, &|i, out| self.dequantize_row(ids[i] as usize, out));
        Ok(Tensor::from_vec(out, (ids.len(), self.columns), &Device::Cpu)?)
    }

    /// As [`dequantize_rows`](Self::dequantize_rows) for ids `[R]` in a tensor of type u32 on the CPU.
    ///
    /// # Errors
    /// As there, and for another dtype or rank.
    pub fn embedding(&self, ids: &Tensor) -> Result<Tensor> {
        if ids.dtype() != DType::U32 {
            return Err(Error::Invalid(format!(
                "ids in {:?} for the rows of a quantized matrix; U32 expected",
                ids.dtype()
            )));
        }
        self.dequantize_rows(&ids.to_vec1::<u32>()?)
    }

    fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        let (values, scales) = self.tile(row / TILE);
        let (format, lane) = (self.format, row % TILE);
        for (group, out) in out.chunks_exact_mut(GROUP).enumerate() {
            let values = &values[group * format.value_bytes()..][..format.value_bytes()];
            let block = &scales[group / format.groups() * format.scale_bytes()..][..format.scale_bytes()];
            let (scales, min) = lane_scales(format, block, group % GROUPS_PER_BLOCK, lane);
            for (i, out) in out.iter_mut().enumerate() {
                let integer = i32::from(load_value(format, values, lane, i)) - format.zero();
                let product = scales[i / (GROUP / 2)] * integer as f32;
                *out = min.map_or(product, |min| product + min);
            }
        }
    }

    /// The integers and the scales of a tile.
    pub(super) fn tile(&self, tile: usize) -> (&[u8], &[u8]) {
        let values = self.columns / GROUP * self.format.value_bytes();
        let scales = self.columns / self.dtype.block_size() * self.format.scale_bytes();
        (&self.values[tile * values..][..values], &self.scales[tile * scales..][..scales])
    }
}

/// The place of value `i` of a group within the 32 bits of its lane, for the low 4 bits: the register and the shift.
fn low_place(i: usize) -> (usize, usize) {
    (i / 8, i % 8 / 2 * 4 + i % 2 * 16)
}

/// The same for `bits` high bits, 1 or 2.
fn high_place(i: usize, bits: usize) -> (usize, usize) {
    let per_register = 16 / bits;
    (i / 2 / per_register, i / 2 % per_register * bits + i % 2 * 16)
}

/// The same for values of 8 bits.
fn byte_place(i: usize) -> (usize, usize) {
    (i / 4, i % 4 / 2 * 8 + i % 2 * 16)
}

/// Writes the integers of a group of one row.
fn store_values(format: Format, integers: &[u8; GROUP], lane: usize, out: &mut [u8]) {
    let mut words = [0u32; 8];
    let mut put = |(register, shift): (usize, usize), value: u32| words[register] |= value << shift;
    match format.bits {
        8 => integers.iter().enumerate().for_each(|(i, integer)| put(byte_place(i), u32::from(*integer))),
        bits => {
            integers.iter().enumerate().for_each(|(i, integer)| put(low_place(i), u32::from(integer & 0xF)));
            if let high @ 1.. = bits - 4 {
                for (i, integer) in integers.iter().enumerate() {
                    let (register, shift) = high_place(i, high);
                    put((4 + register, shift), u32::from(integer >> 4));
                }
            }
        }
    }
    for (register, word) in out.chunks_exact_mut(REGISTER_BYTES).zip(words) {
        register[lane * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
}

/// Value `i` of a group of one row.
fn load_value(format: Format, values: &[u8], lane: usize, i: usize) -> u8 {
    let get = |(register, shift): (usize, usize), bits: usize| {
        let at = register * REGISTER_BYTES + lane * 4;
        let word = u32::from_le_bytes([values[at], values[at + 1], values[at + 2], values[at + 3]]);
        (word >> shift & ((1 << bits) - 1)) as u8
    };
    match format.bits {
        8 => get(byte_place(i), 8),
        4 => get(low_place(i), 4),
        bits => {
            let (register, shift) = high_place(i, bits - 4);
            get(low_place(i), 4) | get((4 + register, shift), bits - 4) << 4
        }
    }
}

/// Writes the scales of a block of one row.
fn store_scales(format: Format, block: &Block, lane: usize, out: &mut [u8]) {
    let floats = format.floats();
    for (out, float) in out.chunks_exact_mut(HALF_BYTES).zip(&block.floats[..floats]) {
        out[lane * 2..][..2].copy_from_slice(&float.to_le_bytes());
    }
    let factors = out[floats * HALF_BYTES..].chunks_exact_mut(2 * TILE);
    for (out, [first, second]) in factors.zip(block.factors) {
        (out[lane], out[TILE + lane]) = (first, second);
    }
}

/// The scales of the two halves of a group of one row, and its minimum. `group` is its number in the block.
fn lane_scales(format: Format, block: &[u8], group: usize, lane: usize) -> ([f32; 2], Option<f32>) {
    let half = |which: usize| {
        let at = which * HALF_BYTES + lane * 2;
        f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
    };
    match format.scales {
        Scales::Symmetric => ([half(0); 2], None),
        Scales::Affine => ([half(0); 2], Some(half(1))),
        Scales::AffineK => {
            let factors = &block[2 * HALF_BYTES + group * 2 * TILE..];
            ([half(0) * f32::from(factors[lane]); 2], Some(-(half(1) * f32::from(factors[TILE + lane]))))
        }
        Scales::SymmetricK => {
            let factors = &block[HALF_BYTES + group * 2 * TILE..];
            ([factors[lane], factors[TILE + lane]].map(|x| half(0) * f32::from(x.cast_signed())), None)
        }
    }
}
