//! Projections to and from heads as one operator each, for trainings in f32 and f64 on the CPU.

use candle_core::{DType, Tensor};

use super::{HeadProjection, Rotation};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, rows_per_chunk, sum_rows, vectorize};
use crate::backend::cpu::product::{
    MatmulPrecision, Multiply, product, product_values, with_matmul_precision,
};
use crate::backend::cpu::view::Rows;
use crate::backend::graph::{attach2, attach3, with_contiguous_rows};
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;
use crate::ops::linear::cpu::rows_of;
use crate::ops::rms_norm::cpu::{normalize_row, row_gradients};
use crate::ops::rotary::cpu::{Direction, angles, rotate_row};

/// The names of the operators in candle's graph.
const TO_HEADS: &str = "project_to_heads";
const FROM_HEADS: &str = "project_from_heads";

/// [`super::project_to_heads`] for validated tensors of one dtype.
pub(super) fn project_to_heads(x: &Tensor, weight: &Tensor, heads: &HeadProjection<'_>) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F64 => to_heads::<f64>(x, weight, heads)?,
        _ => to_heads::<f32>(x, weight, heads)?,
    })
}

/// [`super::project_from_heads`] for validated tensors of one dtype.
pub(super) fn project_from_heads(y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(match y.dtype() {
        DType::F64 => from_heads::<f64>(y, weight)?,
        _ => from_heads::<f32>(y, weight)?,
    })
}

/// The order of the elements of heads.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    rows: usize,
    head_dim: usize,
}

impl Sizes {
    /// The number of elements.
    fn len(self) -> usize {
        self.batch * self.heads * self.rows * self.head_dim
    }

    /// Of row `i` of `[B, H, N, D]`: the batch entry, the position, and the row of `[B, N, H, D]`.
    #[inline(always)]
    fn transposed(self, i: usize) -> (usize, usize, usize) {
        let (n, h, b) = (i % self.rows, i / self.rows % self.heads, i / (self.rows * self.heads));
        (b, n, (b * self.rows + n) * self.heads + h)
    }
}

/// The normalisation and the rotation of heads.
struct Steps<T> {
    sizes: Sizes,
    eps: f64,
    norm: Option<Vec<T>>,
    /// Cosines and sines by position, and the positions of row 0.
    rotation: Option<([Vec<T>; 2], Vec<usize>)>,
}

impl<T: Multiply> Steps<T> {
    /// Cosines and sines for row `n` of batch entry `b`.
    #[inline(always)]
    fn angles(&self, b: usize, n: usize) -> Option<(&[T], &[T])> {
        let ([cos, sin], offsets) = self.rotation.as_ref()?;
        let half = self.sizes.head_dim / 2;
        let position = n + if let [offset] = offsets[..] { offset } else { offsets[b] };
        Some((&cos[position * half..][..half], &sin[position * half..][..half]))
    }

    /// `[B, H, N, D]` from the products `[B, N, H, D]`.
    fn forward(&self, products: &[T]) -> Vec<T> {
        let (sizes, d) = (self.sizes, self.sizes.head_dim);
        let mut out = vec![T::zero(); sizes.len()];
        let rows = rows_per_chunk(d);
        for_chunks(&mut out, rows * d, |chunk, out| {
            let mut normed = vec![T::zero(); d];
            vectorize(|| {
                for (j, out) in out.chunks_exact_mut(d).enumerate() {
                    let (b, n, from) = sizes.transposed(chunk * rows + j);
                    let product = &products[from * d..][..d];
                    let normed = match &self.norm {
                        Some(weight) => {
                            normalize_row((product, weight), self.eps, &mut normed);
                            &normed
                        }
                        None => product,
                    };
                    match self.angles(b, n) {
                        Some(angles) => rotate_row(normed, angles, out, Direction::Forward),
                        None => out.copy_from_slice(normed),
                    }
                }
            });
        });
        out
    }

