//! Launches that quantise keys to 8 bits on a GPU, for certified decoding and scans.
//!
//! Values are i8 `[sequences, Hk, capacity, row_bytes]`, zero behind D; bounds are f32 `[sequences, Hk, capacity, 4]`:
//! scale, error, norm, and the bias without a prior. A sequence is a batch entry or a page. Integers and scales have
//! the bits of those of the CPU; error and norm are summed in another order, with the same safety margin.

use bytemuck::bytes_of;

use crate::backend::gpu::kernel::{KernelOp, Variant, padded_dim};
use crate::backend::gpu::params::{QuantizeParams, ScoreCode};
use crate::backend::gpu::{Constants, Gpu, Launch, Slice, Tensor4, elements, grid, require_compute};
use crate::cache::key_bias::KEY_PADDING;
use crate::cache::key_shape::KeyShape;
use crate::cache::position::WritePosition;
use crate::error::{Error, Result};

/// Warps of a block; each quantises one key.
const WARPS: usize = 8;
/// Bytes of scale, error, norm and bias of a key.
pub(crate) const BOUNDS_BYTES: usize = 16;
/// The bytes of a key's integers are a multiple of this.
const ROW_ALIGNMENT_BYTES: usize = 16;

/// Bytes of a key's integers.
pub fn row_bytes(head_dim: usize) -> usize {
    head_dim.next_multiple_of(ROW_ALIGNMENT_BYTES)
}

/// The capacity, in keys, of a sequence with at least `keys` keys.
pub fn capacity(keys: usize) -> usize {
    keys.next_multiple_of(KEY_PADDING)
}

/// Bytes of the integers of all sequences.
pub fn values_bytes(shape: &KeyShape, capacity: usize) -> usize {
    shape.sequences * shape.kv_heads * capacity * row_bytes(shape.head_dim)
}

/// Bytes of the bounds of all sequences.
pub fn bounds_bytes(shape: &KeyShape, capacity: usize) -> usize {
    shape.sequences * shape.kv_heads * capacity * BOUNDS_BYTES
}

/// The buffers of quantised keys.
#[derive(Debug)]
pub struct Int8Slices<'a, B> {
    /// The integers, [`values_bytes`].
    pub values: Slice<'a, B>,
    /// Scale, error, norm and bias, [`bounds_bytes`].
    pub bounds: Slice<'a, B>,
    /// Keys of a sequence for which there is memory: a multiple of 64.
    pub capacity: usize,
}

impl<B> Clone for Int8Slices<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Int8Slices<'_, B> {}

/// Quantises k `[sequences, Hk, keys, D]` into rows `first..first + keys` of every sequence of `to`.
///
/// # Errors
/// Rows beyond the capacity, a device, dtype or head dimension without kernels, and errors of the launch.
pub fn quantize<G: Gpu>(
    gpu: &G,
    shape: &KeyShape,
    k: &Tensor4<'_, G::Buffer>,
    keys: usize,
    first: usize,
    to: &Int8Slices<'_, G::Buffer>,
) -> Result<()> {
    let KeyShape { sequences, kv_heads, head_dim, dtype, score } = *shape;
    require_compute("quantise", &gpu.arch())?;
    if gpu.arch().is_metal() {
        return Err(Error::Unsupported("8-bit keys on Metal; they run on the CPU and on CUDA".into()));
    }
    padded_dim("quantise", head_dim)?;
    if first + keys > to.capacity || !to.capacity.is_multiple_of(KEY_PADDING) {
        return Err(Error::Invalid(format!(
            "8-bit keys {first}..{} of sequences of {} keys, which must be a multiple of {KEY_PADDING}",
            first + keys,
            to.capacity
        )));
    }
    let [k_batch, k_head, k_row] = k.checked("k", [sequences, kv_heads, keys, head_dim])?;
    elements("8-bit keys", (sequences * kv_heads) as u128 * to.capacity as u128)?;
    let params = QuantizeParams {
        sequences: sequences as u32,
        kv_heads: kv_heads as u32,
        keys: keys as u32,
        head_dim: head_dim as u32,
        k_batch,
        k_head,
        k_row,
        first: first as u32,
        capacity: to.capacity as u32,
        width: row_bytes(head_dim) as u32,
        score: ScoreCode::from(score) as u32,
    };
    let count = sequences as u128 * kv_heads as u128 * keys as u128;
    gpu.launch(&Launch {
        kernel: Variant::new("quantise", dtype, &gpu.arch())?.kernel(KernelOp::Quantize),
        grid: grid("quantise", count.div_ceil(WARPS as u128))?,
        block: 32 * WARPS as u32,
        shared_bytes: 0,
        params: bytes_of(&params).to_vec(),
        constants: Constants::default(),
        buffers: vec![Some(k.data), Some(to.values), Some(to.bounds)],
    })
}

/// Quantises k `[R, Hk, keys, D]`, entry `r` into sequence `at[r][0]` from row `at[r][1]` on. Entries for consecutive
/// sequences from the same row on share a launch.
///
/// # Errors
/// Those of [`quantize`], and a sequence that does not exist.
pub fn quantize_at<G: Gpu>(
    gpu: &G,
    shape: &KeyShape,
    k: &Tensor4<'_, G::Buffer>,
    keys: usize,
    at: &[WritePosition],
    to: &Int8Slices<'_, G::Buffer>,
) -> Result<()> {
    let mut entry = 0;
    while let Some(&[sequence, first]) = at.get(entry) {
        let consecutive =
            at[entry..].iter().enumerate().take_while(|(i, position)| **position == [sequence + i, first]);
        let sequences = consecutive.count();
        if sequence + sequences > shape.sequences {
            return Err(Error::Invalid(format!(
                "8-bit keys for sequence {} of {}",
                sequence + sequences - 1,
                shape.sequences
            )));
        }
        let one = KeyShape { sequences: 1, ..*shape };
        let offset = entry * k.strides[0] * shape.dtype.size_in_bytes();
        let rows = Tensor4 { data: offset_by(k.data, offset), strides: k.strides };
        let to = Int8Slices {
            values: offset_by(to.values, sequence * values_bytes(&one, to.capacity)),
            bounds: offset_by(to.bounds, sequence * bounds_bytes(&one, to.capacity)),
            capacity: to.capacity,
        };
        quantize(gpu, &KeyShape { sequences, ..*shape }, &rows, keys, first, &to)?;
        entry += sequences;
    }
    Ok(())
}

/// The slice that starts `bytes` bytes later.
fn offset_by<B>(slice: Slice<'_, B>, bytes: usize) -> Slice<'_, B> {
    Slice { offset: slice.offset + bytes, ..slice }
}
