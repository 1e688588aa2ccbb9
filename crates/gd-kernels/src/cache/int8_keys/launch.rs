//! A cache of keys as 8-bit integers on a GPU, for certified decoding and scans.
//!
//! codes i8 `[pieces, Hk, room, width]` (width: D rounded up to 16, zeros behind D) and known f32
//! `[pieces, Hk, room, 4]`: scale, error, norm and the bias without a prior. A piece is a batch entry or a page.
//! Integers and scales are those of the CPU, to the bit; error and norm are added up in another order, both within
//! the same margin above the true ones.

use bytemuck::bytes_of;
use candle_core::DType;

use crate::backend::gpu::kernel::Variant;
use crate::backend::gpu::kernel::padded_dim;
use crate::backend::gpu::params::{QuantizeParams, ScoreCode};
use crate::backend::gpu::{
    Constants, Gpu, KernelOp, Launch, Slice, Tensor4, dtype_name, elements, grid, require_compute,
};
use crate::cache::append_buffer::WritePosition;
use crate::cache::key_bias::BIAS_TILE;
use crate::error::{Error, Result};
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// Warps of the kernel; each takes one key.
const WARPS: usize = 8;
/// Bytes of what is known of a key.
pub(crate) const KNOWN: usize = 16;

/// Bytes of a key's integers.
pub fn width(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Keys for which a piece of at least `keys` keys has room.
pub fn room(keys: usize) -> usize {
    keys.next_multiple_of(BIAS_TILE)
}

/// The memory of a cache.
#[derive(Debug)]
pub struct Quantized<'a, B> {
    /// The integers, [`Shape::codes_bytes`].
    pub codes: Slice<'a, B>,
    /// Scale, error, norm and bias, [`Shape::known_bytes`].
    pub known: Slice<'a, B>,
    /// Keys of a piece, a multiple of 64.
    pub room: usize,
}

impl<B> Clone for Quantized<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Quantized<'_, B> {}

/// What a cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Batch entries, or pages.
    pub pieces: usize,
    /// Hk.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Element type of the keys.
    pub dtype: DType,
    /// The score whose biases are kept.
    pub score: Score,
}

impl Shape {
    /// That of a problem's keys.
    pub fn of(problem: &Problem) -> Self {
        let Problem { batch, kv_heads, head_dim, dtype, score, .. } = *problem;
        Self { pieces: batch, kv_heads, head_dim, dtype, score }
    }

    /// Bytes of the integers of pieces of `room` keys.
    pub fn codes_bytes(&self, room: usize) -> usize {
        self.pieces * self.kv_heads * room * width(self.head_dim)
    }

    /// Bytes of what is known of them.
    pub fn known_bytes(&self, room: usize) -> usize {
        self.pieces * self.kv_heads * room * KNOWN
    }
}

/// Enters k `[pieces, Hk, keys, D]` into a cache, from row `first` of every piece on.
///
/// # Errors
/// Keys for which the cache has no room, and what the GPU or its kernels refuse.
pub fn quantize<G: Gpu>(
    gpu: &G,
    shape: &Shape,
    k: &Tensor4<'_, G::Buffer>,
    keys: usize,
    first: usize,
    to: &Quantized<'_, G::Buffer>,
) -> Result<()> {
    let Shape { pieces, kv_heads, head_dim, dtype, score } = *shape;
    require_compute("quantise", &gpu.arch())?;
    if gpu.arch().is_metal() {
        return Err(Error::Unsupported("8-bit keys on Metal; on the CPU and on CUDA they are".into()));
    }
    padded_dim("quantise", head_dim)?;
    if first + keys > to.room || !to.room.is_multiple_of(BIAS_TILE) {
        return Err(Error::Invalid(format!(
            "8-bit keys {first}..{} of pieces of {} keys, which must be a multiple of {BIAS_TILE}",
            first + keys,
            to.room
        )));
    }
    let [k_batch, k_head, k_row] = k.checked("k", [pieces, kv_heads, keys, head_dim])?;
    elements("8-bit keys", (pieces * kv_heads) as u128 * to.room as u128)?;
    let params = QuantizeParams {
        sequences: pieces as u32,
        kv_heads: kv_heads as u32,
        keys: keys as u32,
        head_dim: head_dim as u32,
        k_batch,
        k_head,
        k_row,
        first: first as u32,
        capacity: to.room as u32,
        width: width(head_dim) as u32,
        score: ScoreCode::from(score) as u32,
    };
    let count = pieces as u128 * kv_heads as u128 * keys as u128;
    gpu.launch(&Launch {
        kernel: Variant::new("quantise", dtype, &gpu.arch())?.kernel(KernelOp::Quantize),
        grid: grid("quantise", count.div_ceil(WARPS as u128))?,
        block: 32 * WARPS as u32,
        shared_bytes: 0,
        params: bytes_of(&params).to_vec(),
        constants: Constants::default(),
        buffers: vec![Some(k.data), Some(to.codes), Some(to.known)],
    })
}

/// Enters k `[R, Hk, keys, D]` into a cache, its entry r into piece `at[r][0]` from row `at[r][1]` on. Entries for
/// pieces that follow each other, from the same row on, share a launch.
///
/// # Errors
/// As [`quantize`], or a piece that is not there.
pub fn quantize_at<G: Gpu>(
    gpu: &G,
    shape: &Shape,
    k: &Tensor4<'_, G::Buffer>,
    keys: usize,
    at: &[WritePosition],
    to: &Quantized<'_, G::Buffer>,
) -> Result<()> {
    let mut entry = 0;
    while let Some(&[piece, first]) = at.get(entry) {
        let alike = at[entry..].iter().enumerate().take_while(|(i, place)| **place == [piece + i, first]);
        let pieces = alike.count();
        if piece + pieces > shape.pieces {
            return Err(Error::Invalid(format!(
                "8-bit keys for piece {} of {}",
                piece + pieces - 1,
                shape.pieces
            )));
        }
        let one = Shape { pieces: 1, ..*shape };
        let offset = entry * k.strides[0] * shape.dtype.size_in_bytes();
        let rows = Tensor4 { data: behind(k.data, offset), strides: k.strides };
        let to = Quantized {
            codes: behind(to.codes, piece * one.codes_bytes(to.room)),
            known: behind(to.known, piece * one.known_bytes(to.room)),
            room: to.room,
        };
        quantize(gpu, &Shape { pieces, ..*shape }, &rows, keys, first, &to)?;
        entry += pieces;
    }
    Ok(())
}

/// What lies `bytes` bytes behind the start of a slice.
fn behind<B>(slice: Slice<'_, B>, bytes: usize) -> Slice<'_, B> {
    Slice { offset: slice.offset + bytes, ..slice }
}
