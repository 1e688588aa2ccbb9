//! Keys kept as 8-bit integers beside a KV cache, for certified scans.

pub(crate) mod cpu;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
#[cfg(feature = "gpu")]
pub mod launch;

use candle_core::{DType, Tensor};

use crate::backend::check::dims4;
use crate::backend::cpu::view::with_view;
use crate::backend::dispatch::on_cpu;
use crate::backend::graph::with_contiguous_rows;
use crate::backend::support::require_device;
use crate::by_float;
use crate::cache::append_buffer::{Place, check_places, ends, selected};
use crate::cache::int8_keys::cpu::Filter;
#[cfg(feature = "gpu")]
use crate::cache::int8_keys::gpu::Codes;
use crate::error::{Error, Result};
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// The keys `[B, Hk, M, D]` of a cache as integers with scales and error bounds: D + 16 bytes a key.
/// A certified scan that is given them reads the keys themselves only where the bounds cannot decide,
/// and its result is that of the native scan.
///
/// Batch entries, or the pages `[pages, Hk, page, D]` of a [`PagedCache`](crate::PagedCache), may have different
/// numbers of keys; a scan sees no more of them than its mask shows. Clones share their memory until one of them is
/// written to.
#[derive(Debug, Clone)]
pub struct QuantizedKeys {
    held: Held,
    shape: [usize; 3],
    dtype: DType,
}

/// The integers in the order in which a device reads them.
#[derive(Debug, Clone)]
enum Held {
    Cpu(Filter),
    #[cfg(feature = "gpu")]
    Gpu(Codes),
}

impl QuantizedKeys {
    /// Quantises k `[B, Hk, M, D]` in f32, f16 or bf16 for scans with this score.
    ///
    /// # Errors
    /// A tensor of another rank, dtype or device.
    pub fn new(k: &Tensor, score: Score) -> Result<Self> {
        let mut new = Self::like(k, score)?;
        new.append(k)?;
        Ok(new)
    }

    /// No keys yet, for batch entries (or pages), heads, head_dim, dtype and device as those of k `[B, Hk, M, D]`.
    ///
    /// # Errors
    /// A tensor of another rank, dtype or device.
    pub fn like(k: &Tensor, score: Score) -> Result<Self> {
        let (b, h, _keys, d) = dims4("k", k)?;
        if d > crate::backend::support::MAX_HEAD_DIM {
            return Err(Error::Unsupported(format!(
                "head_dim {d}; at most {}",
                crate::backend::support::MAX_HEAD_DIM
            )));
        }
        require_device("quantised keys", k.device())?;
        let held = match on_cpu(k.device()) {
            true => Held::Cpu(Filter::new(b, h, d, score)),
            #[cfg(feature = "gpu")]
            false => {
                let (pieces, kv_heads, head_dim, dtype) = (b, h, d, k.dtype());
                let shape =
                    crate::cache::int8_keys::launch::Shape { pieces, kv_heads, head_dim, dtype, score };
                Held::Gpu(Codes::new(shape, _keys, k.device())?)
            }
            #[cfg(not(feature = "gpu"))]
            false => unreachable!("a device without kernels was refused"),
        };
        Ok(Self { held, shape: [b, h, d], dtype: k.dtype() })
    }

    /// Appends k `[B, Hk, m, D]`, to every batch entry behind its own last key.
    ///
    /// # Errors
    /// Another batch, number of heads, head_dim or dtype.
    pub fn append(&mut self, k: &Tensor) -> Result<()> {
        self.write(k, &ends(self.lengths()))
    }

    /// Writes k `[R, Hk, m, D]`, its entry r over the keys of batch entry (or page) `at[r][0]` from key `at[r][1]` on,
    /// or behind them.
    ///
    /// # Errors
    /// Another number of heads, head_dim or dtype; places that are not one for every entry of k, that are not there,
    /// leave keys unwritten before them, or name one batch entry twice.
    pub fn write(&mut self, k: &Tensor, at: &[Place]) -> Result<()> {
        let (entries, h, more, d) = dims4("k", k)?;
        require_device("quantised keys", k.device())?;
        if [h, d] != self.shape[1..] || k.dtype() != self.dtype || k.dtype() == DType::F64 {
            return Err(Error::Invalid(format!(
                "k {:?} of {:?} does not continue quantised keys of batch {}, heads {}, head_dim {} and {:?}",
                k.dims(),
                k.dtype(),
                self.shape[0],
                self.shape[1],
                self.shape[2],
                self.dtype
            )));
        }
        check_places(at, entries, more, self.lengths())?;
        let k = with_contiguous_rows(&k.detach())?;
        match &mut self.held {
            Held::Cpu(filter) => by_float!("quantised keys", k.dtype(), T => with_view::<T, _>(&k, |k| {
                filter.write(k, at);
                Ok(())
            })),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => codes.write(&k, at),
        }
    }

    /// Some of the batch entries, in any order.
    ///
    /// # Errors
    /// One that is not there.
    pub fn select(&self, entries: &[usize]) -> Result<Self> {
        selected(self.lengths(), entries)?;
        let held = match &self.held {
            Held::Cpu(filter) => Held::Cpu(filter.select(entries)),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => Held::Gpu(codes.select(entries)?),
        };
        Ok(Self { held, shape: [entries.len(), self.shape[1], self.shape[2]], dtype: self.dtype })
    }

