//! Keys as 8-bit integers on a GPU, which grow as a cache does.

use candle_core::{DType, Device, Tensor};

use crate::backend::dispatch::on_gpu;
use crate::backend::gpu::Tensor4;
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::cache::append_buffer::{Growing, Place, ends};
use crate::cache::int8_keys::QuantizedKeys;
use crate::cache::int8_keys::launch::{Quantized, Shape, quantize_at, room, width};
use crate::error::{Error, Result};
use crate::ops::scan::problem::Problem;

/// The keys of all heads.
#[derive(Debug, Clone)]
pub(crate) struct Codes {
    shape: Shape,
    /// u8 `[pieces, Hk, room, width]`.
    codes: Growing,
    /// f32 `[pieces, Hk, room, 4]`.
    known: Growing,
}

/// The memory as the kernels read it.
pub(crate) struct Lent<B> {
    codes: Vector<B>,
    known: Vector<B>,
    room: usize,
}

impl<B: From<Tensor>> Lent<B> {
    pub(crate) fn slices(&self) -> Quantized<'_, B> {
        Quantized { codes: self.codes.slice(), known: self.known.slice(), room: self.room }
    }
}

impl Codes {
    /// No keys yet, and room for `keys`.
    pub(crate) fn new(shape: Shape, keys: usize, device: &Device) -> Result<Self> {
        let Shape { pieces, kv_heads, head_dim, .. } = shape;
        let part = |dtype, row| Growing::new(&[pieces, kv_heads, room(keys), row], dtype, device);
        Ok(Self { shape, codes: part(DType::U8, width(head_dim))?, known: part(DType::F32, 4)? })
    }

    /// Keys of every piece.
    pub(crate) fn lengths(&self) -> &[usize] {
        self.codes.lengths()
    }

    /// Writes k `[R, Hk, m, D]` to its places.
    pub(crate) fn write(&mut self, k: &Tensor, at: &[Place]) -> Result<()> {
        on_gpu!(k.device(), G => self.enter_at(&G::of(k.device())?, &Rows::new(k)?.tensor4(), k.dim(2)?, at));
        Err(Error::Invalid(format!("8-bit keys on a GPU cannot take keys on {:?}", k.device().location())))
    }

    /// Appends k `[pieces, Hk, more, D]`.
    pub(crate) fn enter<G: TensorGpu>(
        &mut self,
        device: &G,
        k: &Tensor4<'_, G::Buffer>,
        more: usize,
    ) -> Result<()> {
        self.enter_at(device, k, more, &ends(self.lengths()))
    }

    /// Writes k `[R, Hk, keys, D]` to its places.
    fn enter_at<G: TensorGpu>(
        &mut self,
        device: &G,
        k: &Tensor4<'_, G::Buffer>,
        keys: usize,
        at: &[Place],
    ) -> Result<()> {
        self.codes.claim(at, keys)?;
        self.known.claim(at, keys)?;
        quantize_at(device, &self.shape, k, keys, at, &self.lent().slices())
    }

    /// Some of the pieces.
    pub(crate) fn select(&self, pieces: &[usize]) -> Result<Self> {
        let shape = Shape { pieces: pieces.len(), ..self.shape };
        Ok(Self { shape, codes: self.codes.select(pieces)?, known: self.known.select(pieces)? })
    }

    /// The pieces of several for the same heads, dimension, dtype and score.
    pub(crate) fn stack(all: &[&Self]) -> Result<Self> {
        let part =
            |of: fn(&Self) -> &Growing| Growing::stack(&all.iter().map(|one| of(one)).collect::<Vec<_>>());
        let (codes, known) = (part(|one| &one.codes)?, part(|one| &one.known)?);
        let Some(first) = all.first() else { return Err(Error::Invalid("no 8-bit keys to stack".into())) };
        Ok(Self { shape: Shape { pieces: codes.lengths().len(), ..first.shape }, codes, known })
    }

    /// As the kernels read them.
    pub(crate) fn lent<B: From<Tensor>>(&self) -> Lent<B> {
        let whole = |t: &Growing| Vector::strided(t.buffer().clone());
        Lent { codes: whole(&self.codes), known: whole(&self.known), room: self.codes.room() }
    }

    /// The integers of k `[pieces, Hk, M, D]` as the kernels read them: those that the caller keeps, or k's own.
    pub(crate) fn of<G: TensorGpu>(
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
