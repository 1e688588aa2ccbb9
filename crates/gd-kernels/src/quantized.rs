//! Keys kept as 8-bit integers beside a KV cache, for certified scans.

use candle_core::{DType, Tensor};

use crate::by_float;
use crate::cpu::filter::Filter;
use crate::cpu::view::with_view;
use crate::error::{Error, Result};
use crate::fused::with_contiguous_rows;
use crate::gpu::on_cpu;
#[cfg(feature = "gpu")]
use crate::gpu::tensors::quantized::Codes;
use crate::options::Score;
use crate::plan::{Problem, require_device};
use crate::scan::dims4;

/// The keys `[B, Hk, M, D]` of a cache as integers with scales and error bounds: D + 16 bytes a key.
/// A certified scan that is given them reads the keys themselves only where the bounds cannot decide,
/// and its result is that of the native scan.
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
        let (b, h, _keys, d) = dims4("k", k)?;
        if d > crate::plan::MAX_HEAD_DIM {
            return Err(Error::Unsupported(format!("head_dim {d}; at most {}", crate::plan::MAX_HEAD_DIM)));
        }
        require_device("quantised keys", k.device())?;
        let held = match on_cpu(k.device()) {
            true => Held::Cpu(Filter::new(b * h, d, score)),
            #[cfg(feature = "gpu")]
            false => {
                let (pieces, kv_heads, head_dim, dtype) = (b, h, d, k.dtype());
                let shape = crate::gpu::quantize::Shape { pieces, kv_heads, head_dim, dtype, score };
                Held::Gpu(Codes::new(shape, _keys, k.device())?)
            }
            #[cfg(not(feature = "gpu"))]
            false => unreachable!("a device without kernels was refused"),
        };
        let mut new = Self { held, shape: [b, h, d], dtype: k.dtype() };
        new.append(k)?;
        Ok(new)
    }

    /// Appends k `[B, Hk, m, D]`.
    ///
    /// # Errors
    /// Another batch, number of heads, head_dim or dtype.
    pub fn append(&mut self, k: &Tensor) -> Result<()> {
        let (b, h, _, d) = dims4("k", k)?;
        require_device("quantised keys", k.device())?;
        if [b, h, d] != self.shape || k.dtype() != self.dtype || k.dtype() == DType::F64 {
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
        let k = with_contiguous_rows(&k.detach())?;
        match &mut self.held {
            Held::Cpu(filter) => by_float!("quantised keys", k.dtype(), T => with_view::<T, _>(&k, |k| {
                filter.append(k);
                Ok(())
            })),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => codes.append(&k),
        }
    }

    /// Keys held per head.
    pub fn len(&self) -> usize {
        match &self.held {
            Held::Cpu(filter) => filter.len(),
            #[cfg(feature = "gpu")]
            Held::Gpu(codes) => codes.len(),
        }
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
        let fits = self.shape == [batch, kv_heads, head_dim] && self.len() == keys;
        if !fits || self.dtype != problem.dtype || self.score() != problem.score {
            return Err(Error::Invalid(format!(
                "quantised keys [{}, {}, {}, {}] of {:?} for the {:?} score do not belong to keys [{batch}, \
                 {kv_heads}, {keys}, {head_dim}] of {:?} and the {:?} score",
                self.shape[0],
                self.shape[1],
                self.len(),
                self.shape[2],
                self.dtype,
                self.score(),
                problem.dtype,
                problem.score
            )));
        }
        Ok(())
    }
}
