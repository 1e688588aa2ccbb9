//! The biases of cached keys, which decoding on a GPU adds to the products of queries and keys.

#[cfg(feature = "gpu")]
pub(crate) mod launch;

use candle_core::{DType, Tensor};

use crate::backend::dispatch::on_gpu;
use crate::cache::append_buffer::AppendBuffer;
use crate::cache::key_shape::KeyShape;
use crate::cache::position::WritePosition;
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};
use crate::options::Score;

/// How errors name this cache.
const NAME: &str = "key biases";

/// Rows of key biases, and of 8-bit keys, are padded to a multiple of this many keys.
pub(crate) const KEY_PADDING: usize = 64;

/// The length of a padded row of biases for `keys` keys.
pub(crate) fn bias_row(keys: usize) -> usize {
    keys.next_multiple_of(KEY_PADDING)
}

/// The biases `-|k|^2 / 2` (0 for the dot-product score) of the keys `[B, Hk, M, D]` of a KV cache on a GPU: 4 bytes
/// per key. A decoding step that is given them reads the keys once instead of twice.
///
/// The sequences are batch entries, or the pages `[pages, Hk, page, D]` of a [`PagedCache`](crate::PagedCache).
#[derive(Debug, Clone)]
pub struct KeyBias {
    /// f32 `[sequences, Hk, capacity]`, the capacity a multiple of [`KEY_PADDING`].
    bias: AppendBuffer,
    shape: KeyShape,
}

impl KeyBias {
    /// The biases of k `[B, Hk, M, D]` for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank, a dtype without kernels, or a tensor on the CPU.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        let mut new = Self::like(k, score)?;
        new.append(k)?;
        Ok(new)
    }

    /// An empty cache with the batch (or pages), heads, head dimension, dtype and device of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// A tensor of another rank.
    pub fn like(k: &Tensor, score: Score) -> Result<Self> {
        let shape = KeyShape::of(k, score)?;
        let dims = [shape.sequences, shape.kv_heads, bias_row(k.dim(2)?)];
        Ok(Self { bias: AppendBuffer::new(&dims, DType::F32, k.device())?, shape })
    }

    /// The biases, f32 `[sequences, Hk, capacity]`; refuses keys of another shape than `keys` with `count` keys per head.
    #[cfg(feature = "gpu")]
    pub(crate) fn tensor(&self, keys: &KeyShape, count: usize) -> Result<&Tensor> {
        self.shape.check_keys(NAME, self.longest(), keys, count)?;
        Ok(self.bias.buffer())
    }
}

impl SequenceCache for KeyBias {
    fn lengths(&self) -> &[usize] {
        self.bias.lengths()
    }

    fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        let rows = self.shape.check_write(NAME, k, at, self.lengths())?;
        let new = biases(k, self.shape.score)?;
        self.bias.write(&new.narrow(2, 0, rows)?, at)
    }

    fn select(&self, sequences: &[usize]) -> Result<Self> {
        let shape = KeyShape { sequences: sequences.len(), ..self.shape };
        Ok(Self { bias: self.bias.select(sequences)?, shape })
    }

    fn stack(caches: &[&Self]) -> Result<Self> {
        let shape = KeyShape::stacked(NAME, caches.iter().map(|cache| cache.shape))?;
        let bias = AppendBuffer::stack(&caches.iter().map(|cache| &cache.bias).collect::<Vec<_>>())?;
        Ok(Self { bias, shape })
    }
}

/// The biases of k `[B, Hk, M, D]`: f32 `[B, Hk, bias_row(M)]`.
fn biases(k: &Tensor, score: Score) -> Result<Tensor> {
    on_gpu!(k.device(), G => launch::of_tensor::<G>(k, score));
    Err(Error::Unsupported(format!(
        "{NAME} for the {score:?} score of keys on {:?}; they are used on a GPU",
        k.device().location()
    )))
}
