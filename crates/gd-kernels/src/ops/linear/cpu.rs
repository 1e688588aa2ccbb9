//! The CPU implementation of [`linear`](super::linear) for f32 activations.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::direct;
use crate::backend::cpu::element::{Bf16, Element, F16};
use crate::backend::cpu::parallel::vectorize;
use crate::backend::cpu::product::{
    MatmulPrecision, product as matrix_product, product_values, with_matmul_precision,
};
use crate::backend::cpu::stored::Stored;
use crate::backend::cpu::view::{Rows, cpu_slice};
use crate::backend::graph::{Finished, attach1, attach2, with_contiguous_rows};
use crate::error::Result;

/// The most rows of `x` that read the stored weights directly. With more rows, a matrix product costs less, for which weights
/// in half precision are widened once.
const MAX_DIRECT_ROWS: usize = 8;

/// Weight elements that a task widens.
const TASK_ELEMENTS: usize = 1 << 15;

/// Projects f32 `x` by f32, f16 or bf16 `weight`, both validated.
pub(super) fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let rows: usize = x.dims().iter().rev().skip(1).product();
    let is_direct = rows <= MAX_DIRECT_ROWS;
    Ok(match weight.dtype() {
        DType::F16 if is_direct => direct::<F16>(x, weight)?,
        DType::F16 => widened::<F16>(x, weight)?,
        DType::BF16 if is_direct => direct::<Bf16>(x, weight)?,
        DType::BF16 => widened::<Bf16>(x, weight)?,
        // Columns of weights are not copied for a product.
        _ if is_direct && weight.stride().last() == Some(&1) => direct::<f32>(x, weight)?,
        _ => super::product(x, weight)?,
    })
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

/// More rows: one matrix product with the weights widened to f32.
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
    wide.par_chunks_mut(TASK_ELEMENTS).zip(narrow.par_chunks(TASK_ELEMENTS)).for_each(|(wide, narrow)| {
        vectorize(
            #[inline(always)]
            || {
                T::widened(narrow, wide);
            },
        );
    });
    wide
}

/// Up to [`MAX_DIRECT_ROWS`] rows: one pass over the stored weights.
fn direct<T: Stored>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (x, weight) = (with_contiguous_rows(x)?, with_contiguous_rows(weight)?);
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = weight.dim(0)?;
    }
    let y = {
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        direct::multiply(&Rows::<f32>::new(&xs, xl)?, &Rows::<T>::new(&ws, wl)?)
    };
    Ok(attach2("linear", &x, &weight, (y, shape.into()), |x, weight, dy| {
        let rows = rows_of(dy)?;
        let dx = matrix_product(&rows, &weight.to_dtype(DType::F32)?)?.reshape(x.shape())?;
        let dw = || matrix_product(&rows.t()?, &rows_of(x)?)?.to_dtype(weight.dtype());
        Ok([Some(dx), weight.track_op().then(dw).transpose()?])
    })?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Result, Var};

    use super::*;
    use crate::linear;
    use crate::ops::agreement::noise;

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
