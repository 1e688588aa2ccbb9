//! Keys as 8-bit integers on a GPU, which grow as a cache does.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{Rows, TensorGpu, Vector};
use crate::error::{Error, Result};
use crate::gpu::quantize::{Quantized, Shape, quantize, room, width};
use crate::gpu::{Tensor4, on_gpu};
use crate::plan::Problem;
use crate::quantized::QuantizedKeys;

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
    codes: Tensor,
    known: Tensor,
}

impl Memory {
    /// Room of which the first `keys` keys are those of `from`.
    fn new(shape: &Shape, room: usize, device: &Device, from: Option<&Self>, keys: usize) -> Result<Self> {
        let Shape { pieces, kv_heads, head_dim, .. } = *shape;
        let part = |from: Option<&Tensor>, dtype: DType, row: usize| -> Result<Tensor> {
            let new = Tensor::zeros((pieces, kv_heads, room, row), dtype, device)?;
            if let Some(old) = from.filter(|_| keys > 0) {
                new.slice_set(&old.narrow(2, 0, keys)?.contiguous()?, 2, 0)?;
            }
            Ok(new)
        };
        Ok(Self {
            codes: part(from.map(|m| &m.codes), DType::U8, width(head_dim))?,
            known: part(from.map(|m| &m.known), DType::F32, 4)?,
        })
    }
}

/// The memory as the kernels read it.
pub(super) struct Lent<B> {
    codes: Vector<B>,
    known: Vector<B>,
    room: usize,
}

impl<B: From<Tensor>> Lent<B> {
    pub(super) fn slices(&self) -> Quantized<'_, B> {
        Quantized { codes: self.codes.slice(), known: self.known.slice(), room: self.room }
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
        on_gpu!(k.device(), G => self.append_on::<G>(k));
        Err(Error::Invalid(format!("8-bit keys on a GPU cannot take keys on {:?}", k.device().location())))
    }

    fn append_on<G: TensorGpu>(&mut self, k: &Tensor) -> Result<()> {
        let device = G::of(k.device())?;
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
    pub(super) fn enter<G: TensorGpu>(
        &mut self,
        device: &G,
        k: &Tensor4<'_, G::Buffer>,
        more: usize,
    ) -> Result<()> {
        quantize(device, &self.shape, k, more, self.len, &self.lent().slices())?;
        self.len += more;
        Ok(())
    }

    /// As the kernels read them.
    pub(super) fn lent<B: From<Tensor>>(&self) -> Lent<B> {
        let whole = |t: &Tensor| Vector::strided(t.clone());
        Lent { codes: whole(&self.memory.codes), known: whole(&self.memory.known), room: self.room }
    }

    /// The integers of k `[pieces, Hk, M, D]` as the kernels read them: those that the caller keeps, or k's own.
    pub(super) fn of<G: TensorGpu>(
        gpu: &G,
        device: &Device,
        piece: &Problem,
        k: &Tensor4<'_, G::Buffer>,
        kept: Option<&QuantizedKeys>,
    ) -> Result<Lent<G::Buffer>> {
        if let Some(kept) = kept {
            return Ok(kept.codes(piece)?.lent());
        }
        let mut codes = Self::new(Shape::of(piece), piece.keys, device)?;
        codes.enter(gpu, k, piece.keys)?;
        Ok(codes.lent())
    }

    pub(crate) fn score(&self) -> crate::Score {
        self.shape.score
    }
}
