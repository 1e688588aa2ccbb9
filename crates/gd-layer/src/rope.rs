//! Rotary position embedding, half-split as in Llama: element `i` of the first half and element `i`
//! of the second turn by the angle `position * theta^(-2i / D)`.
//!
//! x `[B, H, N, D]` of any strides (a transposed `[B, N, H, D]` is read in place), y `[B, H, N, D]`
//! contiguous; row `n` stands at position `offset + n`, with one offset or one for each batch entry. The backward pass is the rotation by the
//! negative angle. Fused: a pass on the CPU, a launch on a GPU.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use gd_kernels::element::{Bf16, Element, F16, Real};
use gd_kernels::fused::{Rows, attach1, for_chunks, rows_per_chunk, vectorize, with_contiguous_rows};
use gd_kernels::on_cpu;

/// How the frequencies of the training were stretched for a longer context.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    None,
    /// All by one factor: position `p` turns as `p / factor` did.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// As in Llama 3.1: wavelengths above `original / low` by the factor, those below `original / high` not at
    /// all, and in between by a share that is linear in the number of turns within the original context.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Turns within the original context, up to which a frequency is divided by the whole factor.
        low: f64,
        /// Turns from which it stays as it is; more than `low`.
        high: f64,
        /// Positions of the original context.
        original: usize,
    },
}

impl RopeScaling {
    /// The frequency (radians a position) that stands for `frequency`.
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low, high, original } => {
                let turns = original as f64 * frequency / std::f64::consts::TAU;
                let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - kept) * frequency / factor + kept * frequency
            }
        }
    }

    fn validate(self) -> Result<()> {
        let (factor, bands) = match self {
            Self::None => return Ok(()),
            Self::Linear { factor } => (factor, true),
            Self::Llama3 { factor, low, high, original } => (factor, low > 0.0 && high > low && original > 0),
        };
        if !(factor.is_finite() && factor > 0.0 && bands) {
            bail!("rotary embedding: {self:?} does not scale by positive factors in rising bands");
        }
        Ok(())
    }
}

/// The angles of all positions.
#[derive(Debug, Clone)]
pub struct Rotary {
    // cos and sin [max_positions, D / 2]: on the CPU as slices, elsewhere as tensors.
    table: Table,
    head_dim: usize,
    max_positions: usize,
}

#[derive(Debug, Clone)]
enum Table {
    F32(Arc<Angles<f32>>),
    F64(Arc<Angles<f64>>),
    Device { cos: Tensor, sin: Tensor },
}

#[derive(Debug)]
struct Angles<R> {
    cos: Vec<R>,
    sin: Vec<R>,
}

impl<R: Real> Angles<R> {
    /// The angles of `positions` positions, from the frequencies.
    fn new(frequencies: &[f64], positions: usize) -> Self {
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        Self {
            cos: angles().map(|a| R::of(a.cos())).collect(),
            sin: angles().map(|a| R::of(a.sin())).collect(),
        }
    }
}

impl Rotary {
    /// Angles for `max_positions` positions and heads of `head_dim` elements, of base `theta`, kept in f32, or in
    /// f64 where `dtype` is.
    ///
    /// # Errors
    /// If `head_dim` is odd or 0, `theta` is not a positive number, or the scaling makes no sense.
    pub fn new(
        head_dim: usize,
        max_positions: usize,
        theta: f64,
        scaling: RopeScaling,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            bail!("rotary embedding: head_dim {head_dim} is not a positive even number");
        }
        if !(theta.is_finite() && theta > 0.0) {
            bail!("rotary embedding: theta {theta} is not a positive number");
        }
        scaling.validate()?;
        let half = head_dim / 2;
        let frequency = |i: usize| scaling.apply(theta.powf(-(i as f64) / half as f64));
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let table = match (on_cpu(device), dtype) {
            (true, DType::F64) => Table::F64(Arc::new(Angles::new(&frequencies, max_positions))),
            (true, _) => Table::F32(Arc::new(Angles::new(&frequencies, max_positions))),
            (false, _) => {
                let angles = Angles::<f32>::new(&frequencies, max_positions);
                let tensor = |v: Vec<f32>| Tensor::from_vec(v, (max_positions, half), device);
                Table::Device { cos: tensor(angles.cos)?, sin: tensor(angles.sin)? }
            }
        };
        Ok(Self { table, head_dim, max_positions })
    }

    /// The number of positions that can be embedded.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Rotates row `n` of every head of `x` `[B, H, N, D]` to position `offset + n`.
    ///
    /// # Errors
    /// If D is not the head dimension, if `offset + N` exceeds the positions, or if `x` is f64 and
    /// the angles were built for less.
    pub fn apply(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        self.apply_each(x, &[offset])
    }

    /// The same with an offset for every batch entry, or one for all.
    ///
    /// # Errors
    /// As [`Rotary::apply`], or offsets that are neither one nor B.
    pub fn apply_each(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        let (b, _, n, d) = x.dims4()?;
        if d != self.head_dim {
            bail!("rotary embedding: x {:?} has head dimension {d} instead of {}", x.dims(), self.head_dim);
        }
        if offsets.len() != 1 && offsets.len() != b {
            bail!("rotary embedding: {} offsets for a batch of {b} (1 or {b} expected)", offsets.len());
        }
        if let Some(offset) = offsets.iter().find(|offset| offset.saturating_add(n) > self.max_positions) {
            bail!(
                "rotary embedding: {n} positions from offset {offset} exceed the {} positions of the model",
                self.max_positions
            );
        }
        match (&self.table, x.dtype()) {
            (Table::F64(angles), DType::F64) => rotate::<f64>(x, angles, offsets),
            (Table::F32(angles), DType::F32) => rotate::<f32>(x, angles, offsets),
            (Table::F32(angles), DType::F16) => rotate::<F16>(x, angles, offsets),
            (Table::F32(angles), DType::BF16) => rotate::<Bf16>(x, angles, offsets),
            (Table::Device { cos, sin }, _) => Ok(gd_kernels::on_device::rotary(x, cos, sin, offsets)?),
            (_, dtype) => bail!("rotary embedding: the angles were not built for {dtype:?}"),
        }
    }
}

