//! The projection to heads, with normalisation and rotation.

use candle_core::{DType, Device, Tensor};

use super::Sizes;
use crate::backend::cpu::parallel::{par_items, sum_rows, vectorize, with_scratch};
use crate::backend::cpu::product::{
    BLOCK_ROWS, MatmulPrecision, Matrix, Multiply, TASK_ROWS, with_matmul_precision,
};
use crate::backend::cpu::view::{Rows, with_slices};
use crate::backend::graph::{attach2, attach3, with_contiguous_rows};
use crate::backend::span::{Pass, operator_span};
use crate::error::Result;
use crate::ops::heads::{HeadProjection, Rotation};
use crate::ops::rms_norm::cpu::{normalize_row, row_gradients};
use crate::ops::rotary::cpu::{Direction, angles, rotate_row};

/// The name of the operator in candle's graph.
const NAME: &str = "project_to_heads";

/// [`crate::project_to_heads`] for validated tensors of one dtype.
pub(crate) fn project_to_heads(x: &Tensor, weight: &Tensor, heads: &HeadProjection<'_>) -> Result<Tensor> {
    Ok(match x.dtype() {
        DType::F64 => fused::<f64>(x, weight, heads)?,
        _ => fused::<f32>(x, weight, heads)?,
    })
}

fn fused<T: Multiply>(
    x: &Tensor,
    weight: &Tensor,
    heads: &HeadProjection<'_>,
) -> candle_core::Result<Tensor> {
    let span = operator_span(NAME, Pass::Forward);
    let precision = MatmulPrecision::current();
    let (batch, n, channels) = x.dims3()?;
    let (outputs, d) = (weight.dim(0)?, heads.head_dim);
    let steps = Steps::<T> {
        sizes: Sizes { batch, heads: outputs / d, rows: n, head_dim: d },
        channels,
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
    let y = with_slices::<T, _, _>([x, weight], |[x, weight]| {
        steps.forward(x, Matrix::of_rows(weight, channels))
    })?;
    let y = (y, (batch, outputs / d, n, d).into());
    drop(span);
    let backward =
        move |x: &Tensor, weight: &Tensor, dy: &Tensor| -> candle_core::Result<[Option<Tensor>; 3]> {
            let dy = with_contiguous_rows(dy)?;
            let (storage, layout) = dy.storage_and_layout();
            let dy = Rows::<T>::new(&storage, layout)?;
            let is_trained = weight.track_op();
            let (dx, dweight, dnorm) = with_slices::<T, _, _>([x, weight], |[x, weight]| {
                let weight = Matrix::of_rows(weight, channels);
                with_matmul_precision(precision, || steps.backward(x, weight, &dy, is_trained))
            })?;
            let dweight = dweight.map(|values| Tensor::from_vec(values, weight.shape(), &Device::Cpu));
            Ok([
                Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?),
                dweight.transpose()?,
                Some(Tensor::from_vec(dnorm, d, &Device::Cpu)?),
            ])
        };
    match heads.norm {
        Some((norm, _)) => {
            attach3(NAME, [x, weight, norm], y, move |[x, weight, _], _, dy| backward(x, weight, dy))
        }
        None => attach2(NAME, x, weight, y, move |x, weight, dy| {
            let [dx, dweight, _] = backward(x, weight, dy)?;
            Ok([dx, dweight])
        }),
    }
}

/// What follows the product.
struct Steps<T> {
    sizes: Sizes,
    /// C.
    channels: usize,
    norm: Option<Vec<T>>,
    eps: f64,
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

    /// The heads `[B, H, N, D]` of x `[B, N, C]`.
    fn forward(&self, x: &[T], weight: Matrix<'_, T>) -> Vec<T> {
        let (sizes, c, d) = (self.sizes, self.channels, self.sizes.head_dim);
        let packed = T::pack(weight.t());
        let mut out = vec![T::zero(); sizes.len()];
        sizes.for_head_rows(&mut out, &|(b, first, mut heads)| {
            let rows = heads[0].len() / d;
            let x = Matrix::of_rows(&x[(b * sizes.rows + first) * c..][..rows * c], c);
            with_scratch(rows * sizes.width() + d, |scratch| {
                let (normed, products) = scratch.split_at_mut(d);
                T::multiply(x, &packed, products, false);
                vectorize(
                    #[inline(always)]
                    || {
                        for (n, products) in products.chunks_exact(sizes.width()).enumerate() {
                            let angles = self.angles(b, first + n);
                            for (product, head) in products.chunks_exact(d).zip(&mut heads) {
                                self.finish(product, normed, angles, &mut head[n * d..][..d]);
                            }
                        }
                    },
                );
            });
        });
        out
    }

