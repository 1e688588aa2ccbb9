//! Keys quantised to 8 bits beside a KV cache, for scans at certified precision.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
#[cfg(feature = "gpu")]
pub mod launch;

use candle_core::{DType, Tensor};

use crate::backend::cpu::element::by_float;
use crate::backend::cpu::view::with_view;
use crate::backend::dispatch::on_cpu;
use crate::backend::graph::with_contiguous_rows;
use crate::backend::support::{MAX_HEAD_DIM, require_device};
use crate::cache::int8_keys::cpu::Int8Panels;
#[cfg(feature = "gpu")]
use crate::cache::int8_keys::gpu::Int8Rows;
use crate::cache::key_shape::KeyShape;
use crate::cache::position::{WritePosition, selected};
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};
use crate::options::Score;

/// How errors name this cache.
const NAME: &str = "quantised keys";

/// The keys `[B, Hk, M, D]` of a KV cache as 8-bit integers with scales and error bounds: `D + 16` bytes per key.
///
/// A certified scan that is given them reads the original keys only where the bounds do not decide, and its result
/// equals that of the native scan. The sequences are batch entries, or the pages `[pages, Hk, page, D]` of a
/// [`PagedCache`](crate::PagedCache); a scan reads the keys that its mask makes visible.
#[derive(Debug, Clone)]
pub struct Int8Keys {
    storage: Storage,
    shape: KeyShape,
}

/// The integers in the layout of their device.
#[derive(Debug, Clone)]
enum Storage {
    Cpu(Int8Panels),
    #[cfg(feature = "gpu")]
    Gpu(Int8Rows),
}

impl Int8Keys {
    /// Quantises k `[B, Hk, M, D]` in f32, f16 or bf16 for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank or dtype, a head dimension above 1024, or a device without kernels.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        let mut new = Self::like(k, score)?;
        new.append(k)?;
        Ok(new)
    }

    /// An empty cache with the batch (or pages), heads, head dimension, dtype and device of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// As [`Int8Keys::new`].
    pub fn like(k: &Tensor, score: Score) -> Result<Self> {
        let shape = KeyShape::of(k, score)?;
        if shape.head_dim > MAX_HEAD_DIM {
            return Err(Error::Unsupported(format!("head_dim {}; at most {MAX_HEAD_DIM}", shape.head_dim)));
        }
        require_device(NAME, k.device())?;
        let storage = match on_cpu(k.device()) {
            true => Storage::Cpu(Int8Panels::new(shape.sequences, shape.kv_heads, shape.head_dim, score)),
            #[cfg(feature = "gpu")]
            false => Storage::Gpu(Int8Rows::new(shape, k.dim(2)?, k.device())?),
            #[cfg(not(feature = "gpu"))]
            false => unreachable!("a device without kernels was refused"),
        };
        Ok(Self { storage, shape })
    }

    /// Keys of the longest sequence, per head.
    pub fn len(&self) -> usize {
        self.longest()
    }

    /// Whether no key is stored.
    pub fn is_empty(&self) -> bool {
        self.longest() == 0
    }

    /// On the CPU: the keys of a block table's pages as sequences `[B, Hk, row * page, D]`. Refuses other keys than
    /// those of the pages k `[pages, Hk, page, D]`.
    pub(crate) fn gather_pages(&self, k: &Tensor, score: Score, table: &[Vec<u32>]) -> Result<Self> {
        let page = k.dim(2)?;
        self.shape.check_keys(NAME, self.longest(), &KeyShape::of(k, score)?, page)?;
        let panels = self.cpu_panels()?.gather_pages(table, page);
        Ok(Self { storage: Storage::Cpu(panels), shape: KeyShape { sequences: table.len(), ..self.shape } })
    }

    /// The integers on the CPU; refuses keys of another shape than `keys` with `count` keys per head.
    pub(crate) fn panels(&self, keys: &KeyShape, count: usize) -> Result<&Int8Panels> {
        self.shape.check_keys(NAME, self.longest(), keys, count)?;
        self.cpu_panels()
    }

    fn cpu_panels(&self) -> Result<&Int8Panels> {
        match &self.storage {
            Storage::Cpu(panels) => Ok(panels),
            #[cfg(feature = "gpu")]
            Storage::Gpu(_) => Err(Error::Invalid("quantised keys on a GPU for keys on the CPU".into())),
        }
    }

    /// The integers on a GPU; refuses keys of another shape than `keys` with `count` keys per head.
    #[cfg(feature = "gpu")]
    pub(crate) fn rows(&self, keys: &KeyShape, count: usize) -> Result<&Int8Rows> {
        self.shape.check_keys(NAME, self.longest(), keys, count)?;
        match &self.storage {
            Storage::Gpu(rows) => Ok(rows),
            Storage::Cpu(_) => Err(Error::Invalid("quantised keys on the CPU for keys on a GPU".into())),
        }
    }
}

impl SequenceCache for Int8Keys {
    fn lengths(&self) -> &[usize] {
        match &self.storage {
            Storage::Cpu(panels) => panels.lengths(),
            #[cfg(feature = "gpu")]
            Storage::Gpu(rows) => rows.lengths(),
        }
    }

    fn write(&mut self, k: &Tensor, at: &[WritePosition]) -> Result<()> {
        require_device(NAME, k.device())?;
        if k.dtype() == DType::F64 {
            return Err(Error::Unsupported(format!("{NAME} of F64; f32, f16 and bf16 are supported")));
        }
        self.shape.check_write(NAME, k, at, self.lengths())?;
        let k = with_contiguous_rows(&k.detach())?;
        match &mut self.storage {
            Storage::Cpu(panels) => by_float!(NAME, k.dtype(), T => with_view::<T, _>(&k, |k| {
                panels.write(k, at);
                Ok(())
            })),
            #[cfg(feature = "gpu")]
            Storage::Gpu(rows) => rows.write(&k, at),
        }
    }

    fn select(&self, sequences: &[usize]) -> Result<Self> {
        selected(self.lengths(), sequences)?;
        let storage = match &self.storage {
            Storage::Cpu(panels) => Storage::Cpu(panels.select(sequences)),
            #[cfg(feature = "gpu")]
            Storage::Gpu(rows) => Storage::Gpu(rows.select(sequences)?),
        };
        Ok(Self { storage, shape: KeyShape { sequences: sequences.len(), ..self.shape } })
    }

    fn stack(caches: &[&Self]) -> Result<Self> {
        let shape = KeyShape::stacked(NAME, caches.iter().map(|cache| cache.shape))?;
        let panels: Vec<&Int8Panels> = caches.iter().filter_map(|cache| cache.cpu_panels().ok()).collect();
        let storage = match Int8Panels::stack(&panels) {
            Some(stacked) if panels.len() == caches.len() => Storage::Cpu(stacked),
            #[cfg(feature = "gpu")]
            None => {
                let rows = caches.iter().filter_map(|cache| match &cache.storage {
                    Storage::Gpu(rows) => Some(rows),
                    Storage::Cpu(_) => None,
                });
                Storage::Gpu(Int8Rows::stack(&rows.collect::<Vec<_>>())?)
            }
            _ => {
                return Err(Error::Invalid(format!("{NAME} on the CPU and on a GPU cannot be stacked")));
            }
        };
        Ok(Self { storage, shape })
    }
}