    /// The gradients of the products `[B, N, H, D]` and of the weight of the normalisation. `products` are needed with a
    /// normalisation alone.
    fn backward(&self, products: &[T], dy: &Rows<'_, T>) -> (Vec<T>, Vec<T>) {
        let (sizes, d) = (self.sizes, self.sizes.head_dim);
        let mut out = vec![T::zero(); sizes.len()];
        let rows = rows_per_chunk(d);
        let mut partial = vec![T::zero(); (sizes.len() / d).div_ceil(rows) * d];
        for_chunks2((&mut out, rows * d), (&mut partial, d), |chunk, out, dweight| {
            let mut back = vec![T::zero(); d];
            vectorize(|| {
                for (j, out) in out.chunks_exact_mut(d).enumerate() {
                    // Row (b, n, h) of the products.
                    let i = chunk * rows + j;
                    let (h, n) = (i % sizes.heads, i / sizes.heads % sizes.rows);
                    let b = i / (sizes.heads * sizes.rows);
                    let dy = dy.row((b * sizes.heads + h) * sizes.rows + n);
                    let dy = match self.angles(b, n) {
                        Some(angles) => {
                            rotate_row(dy, angles, &mut back, Direction::Backward);
                            &back
                        }
                        None => dy,
                    };
                    match &self.norm {
                        Some(weight) => {
                            row_gradients((&products[i * d..][..d], weight, dy), self.eps, out, dweight);
                        }
                        None => out.copy_from_slice(dy),
                    }
                }
            });
        });
        (out, sum_rows(&partial, d))
    }
}

fn to_heads<T: Multiply>(x: &Tensor, weight: &Tensor, heads: &HeadProjection<'_>) -> Result<Tensor> {
    let span = operator_span(TO_HEADS, Pass::Forward);
    let precision = MatmulPrecision::current();
    let (batch, n, _) = x.dims3()?;
    let (outputs, d) = (weight.dim(0)?, heads.head_dim);
    let steps = Steps::<T> {
        sizes: Sizes { batch, heads: outputs / d, rows: n, head_dim: d },
        eps: heads.norm.map_or(0.0, |(_, eps)| eps),
        norm: heads.norm.map(|(weight, _)| weight.to_vec1::<T>()).transpose()?,
        rotation: match heads.rotation {
            Some(Rotation { cos, sin, offsets }) => {
                let positions = offsets.iter().max().map_or(0, |offset| offset + n);
                Some((angles::<T>(cos, sin, positions)?, offsets.to_vec()))
            }
            None => None,
        },
    };
    let products = product_values::<T>(&rows_of(x)?, &weight.detach().t()?)?;
    let y = (steps.forward(&products), (batch, outputs / d, n, d).into());
    drop(span);
    // Only a normalisation needs the products again.
    let products = if steps.norm.is_some() { products } else { Vec::new() };
    let backward = move |x: &Tensor, weight: &Tensor, dy: &Tensor| -> candle_core::Result<[Tensor; 3]> {
        let dy = with_contiguous_rows(dy)?;
        let (dproducts, dnorm) = {
            let (storage, layout) = dy.storage_and_layout();
            steps.backward(&products, &Rows::new(&storage, layout)?)
        };
        let dproducts = Tensor::from_vec(dproducts, ((), outputs), dy.device())?;
        let dnorm = Tensor::from_vec(dnorm, d, dy.device())?;
        with_matmul_precision(precision, || {
            let dx = product(&dproducts, weight)?.reshape(x.shape())?;
            Ok([dx, product(&dproducts.t()?, &rows_of(x)?)?, dnorm])
        })
    };
    Ok(match heads.norm {
        Some((norm, _)) => {
            attach3(TO_HEADS, [x, weight, norm], y, move |[x, weight, _], _, dy| backward(x, weight, dy))?
        }
        None => attach2(TO_HEADS, x, weight, y, move |x, weight, dy| {
            let [dx, dweight, _] = backward(x, weight, dy)?;
            Ok([dx, dweight])
        })?,
    })
}

/// The rows `[B N, H D]` of heads `[B, H, N, D]`.
fn side_by_side<T: Multiply>(y: &Tensor) -> candle_core::Result<Tensor> {
    let y = with_contiguous_rows(&y.detach())?;
    let (batch, heads, rows, head_dim) = y.dims4()?;
    let sizes = Sizes { batch, heads, rows, head_dim };
    let mut out = vec![T::zero(); sizes.len()];
    let (storage, layout) = y.storage_and_layout();
    let y = Rows::<T>::new(&storage, layout)?;
    let chunk_rows = rows_per_chunk(head_dim);
    for_chunks(&mut out, chunk_rows * head_dim, |chunk, out| {
        for (j, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let i = chunk * chunk_rows + j;
            let (h, n, b) = (i % heads, i / heads % rows, i / (heads * rows));
            out.copy_from_slice(y.row((b * heads + h) * rows + n));
        }
    });
    Tensor::from_vec(out, (batch * rows, heads * head_dim), &candle_core::Device::Cpu)
}