    /// Normalises and rotates a head.
    #[inline(always)]
    fn finish(&self, product: &[T], normed: &mut [T], angles: Option<(&[T], &[T])>, out: &mut [T]) {
        match (&self.norm, angles) {
            (Some(weight), Some(angles)) => {
                normalize_row((product, weight), self.eps, normed);
                rotate_row(normed, angles, out, Direction::Forward);
            }
            (Some(weight), None) => normalize_row((product, weight), self.eps, out),
            (None, Some(angles)) => rotate_row(product, angles, out, Direction::Forward),
            (None, None) => out.copy_from_slice(product),
        }
    }

    /// The gradients of x, of the weight of the projection where it is trained, and of that of the normalisation.
    fn backward(
        &self,
        x: &[T],
        weight: Matrix<'_, T>,
        dy: &Rows<'_, T>,
        is_trained: bool,
    ) -> (Vec<T>, Option<Vec<T>>, Vec<T>) {
        let (sizes, c, d) = (self.sizes, self.channels, self.sizes.head_dim);
        let width = sizes.width();
        // Only a normalisation needs the products again.
        let forward = self.norm.as_ref().map(|_| T::pack(weight.t()));
        let packed = T::pack(weight);
        let zeros = |len| vec![T::zero(); len];
        let (mut dx, mut dweight) = (zeros(x.len()), is_trained.then(|| zeros(width * c)));
        let mut dnorm = zeros((x.len() / c).div_ceil(TASK_ROWS) * d);
        let mut dproducts = zeros(BLOCK_ROWS.min(x.len() / c) * width);
        let blocks = x.chunks(BLOCK_ROWS * c).zip(dx.chunks_mut(BLOCK_ROWS * c));
        for (i, ((x, dx), dnorm)) in blocks.zip(dnorm.chunks_mut(BLOCK_ROWS / TASK_ROWS * d)).enumerate() {
            let tasks: Vec<_> = x
                .chunks(TASK_ROWS * c)
                .zip(dx.chunks_mut(TASK_ROWS * c))
                .zip(dnorm.chunks_mut(d).zip(dproducts.chunks_mut(TASK_ROWS * width)))
                .collect();
            par_items(tasks, &|task, ((x, dx), (dnorm, dproducts))| {
                let dproducts = &mut dproducts[..x.len() / c * width];
                let first = i * BLOCK_ROWS + task * TASK_ROWS;
                self.product_gradients(Matrix::of_rows(x, c), forward.as_ref(), first, dy, dproducts, dnorm);
                T::multiply(Matrix::of_rows(dproducts, width), &packed, dx, false);
            });
            if let Some(dweight) = &mut dweight {
                let dproducts = Matrix::of_rows(&dproducts[..x.len() / c * width], width);
                T::multiply_all(dproducts.t(), &T::pack(Matrix::of_rows(x, c)), dweight, true);
            }
        }
        (dx, dweight, sum_rows(&dnorm, d))
    }

    /// The gradients of the products of rows from `first` on, and their part of that of the weight of the normalisation,
    /// which is added to zeros.
    fn product_gradients(
        &self,
        x: Matrix<'_, T>,
        forward: Option<&T::Packed>,
        first: usize,
        dy: &Rows<'_, T>,
        dproducts: &mut [T],
        dnorm: &mut [T],
    ) {
        let (sizes, d) = (self.sizes, self.sizes.head_dim);
        let width = sizes.width();
        let products = forward.map_or(0, |_| dproducts.len());
        with_scratch(products + d, |scratch| {
            let (back, products) = scratch.split_at_mut(d);
            if let Some(forward) = forward {
                T::multiply(x, forward, products, false);
            }
            vectorize(
                #[inline(always)]
                || {
                    for (n, dproducts) in dproducts.chunks_exact_mut(width).enumerate() {
                        let m = first + n;
                        let angles = self.angles(m / sizes.rows, m % sizes.rows);
                        for (h, dproduct) in dproducts.chunks_exact_mut(d).enumerate() {
                            let dy = dy.row(sizes.row(m, h));
                            let dy = match angles {
                                Some(angles) => {
                                    rotate_row(dy, angles, back, Direction::Backward);
                                    &*back
                                }
                                None => dy,
                            };
                            match &self.norm {
                                Some(weight) => {
                                    let product = &products[n * width + h * d..][..d];
                                    row_gradients((product, weight, dy), self.eps, dproduct, dnorm);
                                }
                                None => dproduct.copy_from_slice(dy),
                            }
                        }
                    }
                },
            );
        });
    }
}
