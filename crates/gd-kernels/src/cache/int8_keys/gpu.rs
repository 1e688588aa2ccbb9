//! 8-bit keys on a GPU, as tensors that grow with the cache.

use candle_core::{DType, Device, Tensor};

use crate::backend::dispatch::on_gpu;
use crate::backend::gpu::Tensor4;
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::cache::append_buffer::AppendBuffer;
use crate::cache::int8_keys::Int8Keys;
use crate::cache::int8_keys::launch::{Int8Slices, capacity, quantize_at, row_bytes};
use crate::cache::key_shape::KeyShape;
use crate::cache::position::{WritePosition, ends};
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};

/// The quantised keys of all heads, one row per key.
#[derive(Debug, Clone)]
pub(crate) struct Int8Rows {
    shape: KeyShape,
    /// u8 `[sequences, Hk, capacity, row_bytes]`.
    values: AppendBuffer,
    /// Scale, error, norm and bias of every key, f32 `[sequences, Hk, capacity, 4]`.
    bounds: AppendBuffer,
}

/// The buffers of [`Int8Rows`] for the time of a launch.
pub(crate) struct Int8Buffers<B> {
    values: Vector<B>,
    bounds: Vector<B>,
    capacity: usize,
}

impl<B: From<Tensor>> Int8Buffers<B> {
    pub(crate) fn slices(&self) -> Int8Slices<'_, B> {
        Int8Slices { values: self.values.slice(), bounds: self.bounds.slice(), capacity: self.capacity }
    }
}

impl Int8Rows {
    /// No keys yet, with memory for `keys` keys per sequence.
    pub(crate) fn new(shape: KeyShape, keys: usize, device: &Device) -> Result<Self> {
        let KeyShape { sequences, kv_heads, head_dim, .. } = shape;
        let buffer =
            |dtype, row| AppendBuffer::new(&[sequences, kv_heads, capacity(keys), row], dtype, device);
        Ok(Self { shape, values: buffer(DType::U8, row_bytes(head_dim))?, bounds: buffer(DType::F32, 4)? })
    }

    /// Keys of every sequence.
    pub(crate) fn lengths(&self) -> &[usize] {
        self.values.lengths()
    }

    /// Quantises k `[R, Hk, m, D]` at these positions, which have been checked.
    pub(crate) fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        on_gpu!(k.device(), G => self.write_rows(&G::of(k.device())?, &Rows::new(k)?.tensor4(), k.dim(2)?, at));
        Err(Error::Invalid(format!("8-bit keys on a GPU cannot take keys on {:?}", k.device().location())))
    }

    fn write_rows<G: TensorGpu>(
        &mut self,
        gpu: &G,
        k: &Tensor4<'_, G::Buffer>,
        keys: usize,
        at: &[WritePosition],
    ) -> Result<()> {
        self.values.reserve(at, keys)?;
        self.bounds.reserve(at, keys)?;
        quantize_at(gpu, &self.shape, k, keys, at, &self.buffers().slices())
    }

    /// Some of the sequences.
    pub(crate) fn select(&self, sequences: &[usize]) -> Result<Self> {
        let shape = KeyShape { sequences: sequences.len(), ..self.shape };
        Ok(Self { shape, values: self.values.select(sequences)?, bounds: self.bounds.select(sequences)? })
    }

    /// The sequences of several caches of the same heads, dimension, dtype and score.
    pub(crate) fn stack(caches: &[&Self]) -> Result<Self> {
        let Some(first) = caches.first() else {
            return Err(Error::Invalid("no 8-bit keys to stack".into()));
        };
        let stack = |of: fn(&Self) -> &AppendBuffer| {
            AppendBuffer::stack(&caches.iter().map(|cache| of(cache)).collect::<Vec<_>>())
        };
        let (values, bounds) = (stack(|cache| &cache.values)?, stack(|cache| &cache.bounds)?);
        let shape = KeyShape { sequences: values.lengths().len(), ..first.shape };
        Ok(Self { shape, values, bounds })
    }

    /// The buffers that kernels read.
    pub(crate) fn buffers<B: From<Tensor>>(&self) -> Int8Buffers<B> {
        let whole = |t: &AppendBuffer| Vector::strided(t.buffer().clone());
        Int8Buffers {
            values: whole(&self.values),
            bounds: whole(&self.bounds),
            capacity: self.values.capacity(),
        }
    }

    /// The buffers of the 8-bit form of k `[sequences, Hk, keys, D]`: of `cached`, or of k quantised now.
    pub(crate) fn of<G: TensorGpu>(
        gpu: &G,
        device: &Device,
        (shape, keys): (KeyShape, usize),
        k: &Tensor4<'_, G::Buffer>,
        cached: Option<&Int8Keys>,
    ) -> Result<Int8Buffers<G::Buffer>> {
        if let Some(cached) = cached {
            return Ok(cached.rows(&shape, keys)?.buffers());
        }
        let mut new = Self::new(shape, keys, device)?;
        let at = ends(new.lengths());
        new.write_rows(gpu, k, keys, &at)?;
        Ok(new.buffers())
    }
}
