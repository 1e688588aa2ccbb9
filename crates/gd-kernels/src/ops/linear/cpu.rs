//! The CPU implementation of [`linear`](super::linear) for f32 activations.

use candle_core::{DType, Tensor};

use super::direct::{self, Weights};
use crate::backend::cpu::element::{Bf16, Element, F16};
use crate::backend::cpu::parallel::{par_items, vectorize, with_scratch};
use crate::backend::cpu::product::{
    MatmulPrecision, Matrix, PANEL, computes, multiply_by_columns, pack, product as matrix_product,
    product_values, with_matmul_precision,
};
use crate::backend::cpu::view::{Rows, cpu_slice};
use crate::backend::graph::{Finished, attach1, attach2, with_contiguous_rows};
use crate::error::Result;

/// The most rows of `x` that read the stored weights directly. With more rows, a matrix product costs less, for which weights
/// in half precision are widened once.
const MAX_DIRECT_ROWS: usize = 8;

/// Weight elements that a task widens.
const TASK_ELEMENTS: usize = 1 << 15;

/// Whether `weight` is of a type whose stored values f32 activations are multiplied by.
fn is_stored(weight: &Tensor) -> bool {
    matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// Whether the rows of `x` are multiplied by the weights as they are stored ([`direct`]).
pub(super) fn is_direct(x: &Tensor, weight: &Tensor) -> bool {
    let rows: usize = x.dims().iter().rev().skip(1).product();
    // Columns of weights in f32 are not copied for a product.
    let is_read = weight.dtype() != DType::F32 || weight.stride().last() == Some(&1);
    x.dtype() == DType::F32 && is_stored(weight) && rows <= MAX_DIRECT_ROWS && is_read
}

/// The product of validated `x` and `weight` by a matrix product, with weights in half precision widened to the type of `x`.
pub(super) fn many_rows(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let rows: usize = x.dims().iter().rev().skip(1).product();
    let is_exact = MatmulPrecision::current() == MatmulPrecision::F32;
    let by_columns = computes(rows, x.dtype(), x.device()) && is_exact && !x.track_op() && !weight.track_op();
    Ok(match (x.dtype(), weight.dtype()) {
        (DType::F32, DType::F16) if by_columns => widened_by_columns::<F16>(x, weight)?,
        (DType::F32, DType::BF16) if by_columns => widened_by_columns::<Bf16>(x, weight)?,
        (DType::F32, DType::F16) => widened::<F16>(x, weight)?,
        (DType::F32, DType::BF16) => widened::<Bf16>(x, weight)?,
        _ => super::product(x, &weight.to_dtype(x.dtype())?)?,
    })
}

/// The product with weights in half precision, of which each task widens some outputs in its cache.
fn widened_by_columns<T: Element<Acc = f32>>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, weight) = (rows_of(x)?.contiguous()?, with_contiguous_rows(weight)?);
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let ((xs, xl), (ws, wl)) = (rows.storage_and_layout(), weight.storage_and_layout());
    let (left, right) = (Matrix::new(cpu_slice::<f32>(&xs)?, xl), Rows::<T>::new(&ws, wl)?);
    let y = multiply_by_columns(left, right.count(), &|i, panel| {
        let outputs = i * PANEL..right.count().min((i + 1) * PANEL);
        with_scratch(outputs.len() * right.len(), |wide| {
            let rows = outputs.clone().zip(wide.chunks_exact_mut(right.len().max(1)));
            vectorize(
                #[inline(always)]
                || {
                    rows.for_each(|(output, wide)| {
                        T::widened(right.row(output), wide);
                    });
                },
            );
            pack(Matrix::of_rows(wide, right.len()).t(), 0, panel);
        });
    });
    Ok(Tensor::from_vec(y, shape, x.device())?)
}