fn from_heads<T: Multiply>(y: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let span = operator_span(FROM_HEADS, Pass::Forward);
    let precision = MatmulPrecision::current();
    let (batch, heads, n, d) = y.dims4()?;
    let rows = side_by_side::<T>(y)?;
    let out = product_values::<T>(&rows, &weight.detach().t()?)?;
    let shape = (batch, n, weight.dim(0)?).into();
    drop(span);
    Ok(attach2(FROM_HEADS, y, weight, (out, shape), move |_, weight, dy| {
        with_matmul_precision(precision, || {
            let dy = rows_of(dy)?;
            let drows = product_values::<T>(&dy, &weight.detach())?;
            // Without steps, the heads are the transposed rows.
            let steps = Steps::<T> {
                sizes: Sizes { batch, heads, rows: n, head_dim: d },
                eps: 0.0,
                norm: None,
                rotation: None,
            };
            let dheads = Tensor::from_vec(steps.forward(&drows), (batch, heads, n, d), weight.device())?;
            Ok([dheads, product(&dy.t()?, &rows)?])
        })
    })?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result};

    use super::*;
    use crate::ops::agreement::{agree, noise};
    use crate::{project_from_heads, project_to_heads, rms_norm, rotary};

    #[test]
    fn projections_to_heads_agree_with_their_composition() -> Result<()> {
        let dtype = DType::F64;
        let (b, n, c, h, d) = (2, 19, 10, 3, 8);
        let (cos, sin) = (noise(7, &[40, 4], dtype)?, noise(8, &[40, 4], dtype)?);
        let inputs = [noise(1, &[b, n, c], dtype)?, noise(2, &[h * d, c], dtype)?, noise(3, &[d], dtype)?];
        let mut cases = 0;
        for with_norm in [false, true] {
            for offsets in [None, Some(&[3][..]), Some(&[5, 0])] {
                let inputs = if with_norm { &inputs[..] } else { &inputs[..2] };
                let fused = |t: &[Tensor]| {
                    let rotation = offsets.map(|offsets| Rotation { cos: &cos, sin: &sin, offsets });
                    let heads = HeadProjection { head_dim: d, norm: t.get(2).map(|w| (w, 1e-3)), rotation };
                    Ok(project_to_heads(&t[0], &t[1], &heads)?)
                };
                agree(inputs, fused, |t| {
                    let y = t[0].broadcast_matmul(&t[1].t()?)?.reshape((b, n, h, d))?;
                    let y = match t.get(2) {
                        Some(weight) => rms_norm(&y, weight, 1e-3)?,
                        None => y,
                    };
                    let y = y.transpose(1, 2)?;
                    Ok(match offsets {
                        Some(offsets) => rotary(&y, &cos, &sin, offsets)?,
                        None => y,
                    })
                })?;
                cases += 1;
            }
        }
        assert_eq!(cases, 6);
        Ok(())
    }

    #[test]
    fn projections_from_heads_agree_with_their_composition() -> Result<()> {
        let (b, n, c, h, d) = (2, 19, 10, 3, 8);
        let inputs = [noise(1, &[b, n, h, d], DType::F64)?, noise(2, &[c, h * d], DType::F64)?];
        agree(
            &inputs,
            |t| Ok(project_from_heads(&t[0].transpose(1, 2)?, &t[1])?),
            |t| t[0].reshape((b, n, h * d))?.broadcast_matmul(&t[1].t()?),
        )
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let t = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let heads = HeadProjection { head_dim: 5, norm: None, rotation: None };
        let error = project_to_heads(&t(&[1, 40, 4])?, &t(&[12, 4])?, &heads).unwrap_err().to_string();
        assert!(error.contains("[12, 4]") && error.contains("dimension of 5"), "{error}");
        let error = project_from_heads(&t(&[1, 3, 40, 4])?, &t(&[8, 13])?).unwrap_err().to_string();
        assert!(error.contains("[8, 13]"), "{error}");
        Ok(())
    }
}