    /// The batch entries of several, in their order.
    ///
    /// # Errors
    /// None to stack, or keys of other heads, dimensions, dtypes, scores or devices than the first.
    pub fn stack(all: &[&Self]) -> Result<Self> {
        let Some(first) = all.first() else {
            return Err(Error::Invalid("no quantised keys to stack".into()));
        };
        let kind = |one: &Self| (one.shape[1], one.shape[2], one.dtype, one.score());
        if let Some(other) = all.iter().find(|one| kind(one) != kind(first)) {
            return Err(Error::Invalid(format!(
                "quantised keys of (heads, head_dim, dtype, score) {:?} and {:?} are not of one cache",
                kind(first),
                kind(other)
            )));
        }
        let filters: Vec<&Filter> = all.iter().filter_map(|one| one.on_cpu()).collect();
        let held = match Filter::stack(&filters) {
            Some(filter) if filters.len() == all.len() => Held::Cpu(filter),
            #[cfg(feature = "gpu")]
            None => {
                let codes = all.iter().filter_map(|one| match &one.held {
                    Held::Gpu(codes) => Some(codes),
                    Held::Cpu(_) => None,
                });
                Held::Gpu(Codes::stack(&codes.collect::<Vec<_>>())?)
            }
            _ => {
                return Err(Error::Invalid(
                    "quantised keys on the CPU and on a GPU are not of one cache".into(),
                ));
            }
        };
        let batch = all.iter().map(|one| one.shape[0]).sum();
        Ok(Self { held, shape: [batch, first.shape[1], first.shape[2]], dtype: first.dtype })
    }

    /// The integers, if they are on the CPU.
    fn on_cpu(&self) -> Option<&Filter> {
        match &self.held {
            Held::Cpu(filter) => Some(filter),
            #[cfg(feature = "gpu")]
            Held::Gpu(_) => None,
        }
    }

    /// Keys of every batch entry.
    pub fn lengths(&self) -> &[usize] {
        match &self.held {
            Held::Cpu(filter) => filter.lengths(),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => codes.lengths(),
        }
    }

    /// Keys per head of the batch entry that has the most.
    pub fn len(&self) -> usize {
        self.lengths().iter().copied().max().unwrap_or(0)
    }

    /// The score whose biases are held.
    fn score(&self) -> Score {
        match &self.held {
            Held::Cpu(filter) => filter.score(),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => codes.score(),
        }
    }

    /// Whether no key is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// On the CPU: the keys of a table's pages together, as sequences `[B, Hk, row * page, D]`, if these are those of
    /// the pages k `[pages, Hk, page, D]`.
    pub(crate) fn of_pages(&self, k: &Tensor, score: Score, table: &[Vec<u32>]) -> Result<Self> {
        let (pages, h, page, d) = dims4("k", k)?;
        self.belongs([pages, h, page, d], k.dtype(), score)?;
        match &self.held {
            Held::Cpu(filter) => Ok(Self {
                held: Held::Cpu(filter.gathered(table, page)),
                shape: [table.len(), h, d],
                ..*self
            }),
            #[cfg(feature = "gpu")]
            Held::Gpu(_) => Err(Error::Invalid("quantised keys on a GPU for pages on the CPU".into())),
        }
    }

    /// The integers on the CPU, if they are those of a problem's keys.
    pub(crate) fn filter(&self, problem: &Problem) -> Result<&Filter> {
        self.check(problem)?;
        match &self.held {
            Held::Cpu(filter) => Ok(filter),
            #[cfg(feature = "gpu")]
            Held::Gpu(_) => Err(Error::Invalid("quantised keys on a GPU for keys on the CPU".into())),
        }
    }

    /// The integers on a GPU, if they are those of a problem's keys.
    #[cfg(feature = "gpu")]
    pub(crate) fn codes(&self, problem: &Problem) -> Result<&Codes> {
        self.check(problem)?;
        match &self.held {
            Held::Gpu(codes) => Ok(codes),
            Held::Cpu(_) => Err(Error::Invalid("quantised keys on the CPU for keys on a GPU".into())),
        }
    }

    fn check(&self, problem: &Problem) -> Result<()> {
        let Problem { batch, kv_heads, keys, head_dim, .. } = *problem;
        self.belongs([batch, kv_heads, keys, head_dim], problem.dtype, problem.score)
    }

    /// Refuses other keys than those of this shape, dtype and score.
    fn belongs(&self, keys: [usize; 4], dtype: DType, score: Score) -> Result<()> {
        let own = [self.shape[0], self.shape[1], self.len(), self.shape[2]];
        if (own, self.dtype, self.score()) != (keys, dtype, score) {
            return Err(Error::Invalid(format!(
                "quantised keys {own:?} of {:?} for the {:?} score do not belong to keys {keys:?} of {dtype:?} and \
                 the {score:?} score",
                self.dtype,
                self.score(),
            )));
        }
        Ok(())
    }
}