/// `x weightᵀ` in f32 or f64 for x `[.., I]`. The leading dimensions are rows of one product here and not in the graph, where
/// each change of shape costs a copy of the gradient.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
    let precision = MatmulPrecision::current();
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let (rows, right) = (rows_of(x)?, weight.detach().t()?);
    let y: Finished = match x.dtype() {
        DType::F64 => (product_values::<f64>(&rows, &right)?, shape.into()).into(),
        _ => (product_values::<f32>(&rows, &right)?, shape.into()).into(),
    };
    attach2("linear", x, weight, y, move |x, weight, dy| {
        with_matmul_precision(precision, || {
            let (x_rows, dy_rows) = (rows_of(x)?, rows_of(dy)?);
            let dx = matrix_product(&dy_rows, weight)?.reshape(x.shape())?;
            let dweight = weight.track_op().then(|| matrix_product(&dy_rows.t()?, &x_rows));
            Ok([Some(dx), dweight.transpose()?])
        })
    })
}

/// `[.., I]` as a matrix, without a graph.
pub(crate) fn rows_of(t: &Tensor) -> candle_core::Result<Tensor> {
    match t.dims() {
        [_, _] => Ok(t.detach()),
        [.., width] => t.detach().reshape(((), *width)),
        [] => candle_core::bail!("a scalar has no rows"),
    }
}

/// With gradients, or too few rows for products here: one matrix product with the weights widened to f32 in memory.
fn widened<T: Element<Acc = f32>>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let weight = weight.contiguous()?;
    let wide = {
        let (storage, layout) = weight.storage_and_layout();
        let (from, to) = layout.contiguous_offsets().unwrap_or_default();
        widen(&cpu_slice::<T>(&storage)?[from..to])
    };
    let wide = attach1("widen", &weight, (wide, weight.shape().clone()), |weight, _, dy| {
        dy.to_dtype(weight.dtype())
    })?;
    Ok(super::product(x, &wide)?)
}

/// The elements in f32, on all threads.
fn widen<T: Element<Acc = f32>>(narrow: &[T]) -> Vec<f32> {
    let mut wide = vec![0f32; narrow.len()];
    let tasks = wide.chunks_mut(TASK_ELEMENTS).zip(narrow.chunks(TASK_ELEMENTS));
    par_items(tasks.collect(), &|_, (wide, narrow)| {
        vectorize(
            #[inline(always)]
            || {
                T::widened(narrow, wide);
            },
        );
    });
    wide
}

