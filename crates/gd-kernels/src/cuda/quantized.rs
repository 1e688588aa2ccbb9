//! Keys as 8-bit integers on a CUDA device, which grow as a cache does.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::Cuda;
use super::buffer::{Buffer, Rows};
use crate::error::Result;
use crate::gpu::quantize::{Quantized, Shape, quantize, room, width};
use crate::gpu::{Slice, Tensor4};

/// The keys of all heads. Clones share their memory until one of them grows.
#[derive(Debug, Clone)]
pub(crate) struct Codes {
    shape: Shape,
    len: usize,
    room: usize,
    memory: Arc<Memory>,
}

/// codes u8 `[pieces, Hk, room, width]` and known f32 `[pieces, Hk, room, 4]`.
#[derive(Debug)]
struct Memory {
    codes: Buffer,
    known: Buffer,
}

impl Memory {
    /// Room of which the first `keys` keys are those of `from`.
    fn new(shape: &Shape, room: usize, device: &Device, from: Option<&Self>, keys: usize) -> Result<Self> {
        let Shape { pieces, kv_heads, head_dim, .. } = *shape;
        let part = |from: Option<&Buffer>, dtype: DType, row: usize| -> Result<Buffer> {
            let new = Tensor::zeros((pieces, kv_heads, room, row), dtype, device)?;
            if let Some(Buffer::Tensor(old)) = from {
                new.slice_set(&old.narrow(2, 0, keys)?.contiguous()?, 2, 0)?;
            }
            Ok(Buffer::Tensor(new))
        };
        Ok(Self {
            codes: part(from.map(|m| &m.codes), DType::U8, width(head_dim))?,
            known: part(from.map(|m| &m.known), DType::F32, 4)?,
        })
    }
}

impl Codes {
    /// No keys yet, and room for `keys`.
    pub(crate) fn new(shape: Shape, keys: usize, device: &Device) -> Result<Self> {
        let room = room(keys);
        let memory = Arc::new(Memory::new(&shape, room, device, None, 0)?);
        Ok(Self { shape, len: 0, room, memory })
    }

    /// Keys held per head.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Appends k `[pieces, Hk, m, D]`.
    pub(crate) fn append(&mut self, k: &Tensor) -> Result<()> {
        let device = Cuda::new(k.device())?;
        let more = k.dim(2)?;
        // What a clone shares is not written to.
        if self.len + more > self.room || Arc::get_mut(&mut self.memory).is_none() {
            let room = match self.len + more {
                needed if needed > self.room => room(needed.max(2 * self.len)),
                _ => self.room,
            };
            let grown = Memory::new(&self.shape, room, k.device(), Some(&self.memory), self.len)?;
            (self.memory, self.room) = (Arc::new(grown), room);
        }
        self.enter(&device, &Rows::new(k)?.tensor4(), more)
    }

    /// Appends k `[pieces, Hk, more, D]`, for which there is room that nobody shares.
    pub(super) fn enter(&mut self, device: &Cuda, k: &Tensor4<'_, Buffer>, more: usize) -> Result<()> {
        quantize(device, &self.shape, k, more, self.len, &self.slices())?;
        self.len += more;
        Ok(())
    }

    /// As the kernels read them.
    pub(crate) fn slices(&self) -> Quantized<'_, Buffer> {
        let whole = |buffer| Slice { buffer, offset: 0 };
        Quantized { codes: whole(&self.memory.codes), known: whole(&self.memory.known), room: self.room }
    }

    pub(crate) fn score(&self) -> crate::Score {
        self.shape.score
    }
}