fn rotate<T: Element>(x: &Tensor, angles: &Arc<Angles<T::Acc>>, offsets: &[usize]) -> Result<Tensor> {
    let x = with_contiguous_rows(x)?;
    let y = turn::<T>(&x, angles, offsets, false)?;
    let (angles, offsets) = (angles.clone(), offsets.to_vec());
    attach1("rotary", &x, y, move |_, dy| {
        let (dx, shape) = turn::<T>(dy, &angles, &offsets, true)?;
        Tensor::from_vec(dx, shape, dy.device())
    })
}

/// Rotates every row, backwards if asked.
fn turn<T: Element>(
    x: &Tensor,
    angles: &Angles<T::Acc>,
    offsets: &[usize],
    back: bool,
) -> Result<(Vec<T>, Shape)> {
    let x = with_contiguous_rows(x)?;
    let shape = x.shape().clone();
    let (_, h, n, d) = x.dims4()?;
    let half = d / 2;
    let (storage, layout) = x.storage_and_layout();
    let input = Rows::<T>::new(&storage, layout)?;
    let mut y = vec![T::zero(); input.count() * d];
    let rows = rows_per_chunk(d);
    for_chunks(&mut y, rows * d, |chunk, y| {
        vectorize(|| {
            for (j, y) in y.chunks_exact_mut(d).enumerate() {
                let i = chunk * rows + j;
                let offset = if let [offset] = offsets { *offset } else { offsets[i / (h * n)] };
                let at = (offset + i % n) * half;
                let (cos, sin) = (&angles.cos[at..at + half], &angles.sin[at..at + half]);
                let (x1, x2) = input.row(i).split_at(half);
                let (y1, y2) = y.split_at_mut(half);
                let out = y1.iter_mut().zip(y2);
                for ((((y1, y2), &x1), &x2), (&c, &s)) in out.zip(x1).zip(x2).zip(cos.iter().zip(sin)) {
                    let (x1, x2, s) = (x1.up(), x2.up(), if back { -s } else { s });
                    *y1 = T::down(x1 * c - x2 * s);
                    *y2 = T::down(x2 * c + x1 * s);
                }
            }
        });
    });
    Ok((y, shape))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{agree, noise};
    use candle_core::D;

    /// The same from candle primitives that have gradients; cos and sin `[1 or B, 1, N, D / 2]`.
    fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let wide = x.to_dtype(cos.dtype())?;
        let (x1, x2) = (wide.narrow(D::Minus1, 0, half)?, wide.narrow(D::Minus1, half, half)?);
        let y1 = (x1.broadcast_mul(cos)? - x2.broadcast_mul(sin)?)?;
        let y2 = (x2.broadcast_mul(cos)? + x1.broadcast_mul(sin)?)?;
        Tensor::cat(&[y1, y2], D::Minus1)?.to_dtype(x.dtype())
    }

    #[test]
    fn composition_agrees_in_values_and_gradients() -> Result<()> {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let fused = Rotary::new(16, 40, 1e4, RopeScaling::None, dtype, &Device::Cpu)?;
            let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let angle = |at: u32| f64::from(at / 8) * 1e4f64.powf(-f64::from(at % 8) / 8.0);
            // [1 or B, 1, N, D / 2]
            let rows = |f: fn(f64) -> f64, offsets: &[usize]| -> Result<Tensor> {
                let table: Vec<f64> = (0..40 * 8).map(|at| f(angle(at))).collect();
                let table = Tensor::from_vec(table, (40, 8), &Device::Cpu)?.to_dtype(wide)?;
                let rows = offsets.iter().map(|&offset| table.narrow(0, offset, 33)?.unsqueeze(0));
                Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0)
            };
            let x = noise(1, &[2, 33, 3, 16], dtype)?;
            for offsets in [&[3][..], &[7, 0]] {
                agree(
                    std::slice::from_ref(&x),
                    |t| fused.apply_each(&t[0].transpose(1, 2)?, offsets),
                    |t| {
                        let (cos, sin) = (rows(f64::cos, offsets)?, rows(f64::sin, offsets)?);
                        composed(&t[0].transpose(1, 2)?, &cos, &sin)
                    },
                )?;
            }
        }
        Ok(())
    }
}