/// The products of up to [`MAX_DIRECT_ROWS`] rows with several weights: one pass over them as they are stored.
pub(super) fn direct(x: &Tensor, weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    let x = with_contiguous_rows(x)?;
    let weights = weights.iter().map(|weight| with_contiguous_rows(weight));
    let weights = weights.collect::<candle_core::Result<Vec<_>>>()?;
    let products = {
        let (storage, layout) = x.storage_and_layout();
        let stored: Vec<_> = weights.iter().map(Tensor::storage_and_layout).collect();
        let rows = stored.iter().map(|(storage, layout)| Weights::new(storage, layout));
        direct::multiply(&Rows::new(&storage, layout)?, &rows.collect::<candle_core::Result<Vec<_>>>()?)
    };
    let attach = |(weight, y): (&Tensor, Vec<f32>)| {
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = weight.dim(0)?;
        }
        Ok(attach2("linear", &x, weight, (y, shape.into()), |x, weight, dy| {
            let rows = rows_of(dy)?;
            let dx = matrix_product(&rows, &weight.to_dtype(DType::F32)?)?.reshape(x.shape())?;
            let dw = || matrix_product(&rows.t()?, &rows_of(x)?)?.to_dtype(weight.dtype());
            Ok([Some(dx), weight.track_op().then(dw).transpose()?])
        })?)
    };
    weights.iter().zip(products).map(attach).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{Result, Var};

    use super::*;
    use crate::ops::agreement::noise;
    use crate::{linear, linears};

    /// Values and gradients from f64.
    #[test]
    fn half_weights_give_what_they_give_in_full_precision() -> Result<()> {
        let mut direct_cases = 0;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for (lead, inputs, outputs) in [
                (vec![1, 1], 7, 3),
                (vec![1, 1], 576, 1537),
                (vec![3], 65, 33),
                (vec![2, 4], 32, 70),
                (vec![3, 3], 40, 5),
                (vec![5, 9], 24, 70),
                (vec![100], 33, 65),
                (vec![1, 0], 8, 4),
            ] {
                let shape = [&lead[..], &[inputs]].concat();
                let x = Var::from_tensor(&noise(1, &shape, DType::F32)?)?;
                let weight = Var::from_tensor(&noise(2, &[outputs, inputs], dtype)?)?;
                let bias = noise(3, &[outputs], dtype)?;
                let y = linear(&x, &weight, Some(&bias))?;
                let rows: usize = lead.iter().product();
                direct_cases += usize::from(rows <= MAX_DIRECT_ROWS);
                let dy = noise(4, y.dims(), DType::F32)?;
                let grads = (&y * &dy)?.sum_all()?.backward()?;
                let wide = |t: &Tensor| t.detach().to_dtype(DType::F64);
                let (xw, ww, dw) = (
                    wide(&x)?.reshape((rows, inputs))?,
                    wide(&weight)?,
                    wide(&dy)?.reshape((rows, outputs))?,
                );
                let expected = [
                    (y.clone(), xw.matmul(&ww.t()?)?.broadcast_add(&wide(&bias)?)?, 1e-4),
                    (grads.get(&x).unwrap().clone(), dw.matmul(&ww)?, 1e-4),
                    (
                        grads.get(&weight).unwrap().clone(),
                        dw.t()?.matmul(&xw)?,
                        if dtype == DType::F32 { 1e-4 } else { 3e-2 },
                    ),
                ];
                for (i, (got, expected, bound)) in expected.into_iter().enumerate() {
                    if expected.elem_count() == 0 {
                        continue;
                    }
                    let got = wide(&got)?.reshape(expected.shape())?;
                    let scale = (expected.abs()? + 1.0)?;
                    let worst = (got - expected)?.abs()?.div(&scale)?.max_all()?.to_scalar::<f64>()?;
                    assert!(worst <= bound, "{dtype:?} {lead:?} {inputs} {outputs}, result {i}: {worst}");
                }
            }
        }
        assert_eq!(direct_cases, 15);
        Ok(())
    }

    /// Rounded factors give rounded results and gradients, also if the backward pass runs outside the scope.
    #[test]
    fn mixed_precision_rounds_the_factors_of_all_products() -> Result<()> {
        let x = Var::from_tensor(&noise(1, &[3, 15, 40], DType::F32)?)?;
        let weight = Var::from_tensor(&noise(2, &[50, 40], DType::F32)?)?;
        let dy = noise(4, &[3, 15, 50], DType::F32)?;
        let y = with_matmul_precision(MatmulPrecision::Bf16, || linear(&x, &weight, None))?;
        let grads = (&y * &dy)?.sum_all()?.backward()?;
        let rounded = |t: &Tensor| t.detach().to_dtype(DType::BF16)?.to_dtype(DType::F64);
        let (xr, wr) = (rounded(&x)?.reshape((45, 40))?, rounded(&weight)?);
        let dr = rounded(&dy)?.reshape((45, 50))?;
        let exact = linear(&x, &weight, None)?.to_dtype(DType::F64)?.reshape((45, 50))?;
        let expected = [
            (&y, xr.matmul(&wr.t()?)?),
            (grads.get(&x).unwrap(), dr.matmul(&wr)?),
            (grads.get(&weight).unwrap(), dr.t()?.matmul(&xr)?),
        ];
        let distance = |a: &Tensor, b: &Tensor| (a - b)?.abs()?.max_all()?.to_scalar::<f64>();
        for (i, (got, expected)) in expected.into_iter().enumerate() {
            let worst = distance(&got.to_dtype(DType::F64)?.reshape(expected.shape())?, &expected)?;
            assert!(worst < 1e-4, "result {i}: {worst}");
        }
        assert!(distance(&exact, &xr.matmul(&wr.t()?)?)? > 1e-3);
        Ok(())
    }

    #[test]
    fn a_batch_gives_each_row_what_it_gives_alone() -> Result<()> {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let (x, w) = (noise(1, &[8, 81], DType::F32)?, noise(2, &[1700, 81], dtype)?);
            let strided = noise(1, &[81, 8], DType::F32)?.t()?;
            for x in [x, strided] {
                let alone = |r| linear(&x.narrow(0, r, 1)?, &w, None)?.to_vec2::<f32>();
                for rows in 1..=8 {
                    let together = linear(&x.narrow(0, 0, rows)?, &w, None)?.to_vec2::<f32>()?;
                    for (r, row) in together.iter().enumerate() {
                        assert!(alone(r)?[0] == *row, "{dtype:?}, row {r} of {rows}");
                    }
                }
            }
        }
        let (x, w) = (noise(1, &[2, 47], DType::F32)?, noise(2, &[31, 48], DType::BF16)?);
        let error = linear(&x, &w, None).unwrap_err().to_string();
        assert!(error.contains("[2, 47]") && error.contains("[31, 48]"), "{error}");
        Ok(())
    }

    /// With few rows and with many, with types that are multiplied in different ways, and with gradients.
    #[test]
    fn several_projections_are_those_of_each_alone() -> Result<()> {
        let bias = noise(5, &[33], DType::F32)?;
        for rows in [0, 1, 8, 9, 50] {
            let x = Var::from_tensor(&noise(1, &[rows, 70], DType::F32)?)?;
            let columns = noise(3, &[70, 12], DType::F32)?.t()?;
            let weights = [noise(2, &[33, 70], DType::F16)?, noise(3, &[1000, 70], DType::F32)?, columns];
            let [a, b, c] = &weights;
            for projections in
                [[(a, Some(&bias)), (b, None), (a, None)], [(a, Some(&bias)), (b, None), (c, None)]]
            {
                let together = linears(&x, projections)?;
                for ((weight, bias), together) in projections.into_iter().zip(&together) {
                    let alone = linear(&x, weight, bias)?;
                    assert_eq!(alone.to_vec2::<f32>()?, together.to_vec2::<f32>()?, "{rows} rows");
                    let gradient = |y: &Tensor| -> Result<_> {
                        y.sqr()?.sum_all()?.backward()?.get(&x).map(|dx| dx.to_vec2::<f32>()).transpose()
                    };
                    assert_eq!(gradient(&alone)?, gradient(together)?, "{rows} rows");
                }
            }
        }
        Ok(())
    }

    /// Weights in half precision give the bits of the same weights in f32, also where they are widened.
    #[test]
    fn many_rows_have_the_bits_of_widened_weights() -> Result<()> {
        for (rows, inputs, outputs) in [(9, 5, 3), (40, 70, 130), (100, 600, 65), (97, 33, 64)] {
            let x = noise(1, &[rows, inputs], DType::F32)?;
            for dtype in [DType::F16, DType::BF16] {
                let weight = noise(2, &[outputs + 2, inputs + 3], dtype)?
                    .narrow(0, 1, outputs)?
                    .narrow(1, 2, inputs)?;
                let wide = weight.to_dtype(DType::F32)?;
                let expected = linear(&x, &wide, None)?.to_vec2::<f32>()?;
                let got = linear(&x, &weight, None)?.to_vec2::<f32>()?;
                assert!(got == expected, "{dtype:?} {rows} {inputs} {outputs}");
            }
        }
        Ok(())
    }

    /// Weights in half precision give the bits of the same weights in f32.
    #[test]
    fn direct_products_have_the_bits_of_widened_weights_of_any_strides() -> Result<()> {
        let x = noise(1, &[3, 1, 70], DType::F32)?;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let all = noise(2, &[40, 90], dtype)?;
            let weight = all.narrow(0, 5, 33)?.narrow(1, 9, 70)?;
            let wide = weight.to_dtype(DType::F32)?.force_contiguous()?;
            let expected = linear(&x, &wide, None)?.flatten_all()?.to_vec1::<f32>()?;
            let got = linear(&x, &weight, None)?.flatten_all()?.to_vec1::<f32>()?;
            assert_eq!(got, expected, "{dtype:?}");
            // Columns instead of rows are contiguous.
            let got = linear(&x, &weight.t()?.contiguous()?.t()?, None)?.flatten_all()?.to_vec1::<f32>()?;
            let close = got.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()));
            assert!(close && (dtype == DType::F32 || got == expected), "{dtype:?}");
        }
        Ok(())
    }
}
